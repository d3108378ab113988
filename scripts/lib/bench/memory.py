# SPDX-License-Identifier: Apache-2.0
"""memory: what a pod without containers takes of the host, at 1, 10 and 50 pods: forked beside booted. --pods sets how many.
Of MemAvailable, with the page cache dropped before each look, and of the pods' own cgroups."""
import contextlib

from bench import forks

MIB = 1 << 20


def available_mib():
    """What the host could give to programs."""
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")
    with open("/proc/meminfo") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    return kib / 1024


def measure(setting):
    with contextlib.ExitStack() as ends:
        sides = [ends.enter_context(setting.bulkhead()),
                 ends.enter_context(setting.bulkhead(forks.BOOTED, "booted", "10.87.0.0/24"))]
        for count in setting.effort.memory_pods:
            def life(side, lap, count=count):
                pods = []

                def make():
                    side.pod("first", setting.directory("logs")).end()
                    before = available_mib()
                    pods.extend(side.pod(f"pod-{number}", setting.directory("logs")) for number in range(count))
                    taken = before - available_mib()
                    with open(f"{side.cgroup.child('pods').directory}/memory.current") as file:
                        own = int(file.read()) / MIB
                    return {"MiB of MemAvailable": taken / count, "MiB of its cgroup": own / count}

                lap.told(f"memory: a pod of {count}", make)
                for pod in pods:
                    pod.end()

            setting.comparison.alternate(sides, 1, life, warm_up=False)
