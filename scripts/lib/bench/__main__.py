# SPDX-License-Identifier: Apache-2.0
"""Runs one benchmark on a KVM host. scripts/bench starts this and describes the options."""
import argparse
import dataclasses
import os
import tempfile

from bench import boot, busy, checkpoint, containers, files, forks, kept, many, memory, net, pod, pull, streams, warmed
from bench.comparison import Comparison, Report
from bench.effort import COUNTED, TIMED
from bench.passes import Clock, Events, Instructions
from bench.setting import Setting
from registry import Registry

BENCHMARKS = {"boot": boot, "pod": pod, "forks": forks, "busy": busy, "checkpoint": checkpoint,
              "containers": containers, "streams": streams, "net": net, "files": files, "pull": pull, "many": many,
              "memory": memory, "warmed": warmed}
# A host's own disk is mounted here.
DISK = "/var/lib/bulkhead"


def timed_passes(times):
    return [Clock()] * times


def counted_passes(times):
    return [Instructions()] * times + [Events()] * max(1, times // 2)


def arguments():
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--counted", action="store_true")
    parser.add_argument("--mib", type=int)
    parser.add_argument("--pods", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--parallel-boots", type=int)
    parser.add_argument("--output", required=True, metavar="FILE")
    return parser.parse_args()


def effort(options):
    own = {"mib": options.mib, "crowds": options.pods, "memory_pods": options.pods, "parallel_boots": options.parallel_boots}
    return dataclasses.replace(COUNTED if options.counted else TIMED,
                               **{name: value for name, value in own.items() if value is not None})


def main():
    options = arguments()
    report = Report()
    comparison = Comparison(counted_passes if options.counted else timed_passes, report)
    os.makedirs(DISK, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=DISK) as work, Registry(work) as registry:
        setting = Setting(work, registry, comparison, effort(options))
        try:
            BENCHMARKS[options.name].measure(setting)
            kept.write(options.output, options.counted, report.rows)
        finally:
            setting.cgroup.remove()


main()
