# SPDX-License-Identifier: Apache-2.0
"""Writes docs/conformance.md from the results.

usage: python3 -m kubernetes_conformance.page RESULTS PAGE
"""
import os
import re
import sys
import tomllib

from kubernetes_conformance.results import FAILED, NOT_RUN, PASSED, Results, area_of

CAUSES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "causes.toml")
HEAD = """# Conformance

`scripts/conformance --kubernetes` writes this page; do not edit it. It runs the specs that Kubernetes' own suite marks
`[Conformance]`, with the suite's program, in a cluster of [`scripts/cluster`](../CONTRIBUTING.md#a-cluster-to-play-with). The results are in
[conformance.json](conformance.json), and a run of some specs adds to them. critest, the suite of CRI, is another:
`scripts/conformance` without options runs it, and `scripts/test` runs all of it.

## How it was run

| pods | Kubernetes | nodes | kernel of the node | container runtime | project | day |
|---|---|---|---|---|---|---|
"""
SETTING = ("kubernetes", "node", "kernel", "runtime", "project", "day")
PODS = {"runtime-class": "an admission policy adds the RuntimeClass and its overhead to each pod that does not ask for "
                         "the host's network",
        "plain": "no pod names a RuntimeClass"}
TITLES = {"runtime-class": "Every pod with a RuntimeClass", "plain": "No pod with a RuntimeClass"}
AFTER_SETTING = """
The control plane and the suite run on the machine, the node beside them. The node's containerd, a delegate, has the pods
that share the host's network; all others are in microVMs. Several specs run at a time; what fails is run again alone,
because an emulated node has one slow CPU. The images are made here from Debian's packages and built programs
([tests/images](../tests/images/kubernetes_images.py)).
"""


class Cause:
    """Why some specs do not pass, as found by a person: what their messages do not say."""

    def __init__(self, entry):
        self.spec, self.message = re.compile(entry["spec"]), re.compile(entry.get("message", ""))
        self.why = entry["why"]

    def explains(self, name, result):
        return self.spec.search(name) and self.message.search(result.get("reason", ""))


def read_causes(path=CAUSES):
    with open(path, "rb") as file:
        return [Cause(entry) for entry in tomllib.load(file).get("cause", [])]


def cause_of(causes, name, result):
    return next((cause for cause in causes if cause.explains(name, result)), None)


def cell(text):
    """Returns text for a cell of a table."""
    return text.replace("|", "\\|")


def quoted(message):
    """Returns a message of the suite as code, so that nothing in it is markup."""
    return "`" + message.replace("`", "'") + "`"


def counts(specs):
    """Returns lines of (area, specs, passed, failed, not run), and a last one for all. Areas of which nothing ran are left
    out."""
    areas = {}
    for name, result in specs.items():
        areas.setdefault(area_of(name), []).append(result["state"])
    lines = [(area, len(states), *(states.count(state) for state in (PASSED, FAILED, NOT_RUN)))
             for area, states in sorted(areas.items()) if set(states) != {NOT_RUN}]
    return [*lines, ("all", *(sum(line[column] for line in lines) for column in range(1, 5)))]


def table(specs):
    lines = ["| area | specs | passed | failed | not run |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, line)) + " |" for line in counts(specs))]) + "\n"


def state_of(result):
    """Returns how a spec ended. One that failed beside others says little until it has failed alone."""
    beside = result["state"] == FAILED and not result.get("alone")
    return "failed beside others, not yet run alone" if beside else result["state"]


def not_passed(specs, causes):
    """Returns the section of those specs that failed or that the suite skipped, by area."""
    text, area = [], None
    for name, result in sorted(specs.items()):
        if result["state"] == PASSED or "reason" not in result:
            continue
        if area_of(name) != area:
            area = area_of(name)
            text.append(f"\n| {area} | | why |\n|---|---|---|")
        cause = cause_of(causes, name, result)
        why = cause.why if cause else quoted(result["reason"])
        text.append(f"| {cell(name)} | {state_of(result)} | {cell(why)} |")
    return "\n".join(text) + "\n" if text else "\nNone.\n"


def slow(specs):
    """Returns the names of the specs that passed only when they ran alone."""
    return sorted(name for name, result in specs.items() if result["state"] == PASSED and result.get("alone"))


def of_several_nodes(specs):
    """Returns the names of the specs that passed where the cluster had more than one node."""
    return sorted(name for name, result in specs.items() if result["state"] == PASSED and "nodes" in result)


def section(way, specs, causes):
    text = [f"\n## {TITLES[way]}\n\n{table(specs)}"]
    text.append(f"\n### What did not pass\n{not_passed(specs, causes)}")
    lists = (("Passed only when run again alone", slow(specs)),
             ("Passed in a cluster of several nodes", of_several_nodes(specs)))
    text += [f"\n### {title}\n\n" + "".join(f"- {name}\n" for name in names) for title, names in lists if names]
    return "".join(text)


def page(results, causes):
    text = [HEAD]
    ran = [way for way in results.specs if any(result["state"] != NOT_RUN for result in results.specs[way].values())]
    for way in ran:
        for _, setting in sorted(results.settings[way].items()):
            cells = [PODS[way], *(setting.get(key, "unknown") for key in SETTING)]
            text.append("| " + " | ".join(map(cell, cells)) + " |\n")
    text.append(AFTER_SETTING)
    text += [section(way, results.specs[way], causes) for way in ran]
    return "".join(text)


def write(results, path):
    with open(path, "w") as file:
        file.write(page(results, read_causes()))


if __name__ == "__main__":
    write(Results(sys.argv[1]), sys.argv[2])
