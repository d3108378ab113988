# SPDX-License-Identifier: Apache-2.0
"""Starts the services of a cluster. A service that does not become ready is an error with the end of its log."""
import os
import sys
import time

from background import start

PATIENCE_SECONDS = 180
TAIL_LINES = 20


def tail(path):
    with open(path, errors="replace") as file:
        return "".join(file.readlines()[-TAIL_LINES:])


class Services:
    """The services of one machine. Their logs are NAME.log in `logs`. They live as `holder` says, see background."""

    def __init__(self, logs, holder):
        self.logs = logs
        self.holder = holder
        self.processes = {}
        os.makedirs(logs, exist_ok=True)

    def log(self, name):
        return os.path.join(self.logs, f"{name}.log")

    def start(self, name, command, **options):
        self.adopt(name, start(command, log=self.log(name), holder=self.holder, **options))

    def adopt(self, name, process):
        """Adds a process that something else has started."""
        self.processes[name] = process

    def wait(self, name, is_ready):
        """Waits until a service is ready."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_ready():
            self.check(name)
            if time.monotonic() > deadline:
                self.fail(name, f"is not ready after {PATIENCE_SECONDS} s")
            time.sleep(0.1)

    def check(self, name):
        """Fails if a service has ended."""
        code = self.processes[name].poll()
        if code is not None:
            self.fail(name, f"ended with {code}")

    def check_all(self):
        for name in self.processes:
            self.check(name)

    def fail(self, name, what):
        sys.exit(f"cluster: {name} {what}; its log ({self.log(name)}) ends with:\n{tail(self.log(name))}")

    def pids(self):
        return {name: process.pid for name, process in self.processes.items()}

    def leave(self):
        """Lets the services outlive this process."""
        for process in self.processes.values():
            # With a return code, Popen does not complain that the process still runs.
            process.returncode = 0
