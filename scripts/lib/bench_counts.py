"""What emulation distorts less than time, of both sides: VM exits, system calls and wake-ups on the host.

System calls and wake-ups inside a guest are not among them. As strace slows a process down, one that polls polls more.
"""
import os
import re
import signal
import subprocess
import tempfile
import time

from bench_sides import milliseconds
from registry import wait_until

COUNTED = 20
IDLE_SECONDS = 5


def field(path, name):
    with open(path) as file:
        return int(re.search(rf"^{name}:\s*(\d+)", file.read(), re.MULTILINE)[1])


def traced(pid):
    """Whether every thread is; one that ends meanwhile has it asked again."""
    try:
        return all(field(f"/proc/{pid}/task/{task}/status", "TracerPid") for task in os.listdir(f"/proc/{pid}/task"))
    except FileNotFoundError:
        return False


def system_calls(pid, action):
    """{name: calls} of a process and of what it starts, while `action` runs; `total` among them."""
    with tempfile.NamedTemporaryFile("r") as output:
        strace = subprocess.Popen(["strace", "-qq", "-f", "-c", "-U", "calls,name", "-o", output.name, "-p", str(pid)])
        wait_until(lambda: traced(pid), "strace")
        action()
        strace.send_signal(signal.SIGINT)
        strace.wait()
        rows = re.findall(r"^\s*(\d+)\s+(\w+)\s*$", output.read(), re.MULTILINE)
    return {"total": 0, **{name: int(calls) for calls, name in rows}}


def wake_ups(pids, action):
    """How often the threads of these processes went to sleep and were woken while `action` ran. Those of processes that
    lived for a part of it, as runc does, are not among them."""
    def sleeps():
        found = {}
        for pid in pids:
            for task in os.listdir(f"/proc/{pid}/task"):
                try:
                    found[task] = field(f"/proc/{pid}/task/{task}/status", "voluntary_ctxt_switches")
                except FileNotFoundError:
                    pass
        return found

    before = sleeps()
    action()
    return sum(count - before.get(task, 0) for task, count in sleeps().items())


def repeat(action):
    return lambda: [action() for _ in range(COUNTED)]


def count_calls(name, pid, action):
    """System calls for each of COUNTED actions."""
    took, counts = milliseconds(lambda: system_calls(pid, repeat(action)))
    idle = system_calls(pid, lambda: time.sleep(IDLE_SECONDS))["total"] / IDLE_SECONDS
    total = counts.pop("total") / COUNTED
    print(f"  {name}: {total:.0f} system calls an ExecSync of {took / COUNTED:.0f} ms under strace, idle {idle:.0f} a "
          f"second; most: {most(counts, COUNTED)}", flush=True)
    return total


def most(calls, times):
    rows = sorted(calls.items(), key=lambda row: -row[1])[:6]
    return ", ".join(f"{call} {count / times:.1f}" for call, count in rows)


def exits(side, action):
    """VM exits while `action` runs."""
    before = side.info()["vmm"]["exits_total"]
    action()
    return side.info()["vmm"]["exits_total"] - before


def workers(ours, theirs):
    """The process of a pod: the VMM; the shim, which is the parent of the first process that containerd tells of."""
    return ours.info()["pid"], field(f"/proc/{theirs.info()['pid']}/status", "PPid")


def commands(ours, theirs, daemons, sleepers, line):
    """Of an ExecSync."""
    took, found = milliseconds(lambda: exits(ours, repeat(lambda: ours.exec_sync(sleepers[ours]))))
    idle = exits(ours, lambda: time.sleep(IDLE_SECONDS)) / IDLE_SECONDS
    print(f"  {found / COUNTED:.0f} VM exits an ExecSync of {took / COUNTED:.0f} ms, idle {idle:.0f} a second",
          flush=True)
    pods = workers(ours, theirs)
    woken = [wake_ups(pids, repeat(lambda: side.exec_sync(sleepers[side]))) / COUNTED
             for side, pids in zip((ours, theirs), zip(daemons, pods))]
    line("wake-ups an ExecSync, without runc's", *woken, "")
    for title, names, pids in (("daemon", ("bulkhead", "containerd"), daemons),
                               ("VMM; shim and runc", ("bulkhead-vmm", "shim and runc"), pods)):
        totals = [count_calls(name, pid, lambda: side.exec_sync(sleepers[side]))
                  for name, pid, side in zip(names, pids, (ours, theirs))]
        line(f"system calls an ExecSync: {title}", *totals, "")


def stream(title, mib, ours, theirs, daemons, action, line):
    """Of a mebibyte of a stream that `action` sends or takes."""
    pods = workers(ours, theirs)
    print(f"  {exits(ours, lambda: action(ours)) / mib:.0f} VM exits a MiB of {title}", flush=True)
    woken = [wake_ups(pids, lambda: action(side)) / mib for side, pids in zip((ours, theirs), zip(daemons, pods))]
    line(f"wake-ups a MiB of {title}", *woken, "")
    totals = []
    for side, processes in ((ours, (("bulkhead", daemons[0]), ("bulkhead-vmm", pods[0]))),
                            (theirs, (("containerd", daemons[1]), ("shim", pods[1])))):
        totals.append(0)
        for name, pid in processes:
            calls = system_calls(pid, lambda: action(side))
            total = calls.pop("total") / mib
            totals[-1] += total
            print(f"  {name}: {total:.0f} system calls a MiB of {title}; most: {most(calls, mib)}", flush=True)
    line(f"system calls a MiB of {title}, both processes", *totals, "")
