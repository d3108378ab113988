# SPDX-License-Identifier: Apache-2.0
"""streams: the cost of opening exec, attach, port-forward and log streams, and of moving --mib MiB through them.
Compared with containerd and runc, both through CRI and SPDY/3.1, each with a pod on a bridge.

The client is Python on the same CPUs. Times include its share, which is reported; counts do not include it. A source
starts when the client sends it a byte, so that a transfer has a defined beginning.
"""
import os
import signal

from background import wait_until
from bench.sides import SLEEP

BLOCK = 32 << 10  # as kubectl sends
ONE_BYTE_PORT, SOURCE_PORT, SINK_PORT = 7000, 7001, 7002
GO = b"\n"


class Programs:
    """The programs that run in the pods and move `mib` MiB."""

    def __init__(self, mib):
        self.sunk = f"{mib * 16}+0 records in\n".encode()
        source = f"read -r go; dd if=/dev/zero bs=64k count={mib * 16} status=none"
        sink = f"dd of=/dev/null bs=64k iflag=fullblock count={mib * 16}"
        self.source = ["sh", "-c", source]
        # containerd closes a command's input when one of its outputs has ended (containerd/containerd#13934). dd closes
        # the output that it does not use, so the shell keeps it open.
        self.sink = ["sh", "-c", f"echo; {sink}; echo"]
        self.ports = ["sh", "-c", f"""
            nc -ll -p {ONE_BYTE_PORT} -e echo &
            nc -ll -p {SOURCE_PORT} -e sh -c '{source}' &
            nc -ll -p {SINK_PORT} -e sh -c '{sink} 2>&1' &
            wait"""]
        # 1 MiB of lines is made first, so that the benchmark does not measure how fast lines are made.
        self.logger = ["sh", "-c", f"""
            yes {"x" * 127} | head -c 1048576 >/tmp/lines; mkfifo /tmp/go; echo ready; read -r go </tmp/go
            i=0; while [ $i -lt {mib} ]; do cat /tmp/lines; i=$((i+1)); done
            echo END
            sleep 1000"""]


class Streams:
    """The pods of both sides, each with containers for these benchmarks."""

    def __init__(self, setting, pods, image):
        self.pods, self.image, self.effort = pods, image, setting.effort
        self.mib = setting.effort.mib
        self.programs = Programs(self.mib)
        self.sleepers = {pod: pod.start(image, *SLEEP) for pod in pods}
        self.cats = {pod: pod.start(image, "cat", stdin=True) for pod in pods}
        for pod in pods:
            pod.start(image, *self.programs.ports)
            wait_until(lambda: serves(pod), "a port of the pod")

    def drain(self, send, receive):
        """Starts a source and reads until it ends."""
        send(GO)
        total = 0
        while data := receive():
            total += len(data)
        if total != self.mib << 20:
            raise SystemExit(f"{total} bytes of {self.mib << 20}")

    def fill(self, send, answer):
        """Sends to a sink until the sink confirms that it has everything."""
        block = bytes(BLOCK)
        for _ in range((self.mib << 20) // BLOCK):
            send(block)
        text = answer()
        if self.programs.sunk not in text:
            raise SystemExit(f"the sink says {text}")

    def exec_echo(self, pod, lap):
        def echo():
            with pod.exec(self.sleepers[pod], "echo") as process:
                if process.output() != b"\n":
                    raise SystemExit(f"{pod.name}: no output of echo")
                process.rest()

        lap("exec: echo over a stream, to its end", echo)

    def exec_out(self, pod, lap):
        with pod.exec(self.sleepers[pod], *self.programs.source, stdin=True) as process:
            lap.transfer(f"exec stream: out, {self.mib} MiB", lambda: self.drain(process.to_stdin, process.output), self.mib)

    def exec_in(self, pod, lap):
        with pod.exec(self.sleepers[pod], *self.programs.sink, stdin=True) as process:
            process.output()
            lap.transfer(f"exec stream: in, {self.mib} MiB", lambda: self.fill(process.to_stdin, process.rest), self.mib)

    def attach(self, pod, lap):
        def there_and_back():
            with pod.attach(self.cats[pod]) as process:
                process.to_stdin(b"\n")
                if process.output() != b"\n":
                    raise SystemExit(f"{pod.name}: nothing back")

        lap("attach: a byte there and back", there_and_back)

    def connect(self, pod, lap):
        lap("port-forward: to the first byte", lambda: connect(pod))

    def forward_out(self, pod, lap):
        with pod.forward(SOURCE_PORT) as connection:
            lap.transfer(f"port-forward: out, {self.mib} MiB",
                         lambda: self.drain(connection.send_on, connection.receive), self.mib)

    def forward_in(self, pod, lap):
        with pod.forward(SINK_PORT) as connection:
            lap.transfer(f"port-forward: in, {self.mib} MiB",
                         lambda: self.fill(connection.send_on, connection.receive), self.mib)

    def log(self, pod, lap):
        container, path = pod.start(self.image, *self.programs.logger), pod.log()

        def write():
            pod.run(container, "sh", "-c", "echo >/tmp/go")
            wait_until(lambda: ends_with_end(path), "the end of the log", every=0.005)

        wait_until(lambda: os.path.exists(path) and os.path.getsize(path), "the container that logs")
        lap.transfer(f"log: {self.mib} MiB, lines of 128 bytes", write, self.mib)
        with open(path, "rb") as file:
            lines = sum(1 for _ in file)
        if lines != self.mib * 8192 + 2:
            raise SystemExit(f"{pod.name}: {lines} lines in the log of {self.mib * 8192 + 2}")
        pod.stop(container, 0)
        pod.require_exit(container, 128 + signal.SIGKILL)
        pod.remove(container)
        os.unlink(path)


def ends_with_end(path):
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4))
        return file.read() == b"END\n"


def connect(pod):
    with pod.forward(ONE_BYTE_PORT) as connection:
        if connection.receive() != b"\n":
            raise ConnectionError("no byte")


def serves(pod):
    try:
        connect(pod)
        return True
    except (ConnectionError, EOFError):
        return False


def measure(setting):
    image, effort = setting.image("busybox"), setting.effort
    with setting.pods(image) as pods:
        streams = Streams(setting, pods, image)
        for action in (streams.exec_echo, streams.attach, streams.connect):
            setting.comparison.alternate(pods, effort.connections, action)
        for action in (streams.exec_out, streams.exec_in, streams.forward_out, streams.forward_in, streams.log):
            setting.comparison.alternate(pods, effort.transfers, action, warm_up=False)
