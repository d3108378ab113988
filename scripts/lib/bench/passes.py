# SPDX-License-Identifier: Apache-2.0
"""How a benchmark is measured. It runs in passes, and each pass looks at other things.

By the clock: each pass takes the time. Counted: some passes take instructions, and one more takes events, because
counting those costs instructions. On the host of `scripts/kvm-host --counted` a nanosecond of CPU time is one
instruction, whatever else the machine does. Wall time says nothing there: the clock jumps where that host idles.

What is counted is all that the host does for one side: what its cgroup holds. The client that asks is not in it, the
guest's own work is, since it runs in threads of the VMM. What a side does in the background after a call belongs to
the call; so a counted pass waits before it looks.
"""
import time

from bench.perf_events import Event

SETTLE_SECONDS = 0.3
# Sleeps of a thread, each of which ends with a wake-up; not that it lost the CPU (256: TASK_REPORT_MAX).
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
    """Wall time, and what programs say of themselves."""

    def lap(self, _side, action):
        started = time.monotonic()
        answer = action()
        return {"ms": (time.monotonic() - started) * 1000}, answer

    def transfer(self, _side, action, mib):
        """With the part of one CPU that the client took, as it has the same CPUs."""
        started, busy = time.monotonic(), time.process_time()
        action()
        took = time.monotonic() - started
        return {"MiB/s": mib / took, "% client": (time.process_time() - busy) / took * 100}

    def told(self, _side, action, *_):
        return action()


class Counted:
    """What a counted pass does with every action; `read` is the pass's own."""

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
        # Microseconds of CPU time are thousands of instructions.
        return {"M instr": side.cgroup.cpu_microseconds() / 1000}


class Events(Counted):
    # By the path of the cgroup, for all passes.
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
