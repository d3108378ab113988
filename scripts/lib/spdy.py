"""A SPDY/3.1 client for the streams of CRI: exec, attach and port-forward. It has no TLS and, like Kubernetes' own
clients, no flow control."""
import json
import socket
import struct
import zlib

PATIENCE = 120


class Spdy:
    """A connection with its streams."""

    SYN_STREAM, SYN_REPLY, RST_STREAM, PING = 1, 2, 3, 6

    def __init__(self, url, protocol):
        host, path = url.removeprefix("http://").split("/", 1)
        name, port = host.rsplit(":", 1)
        self.socket = socket.create_connection((name, int(port)), timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(f"POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
                            f"X-Stream-Protocol-Version: {protocol}\r\n\r\n".encode())
        self.reader = self.socket.makefile("rb", 1 << 18)
        answer = self.reader.readline().decode().split()
        if answer[1:2] != ["101"]:
            raise SystemExit(f"{url}: {answer}")
        while self.reader.readline().strip():
            pass
        # Without SPDY's dictionary: a zlib stream says itself whether it needs one. Headers of answers are ignored.
        self.compress = zlib.compressobj()
        self.next = 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.reader.close()
        self.socket.close()

    def open(self, **headers):
        """Opens a stream and waits for the reply, as Kubernetes' clients do; returns its number."""
        plain = struct.pack(">I", len(headers))
        for text in (text for pair in headers.items() for text in pair):
            plain += struct.pack(">I", len(text)) + text.encode()
        block = self.compress.compress(plain) + self.compress.flush(zlib.Z_SYNC_FLUSH)
        stream, self.next = self.next, self.next + 2
        self._control(self.SYN_STREAM, struct.pack(">IIH", stream, 0, 0) + block)
        while self._frame()[0] != self.SYN_REPLY:
            pass
        return stream

    def send(self, stream, data):
        self.socket.sendall(struct.pack(">II", stream, len(data)) + data)

    def data(self):
        """Reads the next data of any stream. Returns the stream, the bytes, and whether they are its last."""
        while True:
            kind, flags, stream, payload = self._frame()
            if kind is None:
                return stream, payload, bool(flags & 1)
            if kind == self.RST_STREAM:
                raise SystemExit("the server reset a stream")

    def _frame(self):
        first, second = struct.unpack(">II", self._read(8))
        payload = self._read(second & 0xffffff)
        if not first >> 31:
            return None, second >> 24, first, payload
        if first & 0xffff == self.PING:
            self._control(self.PING, payload)
        return first & 0xffff, second >> 24, None, payload

    def _read(self, count):
        data = self.reader.read(count)
        if len(data) < count:
            raise EOFError("the server closed the connection")
        return data

    def _control(self, kind, payload):
        self.socket.sendall(struct.pack(">HHI", 0x8003, kind, len(payload)) + payload)


class Process(Spdy):
    """Exec or attach."""

    def __init__(self, url, *kinds):
        super().__init__(url, "v4.channel.k8s.io")
        self.streams = {kind: self.open(streamtype=kind) for kind in ("error", *kinds)}

    def output(self):
        """Reads the next output, stdout or stderr. Empty once the status has arrived, which must be Success."""
        while True:
            stream, data, _ = self.data()
            if not data:
                continue
            if stream != self.streams["error"]:
                return data
            if json.loads(data)["status"] != "Success":
                raise SystemExit(f"exec: {data.decode()}")
            return b""

    def rest(self):
        return b"".join(iter(self.output, b""))

    def to_stdin(self, data):
        self.send(self.streams["stdin"], data)


class Forward(Spdy):
    """One connection to a port of a pod."""

    def __init__(self, url, port):
        super().__init__(url, "portforward.k8s.io")
        self.error = self.open(streamtype="error", port=str(port), requestid="0")
        self.stream = self.open(streamtype="data", port=str(port), requestid="0")

    def receive(self):
        """Reads the next data of the connection. Empty once it has ended."""
        while True:
            stream, data, last = self.data()
            if stream == self.error and data:
                raise ConnectionError(data.decode())
            if stream == self.stream and (data or last):
                return data

    def send_on(self, data):
        self.send(self.stream, data)
