"""The benchmark of commands and streams of bench.py: Bulkhead and containerd with runc side by side, each through its
own CRI socket with the same client, both with a bridge network and pods of one shape.

The client is Python on the same CPUs and takes its part of every time; for throughput that part is told. containerd 1.6
streams by SPDY only, so the streams are SPDY/3.1 on both sides. Throughput out counts from the first data to the end,
in until the sink says what it got. bench_counts counts besides what emulation distorts less.
BULKHEAD_BENCH_STREAM_PARTS names parts, as `measure` has them, if not all are wanted; _MIB and _RUNS are how much goes
through a stream, and how often.
"""
import os
import signal
import statistics
import subprocess
import time

import bench_counts
import bench_network
from bench_sides import PATIENCE, PAUSE, Containerd, Cri, Side, milliseconds, push_pause
from registry import wait_until

MIB = int(os.environ.get("BULKHEAD_BENCH_STREAM_MIB", "32"))
EXECS = 15
CONTAINERS = 7
CONNECTS = 9
BULKS = int(os.environ.get("BULKHEAD_BENCH_STREAM_RUNS", "3"))
BLOCK = 32 << 10  # as kubectl sends
HANDLED = 7
ONE_BYTE_PORT, SOURCE_PORT, SINK_PORT = 7000, 7001, 7002
SOURCE = f"dd if=/dev/zero bs=64k count={MIB * 16} status=none"
SINK = f"dd of=/dev/null bs=64k iflag=fullblock count={MIB * 16}"
SUNK = f"{MIB * 16}+0 records in\n".encode()
# A mebibyte of lines is made first, so that what is measured is not how fast lines can be made.
LOGGER = f"""
yes {"x" * 127} | head -c 1048576 >/tmp/lines
i=0; while [ $i -lt {MIB} ]; do cat /tmp/lines; i=$((i+1)); done
echo END
sleep 1000
"""
PORTS = f"""
nc -ll -p {ONE_BYTE_PORT} -e echo &
nc -ll -p {SOURCE_PORT} -e {SOURCE} &
nc -ll -p {SINK_PORT} -e sh -c '{SINK} 2>&1' &
wait
"""


class Stopwatch:
    """From its making to `figures`: MiB/s, and the client's part of one CPU meanwhile."""

    def __init__(self):
        self.began, self.busy = time.monotonic(), time.process_time()

    def figures(self, count):
        took = time.monotonic() - self.began
        return count / 2**20 / took, (time.process_time() - self.busy) / took


def alternate(sides, times, action):
    """Figures of `action` by side. Each goes first as often: what one leaves to do in the background hits both."""
    figures = {side: [] for side in sides}
    for one in range(times):
        for side in sides[::-1 if one % 2 else 1]:
            figures[side].append(action(side))
    return list(figures.values())


class Report:
    def __init__(self, line):
        self.line = line

    def medians(self, name, figures, unit="ms"):
        self.line(f"{name}, median", *map(statistics.median, figures), unit)

    def rates(self, name, figures):
        self.medians(f"{name} {MIB} MiB", [[rate for rate, _ in one] for one in figures], "MiB/s")
        ours, theirs = (statistics.median(share for _, share in one) for one in figures)
        print(f"  the client took {ours:.0%} of a CPU, with theirs {theirs:.0%}", flush=True)


def commands(sides, sleepers, report):
    for side in sides:
        side.exec_sync(sleepers[side])
    report.medians("ExecSync of true", alternate(
        sides, EXECS, lambda side: milliseconds(lambda: side.exec_sync(sleepers[side]))[0]))


def lives(sides, report):
    def killed(side):
        started, container = milliseconds(lambda: side.start(*PAUSE))
        stopped = side.stop(container, 0, 128 + signal.SIGKILL)
        removed, _ = milliseconds(lambda: side.remove(container))
        return started, stopped, removed

    def terminated(side):
        container = side.start("sh", "-c", f'trap "exit {HANDLED}" TERM; echo ready; sleep 1000 & wait')
        # The handler is there once the line is.
        wait_until(lambda: os.path.exists(side.log()) and os.path.getsize(side.log()), "the handler of TERM")
        took = side.stop(container, 30, HANDLED)
        side.remove(container)
        return took

    all_three = alternate(sides, CONTAINERS, killed)
    for index, name in enumerate(("create and start of a container", "stop: grace 0", "remove a container")):
        report.medians(name, [[one[index] for one in figures] for figures in all_three])
    report.medians("stop: handler of TERM", alternate(sides, CONTAINERS, terminated))


def drain(receive):
    """Takes what a source sends, until it ends."""
    first = total = len(receive())
    watch = Stopwatch()
    while data := receive():
        total += len(data)
    if total != MIB << 20:
        raise SystemExit(f"{total} bytes of {MIB << 20}")
    return watch.figures(total - first)


