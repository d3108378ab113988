"""The benchmark of commands and streams of bench.py: Bulkhead and containerd with runc side by side, each through its
own CRI socket with the same client, both with a bridge network and pods of one shape.

The client is Python on the same CPUs and takes its part of every time; for throughput that part is told. containerd 1.6
streams by SPDY only, so the streams are SPDY/3.1 on both sides. Throughput out counts from the first data to the end,
in until the sink says what it got. What emulation distorts less is counted besides: VM exits, and the system calls on
the host. Those in a guest are not among them; and as strace slows a process down, one that polls polls more.
"""
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import bench_files
import bench_network
from registry import wait_until
from spdy import Forward, Process

MIB = int(os.environ.get("BULKHEAD_BENCH_STREAM_MIB", "32"))
EXECS = 15
CONTAINERS = 7
CONNECTS = 9
BULKS = 3
COUNTED = 20
IDLE_SECONDS = 5
PATIENCE = 120
BLOCK = 32 << 10  # as kubectl sends
HANDLED = 7
ONE_BYTE_PORT, SOURCE_PORT, SINK_PORT = 7000, 7001, 7002
SOURCE = f"dd if=/dev/zero bs=64k count={MIB * 16} status=none"
SINK = f"dd of=/dev/null bs=64k iflag=fullblock count={MIB * 16}"
SUNK = f"{MIB * 16}+0 records in\n".encode()
PAUSE = ["sleep", "100000"]
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


def milliseconds(action):
    started = time.monotonic()
    answer = action()
    return (time.monotonic() - started) * 1000, answer


class Cri(bench_files.Cri):
    def pull(self, image):
        method = self.channel.unary_unary("/runtime.v1.ImageService/PullImage", lambda one: one.SerializeToString(),
                                          self.messages.PullImageResponse.FromString)
        method(self.messages.PullImageRequest(image={"image": image}), timeout=PATIENCE)


class Side:
    """One runtime with one pod."""

    def __init__(self, name, cri, image, logs):
        self.name, self.cri, self.image, self.logs, self.count = name, cri, image, logs, 0
        os.makedirs(logs)
        cri.pull(image)
        self.security = {"namespace_options": {"pid": cri.messages.CONTAINER}}
        self.sandbox = {"metadata": {"name": name, "uid": name, "namespace": "bench"}, "log_directory": logs,
                        "linux": {"security_context": self.security}}
        self.pod = cri.call("RunPodSandbox", config=self.sandbox).pod_sandbox_id

    def close(self):
        self.cri.call("StopPodSandbox", pod_sandbox_id=self.pod)
        self.cri.call("RemovePodSandbox", pod_sandbox_id=self.pod)

    def start(self, *command, stdin=False):
        self.count += 1
        container = {"metadata": {"name": f"c{self.count}"}, "image": {"image": self.image}, "command": command,
                     "log_path": f"{self.count}.log", "stdin": stdin,
                     "linux": {"security_context": self.security}}
        made = self.cri.call("CreateContainer", pod_sandbox_id=self.pod, config=container,
                             sandbox_config=self.sandbox).container_id
        self.cri.call("StartContainer", container_id=made)
        return made

    def log(self):
        """The log of the container that came last."""
        return f"{self.logs}/{self.count}.log"

    def stop(self, container, grace, code):
        """Returns how long it took, if the container has ended then, and as it should."""
        took, _ = milliseconds(lambda: self.cri.call("StopContainer", container_id=container, timeout=grace))
        status = self.cri.call("ContainerStatus", container_id=container).status
        if status.state != self.cri.messages.CONTAINER_EXITED or status.exit_code != code:
            raise SystemExit(f"{self.name}: after StopContainer: state {status.state}, code {status.exit_code}")
        return took

    def remove(self, container):
        self.cri.call("RemoveContainer", container_id=container)

    def exec_sync(self, container):
        if self.cri.call("ExecSync", container_id=container, cmd=["true"], timeout=60).exit_code:
            raise SystemExit(f"{self.name}: true failed")

    def exec(self, container, *command, stdin=False):
        url = self.cri.call("Exec", container_id=container, cmd=command, stdin=stdin, stdout=True, stderr=True).url
        return Process(url, *["stdin"] * stdin, "stdout", "stderr")

    def attach(self, container):
        url = self.cri.call("Attach", container_id=container, stdin=True, stdout=True, stderr=True).url
        return Process(url, "stdin", "stdout", "stderr")

    def forward(self, port):
        return Forward(self.cri.call("PortForward", pod_sandbox_id=self.pod, port=[port]).url, port)

    def info(self):
        return json.loads(self.cri.call("PodSandboxStatus", pod_sandbox_id=self.pod, verbose=True).info["info"])


