# SPDX-License-Identifier: Apache-2.0
"""How a benchmark is measured. It runs in passes, and each pass measures something else.

By the clock, each pass measures time. Counted, some passes measure instructions and others events, because counting
events costs instructions. On a host of `scripts/kvm-host --counted`, one nanosecond of CPU time is one instruction,
whatever else the machine does. Wall time means nothing there, because the clock jumps ahead while that host is idle.

A counted pass counts all that the host does for one side: what runs in its cgroup. The client is not in that cgroup.
The guest's work is, because it runs in threads of the VMM. What a side does in the background after a call belongs to
the call, so a counted pass waits before it reads.
"""
import time

from bench.perf_events import Event

SETTLE_SECONDS = 0.3
# Wake-ups are counted by the switches at which a thread goes to sleep. One that only loses the CPU has the state 0, or
# 256 (TASK_REPORT_MAX) if it was preempted.
EVENTS = {"VM exits": ("kvm/kvm_exit", ""), "system calls": ("raw_syscalls/sys_enter", ""),
          "wake-ups": ("sched/sched_switch", "prev_state != 0 && prev_state != 256")}


class WarmUp:
    """Measures nothing."""

    def lap(self, _side, action):
        return {}, action()

    def transfer(self, _side, action, *_):
        action()
        return {}

    told = transfer


class Clock:
    """Measures wall time, and takes what programs measured themselves."""

    def lap(self, _side, action):
        started = time.monotonic()
        answer = action()
        return {"ms": (time.monotonic() - started) * 1000}, answer

    def transfer(self, _side, action, mib):
        """Also reports the client's share of one CPU, because the client runs on the same CPUs."""
        started, busy = time.monotonic(), time.process_time()
        action()
        took = time.monotonic() - started
        return {"MiB/s": mib / took, "% client": (time.process_time() - busy) / took * 100}

    def told(self, _side, action, *_):
        return action()


class Counted:
    """A counted pass. A subclass says with `read` what it counts."""

    def lap(self, side, action):
        time.sleep(SETTLE_SECONDS)
        before = self.read(side)
        answer = action()
        time.sleep(SETTLE_SECONDS)
        return {unit: value - before[unit] for unit, value in self.read(side).items()}, answer

    def transfer(self, side, action, mib):
        return self.told(side, action, mib, "MiB")

    def told(self, side, action, amount, what):
        return {f"{unit}/{what}": value / amount for unit, value in self.lap(side, action)[0].items()}


class Instructions(Counted):
    def read(self, side):
        # A microsecond of CPU time is a thousand instructions.
        return {"M instr": side.cgroup.cpu_microseconds() / 1000}


class Events(Counted):
    # The counters of each cgroup by its path, shared by all passes.
    events = {}

    def read(self, side):
        path = side.cgroup.path
        if path not in self.events:
            self.events[path] = {unit: Event(side.cgroup, *event) for unit, event in EVENTS.items()}
        return {unit: event.count() for unit, event in self.events[path].items()}

    def lap(self, side, action):
        self.read(side)
        events = self.events[side.cgroup.path].values()
        for event in events:
            event.enable()
        try:
            return super().lap(side, action)
        finally:
            for event in events:
                event.disable()
