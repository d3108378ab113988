# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks use: a directory on the host's disk, a registry, and the sides as context managers."""
import collections
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile

from bench.cgroup import Cgroup
from bench.sides import SLEEP, Runtime
from containerd import Containerd
from daemon import Daemon, merged, write_bridge

PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
sys.path.insert(0, f"{PROJECT}/tests/images")
import make_images  # noqa: E402

THEIR_BRIDGE = "bench-br1"


Starter = collections.namedtuple("Starter", "name cgroup fresh")


class Setting:
    def __init__(self, work, registry, comparison, effort):
        self.work, self.registry, self.comparison, self.effort = work, registry, comparison, effort
        self.pushed = set()
        self.cgroup = Cgroup("bench")

    def directory(self, prefix):
        return tempfile.mkdtemp(prefix=prefix, dir=self.work)

    def image(self, name):
        """Builds and pushes an image of make_images, if that is not done yet. Returns its reference."""
        where = {"busybox": "test/busybox", "bench": "bench/six-layers"}.get(name, f"bench/{name}")
        if name not in self.pushed:
            self.pushed.add(name)
            subprocess.run([sys.executable, f"{PROJECT}/tests/images/make_images.py", "--only", name,
                            "--registry", f"http://{self.registry}", "--bench-mib", str(self.effort.image_mib)], check=True)
        return f"{self.registry}/{where}:latest"

    def pause_image(self):
        """Pushes an image whose command does not end. containerd runs it as the first process of every pod."""
        if "pause" not in self.pushed:
            self.pushed.add("pause")
            registry = make_images.Registry(f"http://{self.registry}")
            make_images.push(registry, "bench/pause", ["latest"], [make_images.busybox_layer()], {"Cmd": SLEEP})
        return f"{self.registry}/bench/pause:latest"

    @contextlib.contextmanager
    def bulkhead(self, config=None, name="bulkhead", subnet="10.85.0.0/24"):
        """Runs our daemon in its own cgroup, with a bridge for its pods. `config` has further keys of its
        configuration. A second one at the same time has another name and subnet."""
        directory, cgroup, bridge = self.directory("b"), self.cgroup.child(name), bridge_of(name)
        write_bridge(directory, "bench", bridge, subnet)
        own = {"cgroup_parent": cgroup.child("pods").path, "registries": {self.registry: {"plain_http": True}}}
        try:
            with Daemon(directory, merged(own, config or {}), preexec_fn=cgroup.child("daemon").enter) as daemon:
                yield Runtime(name, cgroup, daemon)
        finally:
            remove(directory, bridge)

    @contextlib.contextmanager
    def containerd(self):
        """Runs containerd in its own cgroup, with a bridge for its pods."""
        directory, cgroup = self.directory("c"), self.cgroup.child("containerd")
        write_bridge(directory, "bench", THEIR_BRIDGE, "10.86.0.0/24")
        try:
            with Containerd(directory, self.pause_image(), preexec_fn=cgroup.child("daemon").enter) as daemon:
                yield Runtime("containerd", cgroup, daemon)
        finally:
            remove(directory, THEIR_BRIDGE)

    def starters(self):
        """Returns both sides for benchmarks that need new daemons each time."""
        return [Starter(name, self.cgroup.child(name), fresh)
                for name, fresh in (("bulkhead", self.bulkhead), ("containerd", self.containerd))]

    @contextlib.contextmanager
    def both(self, config=None):
        """Runs Bulkhead and containerd."""
        with self.bulkhead(config) as ours, self.containerd() as theirs:
            yield ours, theirs

    @contextlib.contextmanager
    def pods(self, image):
        """Runs both, each with the image and a pod."""
        with self.both() as runtimes, contextlib.ExitStack() as ends:
            for runtime in runtimes:
                runtime.pull(image)
            pods = [runtime.pod("bench", self.directory("logs")) for runtime in runtimes]
            for pod in pods:
                ends.callback(pod.end)
            yield pods


def bridge_of(name):
    """The bridge for the pods of one of our daemons. An interface's name has at most 15 characters."""
    return f"bench-{name}"


def remove(directory, bridge):
    """Removes what a side leaves behind."""
    shutil.rmtree(directory, ignore_errors=True)
    subprocess.run(["ip", "link", "del", bridge], stderr=subprocess.DEVNULL, check=False)
