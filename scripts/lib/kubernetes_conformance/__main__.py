# SPDX-License-Identifier: Apache-2.0
"""Runs conformance specs in the cluster of $KUBECONFIG, part by part, and keeps each part's results at once.

scripts/conformance and scripts/test start this as the command of a cluster.
"""
import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time

from kubernetes_conformance import page
from kubernetes_conformance.results import FAILED, NOT_RUN, PASSED, Results, area_of
from kubernetes_conformance.suite import Suite, batches, in_order

# An emulated node that is busy may miss its lease for a while.
PATIENCE_SECONDS = 300


def arguments():
    parser = argparse.ArgumentParser(prog="kubernetes_conformance", description=__doc__.splitlines()[0])
    parser.add_argument("--programs", required=True, metavar="DIRECTORY", help="has e2e.test, ginkgo and kubectl")
    parser.add_argument("--repositories", required=True, metavar="FILE", help="the file for KUBE_TEST_REPO_LIST")
    parser.add_argument("--logs", required=True, metavar="DIRECTORY")
    parser.add_argument("--results", required=True, metavar="FILE")
    parser.add_argument("--page", metavar="FILE")
    parser.add_argument("--way", required=True, choices=("runtime-class", "plain"))
    parser.add_argument("--project", default="unknown", help="the revision that runs")
    parser.add_argument("--focus", default="", metavar="REGEXP")
    parser.add_argument("--skip", metavar="REGEXP")
    parser.add_argument("--area", action="append", metavar="NAME")
    parser.add_argument("--names", metavar="FILE", help="run exactly the specs that this file names, one a line")
    parser.add_argument("--resume", action="store_true", help="leave out what passed before")
    parser.add_argument("--procs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=15)
    return parser.parse_args()


def read_names(path):
    """Reads a file of names. Lines with # and empty lines say nothing."""
    with open(path) as file:
        return [line.strip() for line in file if line.strip() and not line.startswith("#")]


def selected(options, names, results):
    """Returns the specs of this run, in the order in which they run."""
    if options.names:
        wanted = read_names(options.names)
        unknown = set(wanted) - set(names)
        if unknown:
            sys.exit(f"conformance: {options.names} names specs that the suite does not have: {sorted(unknown)}")
        names = wanted
    areas = {area_of(name) for name in names}
    for area in options.area or []:
        if area not in areas:
            sys.exit(f"conformance: no area {area}; there are {', '.join(sorted(areas))}")
    before = results.passed(options.way) if options.resume else set()
    return in_order(name for name in names
                    if re.search(options.focus, name) and not (options.skip and re.search(options.skip, name))
                    and (not options.area or area_of(name) in options.area) and name not in before)


def nodes(programs):
    """Asks the cluster for its nodes."""
    said = subprocess.run([os.path.join(programs, "kubectl"), "get", "nodes", "-o", "json"], stdout=subprocess.PIPE,
                          check=True, text=True, timeout=60).stdout
    return json.loads(said)["items"]


def is_ready(node):
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in node["status"]["conditions"])


def expect_ready(programs):
    """Waits for nodes that are not ready. Ends the run if they stay so, because then no spec says anything about them."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while lost := [node["metadata"]["name"] for node in nodes(programs) if not is_ready(node)]:
        if time.monotonic() > deadline:
            sys.exit(f"conformance: no longer ready: {', '.join(lost)}; what ran before is kept, and --resume goes on from there")
        time.sleep(1)


def setting(options, all_nodes):
    """Describes where this run is done."""
    info = all_nodes[0]["status"]["nodeInfo"]
    cpus = all_nodes[0]["status"]["capacity"]["cpu"]
    # scripts/cluster makes this file where the machine's own KVM works.
    emulated = not os.path.exists(os.path.join(os.environ["BULKHEAD_CLUSTER"], "nodes-are-here"))
    return {"kubernetes": info["kubeletVersion"], "kernel": info["kernelVersion"],
            "node": f"{len(all_nodes)}, {'emulated' if emulated else 'real'}, CPUs: {cpus}",
            "runtime": info["containerRuntimeVersion"], "project": options.project,
            "day": datetime.date.today().isoformat()}


def run(options, suite, results, names):
    """Runs specs in parts, then those that failed once more, alone."""
    done, failed = 0, []
    for part in batches(names, options.batch):
        started = time.monotonic()
        expect_ready(options.programs)
        new = suite.run(part, 1 if "[Serial]" in part[0] else options.procs)
        expect_ready(options.programs)
        keep(options, results, new)
        done += len(part)
        failed += [name for name, result in new.items() if result["state"] == FAILED]
        areas = ", ".join(dict.fromkeys(map(area_of, part)))
        report(f"{areas}: {done} of {len(names)}", new, time.monotonic() - started)
    for name in failed:
        started = time.monotonic()
        expect_ready(options.programs)
        again = {name: {**result, "alone": True} for name, result in suite.run([name], 1).items()}
        keep(options, results, again)
        report("again, alone", again, time.monotonic() - started)


def keep(options, results, new):
    known = {"project": options.project} | ({"nodes": options.nodes} if options.nodes > 1 else {})
    results.add(options.way, {name: result | known for name, result in new.items()})
    results.write()
    if options.page:
        page.write(results, options.page)


def report(what, new, seconds):
    states = [result["state"] for result in new.values()]
    print(f"{what}: {states.count(PASSED)} passed, {states.count(FAILED)} failed, {states.count(NOT_RUN)} not run, "
          f"{seconds:.0f} s", flush=True)
    for name, result in sorted(new.items()):
        if result["state"] != PASSED:
            print(f"  {result['state']}: {name}\n      {result['reason']}", flush=True)


def main():
    options = arguments()
    os.makedirs(options.logs, exist_ok=True)
    results = Results(options.results)
    suite = Suite(options.programs, options.repositories, options.logs)
    all_names = suite.names()
    results.know(options.way, all_names)
    all_nodes = nodes(options.programs)
    options.nodes = len(all_nodes)
    results.settings[options.way][str(options.nodes)] = setting(options, all_nodes)
    names = selected(options, all_names, results)
    if not names:
        print("conformance: nothing is left to run")
        return
    run(options, suite, results, names)
    ran = {name: results.specs[options.way][name] for name in names}
    print(f"\n{page.table(ran)}")
    bad = [name for name, result in ran.items() if result["state"] == FAILED]
    print(f"conformance: {len(ran) - len(bad)} of {len(ran)} specs did not fail, pods: {options.way}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
