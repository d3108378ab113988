# SPDX-License-Identifier: Apache-2.0
"""Host cgroups. Each side of a comparison has one that contains everything that works for it."""
import os

from background import wait_until

ROOT = "/sys/fs/cgroup"
CONTROLLERS = "+cpu +memory +pids"


class Cgroup:
    """A cgroup, created if it does not exist. `path` is relative to the root."""

    def __init__(self, path):
        self.path = path
        os.makedirs(self.directory, exist_ok=True)

    @property
    def directory(self):
        return f"{ROOT}/{self.path}"

    def child(self, name):
        """Returns a cgroup below this one, with the controllers that pods need."""
        self.delegate()
        return Cgroup(f"{self.path}/{name}")

    def delegate(self):
        """Enables controllers for the cgroups below. Then this one cannot contain processes."""
        self.write("cgroup.subtree_control", CONTROLLERS)

    def write(self, file, value):
        with open(f"{self.directory}/{file}", "w") as opened:
            opened.write(value)

    def enter(self):
        """Moves the calling process into this cgroup. To be used as Popen's `preexec_fn`."""
        self.write("cgroup.procs", str(os.getpid()))

    def cpu_microseconds(self):
        """Returns the CPU time of all that ran in this cgroup and below."""
        with open(f"{self.directory}/cpu.stat") as file:
            return int(file.readline().split()[1])

    def remove(self):
        """Kills all that still runs in this cgroup, then removes it and those below."""
        self.write("cgroup.kill", "1")
        wait_until(self.is_empty, f"the end of what runs in cgroup {self.path}")
        for path, _, _ in os.walk(self.directory, topdown=False):
            os.rmdir(path)

    def is_empty(self):
        with open(f"{self.directory}/cgroup.events") as file:
            return "populated 0" in file.read()
