# SPDX-License-Identifier: Apache-2.0
"""Cgroups of the host. Each side of a comparison has one around all that works for it."""
import os

from background import wait_until

ROOT = "/sys/fs/cgroup"
CONTROLLERS = "+cpu +memory +pids"


class Cgroup:
    """A cgroup, made when it is not there yet; `path` is below the root."""

    def __init__(self, path):
        self.path = path
        os.makedirs(self.directory, exist_ok=True)

    @property
    def directory(self):
        return f"{ROOT}/{self.path}"

    def child(self, name):
        """A cgroup below this one, with the controllers that pods need."""
        self.delegate()
        return Cgroup(f"{self.path}/{name}")

    def delegate(self):
        """Lets cgroups below this one have controllers. No process can be in this one then."""
        self.write("cgroup.subtree_control", CONTROLLERS)

    def write(self, file, value):
        with open(f"{self.directory}/{file}", "w") as opened:
            opened.write(value)

    def enter(self):
        """Moves the calling process: what Popen's `preexec_fn` is for."""
        self.write("cgroup.procs", str(os.getpid()))

    def cpu_microseconds(self):
        """CPU time of all that ran in here and below."""
        with open(f"{self.directory}/cpu.stat") as file:
            return int(file.readline().split()[1])

    def remove(self):
        """With all that still runs in it."""
        self.write("cgroup.kill", "1")
        wait_until(self.is_empty, f"the end of what runs in cgroup {self.path}")
        for path, _, _ in os.walk(self.directory, topdown=False):
            os.rmdir(path)

    def is_empty(self):
        with open(f"{self.directory}/cgroup.events") as file:
            return "populated 0" in file.read()
