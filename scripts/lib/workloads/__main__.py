# SPDX-License-Identifier: Apache-2.0
"""Runs workloads on a KVM host, and keeps each one's result at once. scripts/workloads starts this."""
import argparse
import datetime
import json
import os
import subprocess
import sys

from workloads import page
from workloads.inside import RESULT
from workloads.results import FAILED, PASSED, Results, result_of

INSIDE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "inside.py")


def arguments():
    parser = argparse.ArgumentParser(prog="workloads", description=__doc__.splitlines()[0])
    parser.add_argument("--program", required=True, help="the test program")
    parser.add_argument("--host", required=True, help="the command that runs others on a KVM host: scripts/kvm-host")
    parser.add_argument("--results", required=True, metavar="FILE")
    parser.add_argument("--page", metavar="FILE")
    parser.add_argument("--project", default="unknown", help="the revision that runs")
    parser.add_argument("--logs", required=True, metavar="DIRECTORY", help="gets what workloads that failed said")
    parser.add_argument("--resume", action="store_true", help="leave out what passed before")
    parser.add_argument("names", nargs="*", metavar="NAME", help="run those whose names contain one of these")
    return parser.parse_args()


def names_of(program):
    said = subprocess.run([program, "--list", "--format", "terse"], stdout=subprocess.PIPE, check=True, text=True).stdout
    return [line.removesuffix(": test") for line in said.splitlines() if line.endswith(": test")]


def selected(options, names, results):
    for part in options.names:
        if not any(part in name for name in names):
            sys.exit(f"workloads: no workload is called {part}; there are {', '.join(names)}")
    before = results.passed() if options.resume else set()
    return [name for name in names if name not in before and (not options.names or any(part in name for part in options.names))]


def report(name, result):
    print(f"{result['state']:7} {result['seconds']:4} s  {name}", flush=True)
    for case, right, seen in result["cases"]:
        print(f"  {'ok   ' if right else 'WRONG'} {case:<55} {' '.join(str(seen).split())}", flush=True)
    if result["state"] != PASSED:
        print(f"  {result['reason']}", flush=True)


def run(options, results, names):
    """Runs these workloads. Returns the results of those that ran."""
    day = datetime.date.today().isoformat()
    host = subprocess.Popen([options.host, "python3", "-B", INSIDE, options.program, *names], stdout=subprocess.PIPE, text=True)
    ran = {}
    for line in host.stdout:
        if not line.startswith(RESULT):
            print(line, end="", flush=True)
            continue
        said = json.loads(line[len(RESULT):])
        name, result = said["name"], result_of(said, options.project, day)
        ran[name] = result
        results.add(name, result)
        results.write()
        if options.page:
            page.write(results, options.page)
        if result["state"] == FAILED:
            with open(os.path.join(options.logs, name.replace("::", "-") + ".log"), "w") as file:
                file.write(said["said"])
        report(name, result)
    if host.wait() or set(ran) != set(names):
        print(f"workloads: the host ended with {host.returncode} before all had run: {sorted(set(names) - set(ran))}", flush=True)
    return ran


def main():
    options = arguments()
    os.makedirs(options.logs, exist_ok=True)
    results = Results(options.results)
    names = names_of(options.program)
    results.know(names)
    todo = selected(options, names, results)
    ran = run(options, results, todo) if todo else {}
    passed = [name for name, result in ran.items() if result["state"] == PASSED]
    print(f"workloads: {len(passed)} of {len(todo)} passed")
    sys.exit(0 if len(passed) == len(todo) else 1)


if __name__ == "__main__":
    main()