def fill(connection, stream, answer):
    """Sends to a sink, until it says that it has all."""
    block, watch = bytes(BLOCK), Stopwatch()
    for _ in range((MIB << 20) // BLOCK):
        connection.send(stream, block)
    text = answer()
    figures = watch.figures(MIB << 20)
    if SUNK not in text:
        raise SystemExit(f"the sink says {text}")
    return figures


# The shell outlives dd, which closes the output that it does not use: containerd closes a command's input when one of
# its outputs has ended (containerd/containerd#13934).
def exec_into(side, container):
    with side.exec(container, "sh", "-c", f"echo; {SINK}; echo", stdin=True) as process:
        process.output()
        return fill(process, process.streams["stdin"], process.rest)


def exec_streams(sides, sleepers, report):
    def first(side):
        began = time.monotonic()
        with side.exec(sleepers[side], "echo") as process:
            if process.output() != b"\n":
                raise SystemExit(f"{side.name}: no output of echo")
            seen = time.monotonic()
            process.rest()
            return (seen - began) * 1000, (time.monotonic() - began) * 1000

    def out(side):
        with side.exec(sleepers[side], *SOURCE.split()) as process:
            return drain(process.output)

    for side in sides:
        first(side)
    figures = alternate(sides, CONNECTS, first)
    report.medians("exec stream: to the first byte", [[a for a, _ in one] for one in figures])
    report.medians("exec stream: to its end", [[b for _, b in one] for one in figures])
    report.rates("exec stream: out,", alternate(sides, BULKS, out))
    report.rates("exec stream: in,", alternate(sides, BULKS, lambda side: exec_into(side, sleepers[side])))


def logs(sides, report):
    def log(side):
        container = side.start("sh", "-c", LOGGER)
        path = side.log()
        while not os.path.exists(path) or not os.path.getsize(path):
            time.sleep(0.001)
        began = time.monotonic()
        with open(path, "rb") as file:
            while True:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4))
                if file.read() == b"END\n":
                    break
                if time.monotonic() > began + PATIENCE:
                    raise SystemExit(f"{side.name}: the log did not end in {PATIENCE} s")
                time.sleep(0.005)
        took = time.monotonic() - began
        lines = int(subprocess.run(["wc", "-l", path], check=True, capture_output=True).stdout.split()[0])
        if lines != MIB * 8192 + 1:
            raise SystemExit(f"{side.name}: {lines} lines in the log of {MIB * 8192 + 1}")
        side.stop(container, 0, 128 + signal.SIGKILL)
        side.remove(container)
        os.unlink(path)
        return MIB / took

    report.medians(f"log: {MIB} MiB, lines of 128 bytes", alternate(sides, BULKS, log), "MiB/s")


def forward_into(side):
    with side.forward(SINK_PORT) as connection:
        return fill(connection, connection.stream, connection.receive)


def connect(side):
    with side.forward(ONE_BYTE_PORT) as connection:
        if connection.receive() != b"\n":
            raise ConnectionError("no byte")


def serve_ports(sides):
    """Starts what serves the ports, in every pod that has none yet."""
    def up(side):
        try:
            connect(side)
            return True
        except (ConnectionError, EOFError):
            return False

    for side in sides:
        if not up(side):
            side.start("sh", "-c", PORTS)
            wait_until(lambda: up(side), "a port of the pod")


def forwards(sides, report):
    def out(side):
        with side.forward(SOURCE_PORT) as connection:
            return drain(connection.receive)

    serve_ports(sides)
    report.rates("port-forward: out,", alternate(sides, BULKS, out))
    report.rates("port-forward: in,", alternate(sides, BULKS, forward_into))
    report.medians("port-forward: to the first byte", alternate(
        sides, CONNECTS, lambda side: milliseconds(lambda: connect(side))[0]))


def attaches(sides, report):
    cats = {side: side.start("cat", stdin=True) for side in sides}

    def attach(side):
        with side.attach(cats[side]) as process:
            process.send(process.streams["stdin"], b"\n")
            if process.output() != b"\n":
                raise SystemExit(f"{side.name}: nothing back")

    for side in sides:
        attach(side)
    report.medians("attach: a byte there and back", alternate(
        sides, CONNECTS, lambda side: milliseconds(lambda: attach(side))[0]))


def counts(sides, daemons, sleepers, report):
    bench_counts.commands(*sides, daemons, sleepers, report.line)
    bench_counts.stream("exec's input", MIB, *sides, daemons, lambda side: exec_into(side, sleepers[side]), report.line)
    serve_ports(sides)
    bench_counts.stream("port-forward's input", MIB, *sides, daemons, forward_into, report.line)


def measure(daemon, work, registry, project, image, report):
    """`daemon` is Bulkhead's, with its socket and its directory."""
    bench_network.configure(daemon.state, "bench-br0", "10.85.0")
    containerd, sides = Containerd(work, push_pause(registry, project)), []
    report = Report(report)
    try:
        for name, one in (("bulkhead", daemon), ("containerd", containerd)):
            sides.append(Side(name, Cri(one.socket, project, work.name), image, work.path(f"logs-{name}")))
        sleepers = {side: side.start(*PAUSE) for side in sides}
        daemons = daemon.daemon.pid, containerd.daemon.pid
        parts = {
            "commands": lambda: commands(sides, sleepers, report),
            "lives": lambda: lives(sides, report),
            "exec": lambda: exec_streams(sides, sleepers, report),
            "logs": lambda: logs(sides, report),
            "forward": lambda: forwards(sides, report),
            "attach": lambda: attaches(sides, report),
            "counts": lambda: counts(sides, daemons, sleepers, report),
        }
        for name in os.environ.get("BULKHEAD_BENCH_STREAM_PARTS", " ".join(parts)).split():
            parts[name]()
    finally:
        for side in sides:
            side.close()
        containerd.close()
        for bridge in ("bench-br0", "bench-br1"):
            subprocess.run(["ip", "link", "del", bridge], stderr=subprocess.DEVNULL)
