"""The benchmark of many pods of bench.py: so many at once, and as many one after the other, as kubelet makes pods that ask
for nothing: each in a cgroup of its own of the least CPU weight, with CNI's bridge, a sandbox and one container that
sleeps. Bulkhead beside containerd with runc, both through their CRI sockets.
"""
import concurrent.futures
import os
import subprocess
import sys
import time

import bench_network
from bench_sides import Containerd, Cri, push_pause

COUNTS = (25, 50)
CGROUPS = "/sys/fs/cgroup"
CLASS = "bench-kubepods/besteffort"
TICKS = os.sysconf("SC_CLK_TCK")


def write(path, value):
    with open(os.path.join(CGROUPS, path), "w") as file:
        file.write(value)


def make_class():
    """kubelet's cgroups on a node of one CPU."""
    os.makedirs(f"{CGROUPS}/{CLASS}")
    for path in ("", os.path.dirname(CLASS), CLASS):
        write(f"{path}/cgroup.subtree_control", "+cpu +memory +pids")
    write(f"{os.path.dirname(CLASS)}/cpu.weight", "39")
    write(f"{CLASS}/cpu.weight", "1")


def remove_class():
    """From the innermost."""
    for path, _, _ in os.walk(f"{CGROUPS}/{os.path.dirname(CLASS)}", topdown=False):
        os.rmdir(path)


def seconds(action):
    started = time.monotonic()
    answer = action()
    return time.monotonic() - started, answer


class Crowd:
    """The pods of one runtime."""

    def __init__(self, name, socket, pid, image, work, project):
        self.name, self.pid, self.image, self.logs = name, pid, image, work.path(f"{name}-logs")
        self.cri = Cri(socket, project, work.name)
        self.cri.pull(image)
        self.made = 0

    def start(self, number):
        """A pod with a container that runs; its id."""
        cgroup = f"{CLASS}/pod{self.name}{number}"
        os.makedirs(f"{CGROUPS}/{cgroup}")
        write(f"{cgroup}/cgroup.subtree_control", "+cpu +memory +pids")
        write(f"{cgroup}/cpu.weight", "1")
        logs = f"{self.logs}/{number}"
        os.makedirs(logs)
        sandbox = {"metadata": {"name": f"p{number}", "uid": f"{self.name}{number}", "namespace": "bench"},
                   "log_directory": logs, "linux": {"cgroup_parent": f"/{cgroup}"}}
        pod = self.cri.call("RunPodSandbox", config=sandbox).pod_sandbox_id
        container = {"metadata": {"name": "main"}, "image": {"image": self.image}, "command": ["sleep", "100000"],
                     "log_path": "main.log"}
        made = self.cri.call("CreateContainer", pod_sandbox_id=pod, config=container,
                             sandbox_config=sandbox).container_id
        self.cri.call("StartContainer", container_id=made)
        return pod

    def end(self, pod):
        self.cri.call("StopPodSandbox", pod_sandbox_id=pod)
        self.cri.call("RemovePodSandbox", pod_sandbox_id=pod)

    def numbers(self, count):
        self.made += count
        return range(self.made - count, self.made)

    def in_a_row(self, count):
        return [self.start(number) for number in self.numbers(count)]

    def at_once(self, count):
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            return list(pool.map(self.start, self.numbers(count)))

    def end_all(self, pods):
        with concurrent.futures.ThreadPoolExecutor(len(pods)) as pool:
            list(pool.map(self.end, pods))

    def cpu(self):
        """Seconds of CPU: the daemon, children of its that have ended, and the pods' cgroups."""
        with open(f"/proc/{self.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        user, system, children_user, children_system = (int(field) / TICKS for field in fields[11:15])
        with open(f"{CGROUPS}/{CLASS}/cpu.stat") as file:
            pods = int(file.read().split()[1]) / 1e6
        return user + system, children_user + children_system, pods


def round_of(crowd, count, way):
    before = crowd.cpu()
    took, pods = seconds(lambda: way(count))
    daemon, children, in_pods = (after - was for after, was in zip(crowd.cpu(), before))
    ended, _ = seconds(lambda: crowd.end_all(pods))
    print(f"  {crowd.name}, {count} {way.__name__}: {took:.1f} s, CPU: daemon {daemon:.1f} s, its children that ended "
          f"{children:.1f} s, pods {in_pods:.1f} s; all ended at once: {ended:.1f} s", flush=True)
    return took, ended


def measure(ours, work, registry, project, image, report):
    """`ours` has no pods."""
    bench_network.configure(ours.state)
    theirs = Containerd(work, push_pause(registry, project))
    make_class()
    counts = [int(count) for count in os.environ.get("BULKHEAD_BENCH_PODS", "").split()] or COUNTS
    try:
        crowds = (Crowd("bulkhead", ours.socket, ours.daemon.pid, image, work, project),
                  Crowd("containerd", theirs.socket, theirs.daemon.pid, image, work, project))
        for crowd in crowds:
            crowd.end_all(crowd.in_a_row(1))
        for count in counts:
            row = [round_of(crowd, count, crowd.in_a_row) for crowd in crowds]
            once = [round_of(crowd, count, crowd.at_once) for crowd in crowds]
            report(f"{count} pods, one after the other", row[0][0], row[1][0], "s")
            report(f"{count} pods at once", once[0][0], once[1][0], "s")
            report(f"{count} pods end at once", once[0][1], once[1][1], "s")
            for (alone, _), (together, _), crowd in zip(row, once, crowds):
                print(f"  {crowd.name}: {count} at once take {together / alone:.2f} of one after the other", flush=True)
    finally:
        theirs.close()
        remove_class()
        subprocess.run(["ip", "link", "del", "bench-br1"], stderr=sys.stderr, check=False)
