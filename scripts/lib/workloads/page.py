# SPDX-License-Identifier: Apache-2.0
"""Writes docs/workloads.md from the results.

usage: python3 -m workloads.page RESULTS PAGE
"""
import sys

from workloads.results import FAILED, NOT_RUN, PASSED, Results

HEAD = """# Workloads

`scripts/workloads` writes this page; do not edit it. It runs real programs from Debian's packages on real pods, through
the CRI socket, and each test asserts what the program's users rely on
([tests/tests/workloads](../tests/tests/workloads/main.rs)). The results are in [workloads.json](workloads.json), and a run
of some workloads adds to them. The images are made from the packages by
[tests/images/workload_images.py](../tests/images/workload_images.py); none comes from a registry outside.

An emulated host has one slow CPU, so the seconds say little about a real one. They include the start of a daemon, the
pull of the image and the boot of the pods.
"""
SEEN_LENGTH = 160


def cell(text):
    """Returns text for a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def code(text):
    """Returns what a program said as code, in one line, so that nothing in it is markup."""
    words = " ".join(str(text).split()).replace("`", "'")
    if len(words) > SEEN_LENGTH:
        words = words[:SEEN_LENGTH].rsplit(" ", 1)[0] + " ..."
    return f"`{words}`" if words else "nothing"


def title_of(name):
    return name.rpartition("::")[2].replace("_", " ")


def counts(workloads):
    states = [result["state"] for result in workloads.values()]
    return {state: states.count(state) for state in (PASSED, FAILED, NOT_RUN)}


def table(workloads):
    lines = ["| workload | what its users rely on | result | seconds |", "|---|---|---|---|"]
    for name, result in workloads.items():
        lines.append(f"| {title_of(name)} | {cell(result.get('title', ''))} | {result['state']} | {result.get('seconds', '')} |")
    return "\n".join(lines) + "\n"


def section(name, result):
    text = [f"\n### {title_of(name)}\n\n`{name}`, {result['state']} on {result['day']} at {result['project']}; host: {result['host']}\n"]
    if result["state"] == FAILED:
        text.append(f"\n**Failed**: {code(result['reason'])}\n")
    text.append("\n")
    text += [f"- {'' if right else '**wrong**, '}{case}: {code(seen)}\n" for case, right, seen in result["cases"]]
    return "".join(text)


def page(results):
    workloads = dict(sorted(results.workloads.items()))
    number = counts(workloads)
    text = [HEAD, f"\n{len(workloads)} workloads: {', '.join(f'{count} {state}' for state, count in number.items())}.\n\n",
            table(workloads), "\n## What was seen\n"]
    text += [section(name, result) for name, result in workloads.items() if result["state"] != NOT_RUN]
    return "".join(text)


def write(results, path):
    with open(path, "w") as file:
        file.write(page(results))


if __name__ == "__main__":
    write(Results(sys.argv[1]), sys.argv[2])