class Containerd:
    """containerd with runc, its CRI plugin, and directories of its own."""

    def __init__(self, work, pause):
        self.state = tempfile.mkdtemp(dir=work.name)
        self.socket = f"{self.state}/c.sock"
        config = os.path.join(self.state, "config.toml")
        cri = 'plugins."io.containerd.grpc.v1.cri"'
        with open(config, "w") as file:
            file.write(f'version = 2\nroot = "{self.state}/root"\nstate = "{self.state}/state"\n'
                       f'[grpc]\naddress = "{self.socket}"\n[{cri}]\nsandbox_image = "{pause}"\n'
                       f'stream_server_address = "127.0.0.1"\nstream_server_port = "0"\n'
                       f'[{cri}.cni]\nbin_dir = "/usr/lib/cni"\nconf_dir = "{self.state}/cni"\n')
        bench_network.configure(self.state, "bench-br1", "10.86.0")
        self.daemon = subprocess.Popen(["containerd", "--config", config], stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
        wait_until(self.up, "containerd with its CRI plugin")

    def up(self):
        listed = subprocess.run(["ctr", "--address", self.socket, "plugins", "ls"], capture_output=True, text=True)
        return re.search(r"\scri\s.*\sok\s", listed.stdout)

    def close(self):
        self.daemon.terminate()
        self.daemon.wait()
        shutil.rmtree(self.state, ignore_errors=True)


def push_pause(registry, project):
    """An image whose own command does not end: containerd runs it as every pod's first process."""
    sys.path.insert(0, f"{project}/tests/images")
    import make_images
    make_images.push(make_images.Registry(f"http://{registry}"), "bench/pause", ["latest"],
                     [make_images.busybox_layer()], {"Cmd": PAUSE})
    return f"{registry}/bench/pause:latest"


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

    # The shell outlives dd, which closes the output that it does not use: containerd closes a command's input when one
    # of its outputs has ended (containerd/containerd#13934).
    def into(side):
        with side.exec(sleepers[side], "sh", "-c", f"echo; {SINK}; echo", stdin=True) as process:
            process.output()
            return fill(process, process.streams["stdin"], process.rest)

    for side in sides:
        first(side)
    figures = alternate(sides, CONNECTS, first)
    report.medians("exec stream: to the first byte", [[a for a, _ in one] for one in figures])
    report.medians("exec stream: to its end", [[b for _, b in one] for one in figures])
    report.rates("exec stream: out,", alternate(sides, BULKS, out))
    report.rates("exec stream: in,", alternate(sides, BULKS, into))


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


def forwards(sides, report):
    def connect(side):
        with side.forward(ONE_BYTE_PORT) as connection:
            if connection.receive() != b"\n":
                raise ConnectionError("no byte")

    def up(side):
        try:
            connect(side)
            return True
        except (ConnectionError, EOFError):
            return False

    def out(side):
        with side.forward(SOURCE_PORT) as connection:
            return drain(connection.receive)

    def into(side):
        with side.forward(SINK_PORT) as connection:
            return fill(connection, connection.stream, connection.receive)

    for side in sides:
        side.start("sh", "-c", PORTS)
        wait_until(lambda: up(side), "a port of the pod")
    report.rates("port-forward: out,", alternate(sides, BULKS, out))
    report.rates("port-forward: in,", alternate(sides, BULKS, into))
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


def count_calls(name, pid, action):
    """System calls for each of COUNTED actions."""
    took, counts = milliseconds(lambda: system_calls(pid, lambda: [action() for _ in range(COUNTED)]))
    idle = system_calls(pid, lambda: time.sleep(IDLE_SECONDS))["total"] / IDLE_SECONDS
    total = counts.pop("total") / COUNTED
    most = sorted(counts.items(), key=lambda row: -row[1])[:6]
    print(f"  {name}: {total:.0f} system calls an ExecSync of {took / COUNTED:.0f} ms under strace, idle {idle:.0f} a "
          f"second; most: {', '.join(f'{call} {calls / COUNTED:.1f}' for call, calls in most)}", flush=True)
    return total


def counts(ours, theirs, daemons, sleepers, report):
    def exits():
        return ours.info()["vmm"]["exits_total"]

    before = exits()
    took, _ = milliseconds(lambda: [ours.exec_sync(sleepers[ours]) for _ in range(COUNTED)])
    between = exits()
    time.sleep(IDLE_SECONDS)
    idle = (exits() - between) / IDLE_SECONDS
    print(f"  {(between - before) / COUNTED:.0f} VM exits an ExecSync of {took / COUNTED:.0f} ms, idle {idle:.0f} a "
          f"second", flush=True)
    # containerd tells the pod's first process, whose parent is the shim.
    workers = [ours.info()["pid"], field(f"/proc/{theirs.info()['pid']}/status", "PPid")]
    for title, names, pids in (("daemon", ("bulkhead", "containerd"), daemons),
                               ("VMM; shim and runc", ("bulkhead-vmm", "shim and runc"), workers)):
        totals = [count_calls(name, pid, lambda: side.exec_sync(sleepers[side]))
                  for name, pid, side in zip(names, pids, (ours, theirs))]
        report.line(f"system calls an ExecSync: {title}", *totals, "")


def measure(daemon, work, registry, project, image, report):
    """`daemon` is Bulkhead's, with its socket and its directory."""
    bench_network.configure(daemon.state, "bench-br0", "10.85.0")
    containerd, sides = Containerd(work, push_pause(registry, project)), []
    report = Report(report)
    try:
        for name, one in (("bulkhead", daemon), ("containerd", containerd)):
            sides.append(Side(name, Cri(one.socket, project, work.name), image, work.path(f"logs-{name}")))
        sleepers = {side: side.start(*PAUSE) for side in sides}
        commands(sides, sleepers, report)
        lives(sides, report)
        exec_streams(sides, sleepers, report)
        logs(sides, report)
        forwards(sides, report)
        attaches(sides, report)
        counts(*sides, (daemon.daemon.pid, containerd.daemon.pid), sleepers, report)
    finally:
        for side in sides:
            side.close()
        containerd.close()
        for bridge in ("bench-br0", "bench-br1"):
            subprocess.run(["ip", "link", "del", bridge], stderr=subprocess.DEVNULL)
