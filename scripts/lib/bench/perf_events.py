# SPDX-License-Identifier: Apache-2.0
"""Counts the kernel's trace events in a cgroup by perf_event_open(2), for which Python has no binding.

A count includes all tasks of the cgroup, also those that live only for a part of the time.
"""
import ctypes
import os
import subprocess

from bench.cgroup import Cgroup

TRACING = "/sys/kernel/tracing"
# linux/perf_event.h
TYPE_TRACEPOINT = 2
DISABLED = 1
FLAG_FD_CLOEXEC, FLAG_PID_CGROUP = 8, 4
IOC_ENABLE, IOC_DISABLE, IOC_SET_FILTER = 0x2400, 0x2401, 0x40082406
SYS_PERF_EVENT_OPEN = 298  # x86-64
libc = ctypes.CDLL(None, use_errno=True)


class Attributes(ctypes.Structure):
    """struct perf_event_attr in its first version."""
    _fields_ = [("type", ctypes.c_uint32), ("size", ctypes.c_uint32), ("config", ctypes.c_uint64),
                ("sample_period", ctypes.c_uint64), ("sample_type", ctypes.c_uint64), ("read_format", ctypes.c_uint64),
                ("flags", ctypes.c_uint64), ("wakeup_events", ctypes.c_uint32), ("bp_type", ctypes.c_uint32),
                ("bp_addr", ctypes.c_uint64)]


def checked(result, what):
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


class Event:
    """Counts a trace event (`group/name`) of one cgroup. `condition` is a filter in the kernel's syntax for trace
    events."""

    def __init__(self, cgroup: Cgroup, event, condition=""):
        if not os.path.exists(f"{TRACING}/events"):
            subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], check=True)
        with open(f"{TRACING}/events/{event}/id") as file:
            number = int(file.read())
        attributes = Attributes(type=TYPE_TRACEPOINT, size=ctypes.sizeof(Attributes), config=number, flags=DISABLED)
        directory = os.open(cgroup.directory, os.O_RDONLY)
        self.counters = [
            checked(libc.syscall(SYS_PERF_EVENT_OPEN, ctypes.byref(attributes), directory, cpu, -1,
                                 FLAG_PID_CGROUP | FLAG_FD_CLOEXEC), f"perf event {event}")
            for cpu in range(os.cpu_count())]
        os.close(directory)
        for counter in self.counters if condition else ():
            checked(libc.ioctl(counter, IOC_SET_FILTER, condition.encode()), f"filter of {event}")

    def enable(self):
        for counter in self.counters:
            checked(libc.ioctl(counter, IOC_ENABLE, 0), "enable a perf event")

    def disable(self):
        for counter in self.counters:
            checked(libc.ioctl(counter, IOC_DISABLE, 0), "disable a perf event")

    def count(self):
        return sum(int.from_bytes(os.read(counter, 8), "little") for counter in self.counters)

    def close(self):
        for counter in self.counters:
            os.close(counter)
