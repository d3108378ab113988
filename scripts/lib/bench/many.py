# SPDX-License-Identifier: Apache-2.0
"""many: 25 and 50 pods, one after the other and at once, as kubelet makes BestEffort pods: each has a cgroup of the
lowest CPU weight, a network by CNI's bridge, a sandbox, and one container that sleeps. Compared with containerd and
runc, both through CRI. --pods sets how many, --parallel-boots how many of Bulkhead's pods boot at a time."""
import concurrent.futures
import os
import time

from bench.sides import SLEEP

TICKS = os.sysconf("SC_CLK_TCK")


class Crowd:
    """The pods of one runtime."""

    def __init__(self, runtime, setting, image):
        self.runtime, self.name, self.cgroup, self.setting, self.image = runtime, runtime.name, runtime.cgroup, setting, image
        # The weights are kubelet's on a node with one CPU.
        kubepods = runtime.cgroup.child("pods")
        kubepods.write("cpu.weight", "39")
        self.best_effort = kubepods.child("besteffort")
        self.best_effort.write("cpu.weight", "1")
        self.pods, self.made = [], 0

    def start(self, number):
        """Starts a pod with a container."""
        cgroup = self.best_effort.child(f"pod{number}")
        cgroup.delegate()
        cgroup.write("cpu.weight", "1")
        pod = self.runtime.pod(f"p{number}", self.setting.directory("logs"), cgroup)
        pod.start(self.image, *SLEEP)
        return pod

    def in_a_row(self, numbers):
        return [self.start(number) for number in numbers]

    def at_once(self, numbers):
        with concurrent.futures.ThreadPoolExecutor(len(numbers)) as pool:
            return list(pool.map(self.start, numbers))

    def start_all(self, way, count):
        """Starts `count` pods. Returns the time and the CPU time that it took."""
        before, began = self.cpu_seconds(), time.monotonic()
        self.pods = way(range(self.made, self.made + count))
        self.made += count
        took = time.monotonic() - began
        shares = {f"s CPU, {name}": after - before[name] for name, after in self.cpu_seconds().items()}
        return {"ms": took * 1000, **shares}

    def end_all(self):
        with concurrent.futures.ThreadPoolExecutor(len(self.pods)) as pool:
            list(pool.map(lambda pod: pod.end(), self.pods))

    def cpu_seconds(self):
        with open(f"/proc/{self.runtime.daemon.process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        user, system, children_user, children_system = (int(field) / TICKS for field in fields[11:15])
        return {"daemon": user + system, "its ended children": children_user + children_system,
                "pods": self.best_effort.cpu_microseconds() / 1e6}


def measure(setting):
    image, parallel = setting.image("busybox"), setting.effort.parallel_boots
    with setting.both({"sandbox": {"parallel_boots": parallel}} if parallel else {}) as runtimes:
        for runtime in runtimes:
            runtime.pull(image)
        crowds = [Crowd(runtime, setting, image) for runtime in runtimes]
        for crowd in crowds:
            crowd.start_all(crowd.in_a_row, 1)
            crowd.end_all()

        for count in setting.effort.crowds:
            def life(crowd, lap):
                for way, name in ((crowd.in_a_row, "one after the other"), (crowd.at_once, "at once")):
                    lap.told(f"many: {count} pods, {name}", lambda: crowd.start_all(way, count), count, "pod")
                    lap(f"many: {count} pods end at once, made {name}", crowd.end_all)

            setting.comparison.alternate(crowds, 1, life, warm_up=False)
