#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Runs third-party WebSocket clients against a streaming server with TLS.

The stream module of the package kubernetes speaks v4, the package websocket-client everything else. No Python client for
SPDY in a WebSocket is known, so this file has as much of SPDY/3.1 as a port-forward needs.

    websocket_clients.py CERTIFICATE

Prints "ready", then reads lines NAME=URL and runs the client NAME at that URL, because a URL is valid for a minute only.
Prints NAME if all was right, and ends with an error at the first client that failed.
"""
import base64
import json
import socket
import ssl
import struct
import sys
import zlib

import websocket
from kubernetes.client import Configuration
from kubernetes.stream import ws_client

TIMEOUT = 60
certificate = sys.argv[1]


def kubernetes(url):
    configuration = Configuration()
    configuration.ssl_ca_cert = certificate
    client = ws_client.WSClient(configuration, ws_client.get_websocket_url(url), None, True)
    client.sock.settimeout(TIMEOUT)
    return client


def plain(url, protocol):
    """Opens a connection that offers one subprotocol; None: it offers no subprotocol."""
    connection = websocket.WebSocket(sslopt={"cert_reqs": ssl.CERT_REQUIRED, "ca_certs": certificate})
    connection.settimeout(TIMEOUT)
    connection.connect(url.replace("https:", "wss:"), subprotocols=[protocol] if protocol else None)
    # websocket-client returns the name in lower case.
    assert connection.getsubprotocol() == (protocol and protocol.lower()), connection.getsubprotocol()
    if protocol is None:
        assert "sec-websocket-protocol" not in connection.getheaders(), connection.getheaders()
    return connection


def messages(connection):
    """Reads until the close frame. Returns the bytes of each channel, the code and the reason."""
    channels = {}
    while True:
        opcode, frame = connection.recv_data_frame(True)
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            code = struct.unpack(">H", frame.data[:2])[0]
            connection.close()
            return channels, code, frame.data[2:].decode()
        if opcode in (websocket.ABNF.OPCODE_BINARY, websocket.ABNF.OPCODE_TEXT):
            channel, data = frame.data[0], frame.data[1:]
            channels[channel] = channels.get(channel, b"") + data


def v4_exit(url):
    client = kubernetes(url)
    client.run_forever(timeout=TIMEOUT)
    assert client.returncode == 3, client.returncode
    output = client.read_all()
    assert "out\n" in output and "err\n" in output, output


def v4_input(url):
    client = kubernetes(url)
    # Input as one text message and many binary ones. v4 cannot close stdin, so the program must end by itself.
    client.write_stdin("x" * 300_000)
    for _ in range(100):
        client.write_stdin(b"y" * 1000)
    client.run_forever(timeout=TIMEOUT)
    # The exit code comes first, because read_all() also discards what the client has read of all other channels.
    assert client.returncode == 0, client.returncode
    output = client.read_all()
    assert output == "x" * 300_000 + "y" * 100_000, len(output)


def v4_terminal(url):
    client = kubernetes(url)
    client.write_channel(ws_client.RESIZE_CHANNEL, json.dumps({"Width": 123, "Height": 45}))
    client.write_stdin("until [ \"$(stty size)\" = '45 123' ]; do sleep 0.1; done; exit 9\n")
    client.run_forever(timeout=TIMEOUT)
    assert client.returncode == 9, client.returncode


def v5_half_close(url):
    connection = plain(url, "v5.channel.k8s.io")
    connection.send_binary(b"\0" + b"x" * 250_000)
    connection.ping("there?")
    connection.send_binary(b"\xff\0")
    channels, code, _ = messages(connection)
    assert channels[1].strip() == b"250000", channels
    assert json.loads(channels[3])["status"] == "Success", channels
    assert code == 1000, code


def v5_out_of_range(url):
    connection = plain(url, "v5.channel.k8s.io")
    connection.send_binary(b"\x07x")
    _, code, reason = messages(connection)
    assert code == 1002 and "channel 7" in reason, (code, reason)


def v5_too_long(url):
    connection = plain(url, "v5.channel.k8s.io")
    # A header that announces 2^40 bytes. The server must not wait for them.
    connection.sock.sendall(b"\x82\xff" + struct.pack(">Q", 1 << 40) + b"mask")
    _, code, reason = messages(connection)
    assert code == 1002, (code, reason)


def base64_variant(url):
    connection = plain(url, "v4.base64.channel.k8s.io")
    connection.send("0" + base64.b64encode(b"hello").decode())
    while True:
        message = connection.recv()
        if len(message) > 1:
            break
    assert message == "1" + base64.b64encode(b"hello").decode(), message
    connection.close()


def first_success(url, protocol="channel.k8s.io"):
    """As in Kubernetes' conformance suite: after a success, only output arrives."""
    channels, code, _ = messages(plain(url, protocol))
    assert channels == {1: b"remote execution test\n"}, channels
    assert code == 1000, code


def first_failure(url, protocol="channel.k8s.io"):
    """After a failure, the error channel has a text and no status object."""
    channels, code, _ = messages(plain(url, protocol))
    said = b"command terminated with non-zero exit code: exit status 3"
    assert channels == {1: b"out\n", 2: b"err\n", 3: said}, channels
    assert code == 1000, code


def first_input(url, protocol="channel.k8s.io"):
    connection = plain(url, protocol)
    connection.send_binary(b"\0" + b"x" * 250_000)
    channels, code, _ = messages(connection)
    assert channels == {1: b"x" * 250_000}, {channel: len(data) for channel, data in channels.items()}
    assert code == 1000, code


def first_base64(url):
    connection = plain(url, "base64.channel.k8s.io")
    connection.send("0" + base64.b64encode(b"hello\n").decode())
    found = {}
    while True:
        opcode, frame = connection.recv_data_frame(True)
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            break
        assert opcode == websocket.ABNF.OPCODE_TEXT, opcode
        channel = frame.data[:1].decode()
        found[channel] = found.get(channel, b"") + base64.b64decode(frame.data[1:], validate=True)
    said = b"command terminated with non-zero exit code: exit status 4"
    assert found == {"1": b"hello\n", "3": said}, found


def first_attach(url, protocol="channel.k8s.io"):
    connection = plain(url, protocol)
    seen = b""
    while b"again\n" not in seen:
        message = connection.recv()
        assert message and message[0] == 1, message
        seen += message[1:]
    connection.close()


def without_a_name(client):
    """Runs a client without a subprotocol."""
    return lambda url: client(url, None)


def unknown_protocol(url):
    try:
        plain(url, "v9.channel.k8s.io")
    except websocket.WebSocketBadStatusException as error:
        assert error.status_code == 403, error
    else:
        raise AssertionError("an unknown protocol was accepted")


def ports(url):
    configuration = Configuration()
    configuration.ssl_ca_cert = certificate
    connection = ws_client.create_websocket(configuration, ws_client.get_websocket_url(url))
    forward = ws_client.PortForward(connection, [7001, 7003])
    page = forward.socket(7001)
    page.settimeout(TIMEOUT)
    page.sendall(b"GET / HTTP/1.0\r\n\r\n")
    answer = b""
    while not answer.endswith(b"a page\n"):
        more = page.recv(4096)
        assert more, answer
        answer += more
    refused = forward.socket(7003)
    refused.settimeout(TIMEOUT)
    assert refused.recv(1) == b"", "nothing listens on that port"
    assert "refused" in forward.error(7003), forward.error(7003)
    forward.close()


def ports_first(url, protocol="channel.k8s.io"):
    """Channels 0 and 1 are data and errors of the first port, 2 and 3 of the second. Each channel begins with its port."""
    connection = plain(url, protocol)
    text = protocol is not None and "base64" in protocol
    if text:
        connection.send("0" + base64.b64encode(b"GET / HTTP/1.0\r\n\r\n").decode())
    else:
        connection.send_binary(b"\0GET / HTTP/1.0\r\n\r\n")
    found = {}
    while not (found.get(0, b"").endswith(b"a page\n") and b"refused" in found.get(3, b"")):
        message = connection.recv()
        assert message, found
        channel, data = message[0], message[1:]
        if text:
            channel, data = int(channel), base64.b64decode(data, validate=True)
        found[channel] = found.get(channel, b"") + data
    for channel, port in enumerate((7001, 7001, 7003, 7003)):
        assert found[channel][:2] == struct.pack("<H", port), found
    connection.close()


class Tunnel:
    """SPDY over WebSocket messages, whose boundaries are independent of SPDY's frames."""

    def __init__(self, connection):
        self.connection = connection
        self.received = b""
        self.compress = zlib.compressobj()

    def syn_stream(self, stream, headers):
        plain = struct.pack(">I", len(headers))
        for text in (text for pair in headers.items() for text in pair):
            plain += struct.pack(">I", len(text)) + text.encode()
        block = self.compress.compress(plain) + self.compress.flush(zlib.Z_SYNC_FLUSH)
        return struct.pack(">HHIIIH", 0x8003, 1, 10 + len(block), stream, 0, 0) + block

    def read(self, count):
        while len(self.received) < count:
            message = self.connection.recv()
            assert message, "the server closed the connection"
            self.received += message
        data, self.received = self.received[:count], self.received[count:]
        return data

    def frame(self):
        """Reads a frame. Returns its first word, its flags and its payload."""
        first, second = struct.unpack(">II", self.read(8))
        return first, second >> 24, self.read(second & 0xffffff)

    def streams(self, *wanted):
        """Reads these streams until all have ended. Returns their bytes."""
        found, open_ones = {stream: b"" for stream in wanted}, set(wanted)
        while open_ones:
            first, flags, payload = self.frame()
            if first in found:
                found[first] += payload
                if flags & 1:
                    open_ones.discard(first)
        return found


def tunnel(url):
    connection = plain(url, "SPDY/3.1+portforward.k8s.io")
    spdy = Tunnel(connection)

    def pair(stream, port):
        return b"".join(spdy.syn_stream(stream + 2 * index, {"streamtype": kind, "port": str(port), "requestid": str(stream)})
                        for index, kind in enumerate(("error", "data")))

    request = b"GET / HTTP/1.0\r\n\r\n"
    sent = pair(1, 7001) + struct.pack(">II", 3, len(request)) + request + pair(5, 7003)
    # The first message ends in the middle of a frame's head, the second in the middle of data; the last one has the rest.
    for part in (sent[:5], sent[5:-40], sent[-40:]):
        connection.send_binary(part)
    found = spdy.streams(1, 3, 5, 7)
    assert found[3].endswith(b"a page\n") and found[1] == b"", found
    assert b"7003" in found[5] and b"refused" in found[5] and found[7] == b"", found
    connection.send_binary(struct.pack(">HHI", 0x8009, 1, 0))
    first, _, payload = spdy.frame()
    while first != 0x80030007:
        first, _, payload = spdy.frame()
    assert payload[4:] == struct.pack(">I", 1), "a protocol error in the server's goodbye"
    connection.close()


CLIENTS = {
    "v4-exit": v4_exit,
    "v4-input": v4_input,
    "v4-terminal": v4_terminal,
    "v5-half-close": v5_half_close,
    "v5-out-of-range": v5_out_of_range,
    "v5-too-long": v5_too_long,
    "base64": base64_variant,
    "first-success": first_success,
    "first-failure": first_failure,
    "first-input": first_input,
    "first-attach": first_attach,
    "first-base64": first_base64,
    "unnamed-success": without_a_name(first_success),
    "unnamed-failure": without_a_name(first_failure),
    "unnamed-input": without_a_name(first_input),
    "unnamed-attach": without_a_name(first_attach),
    "unknown-protocol": unknown_protocol,
    "ports": ports,
    "ports-v4-base64": lambda url: ports_first(url, "v4.base64.channel.k8s.io"),
    "ports-first": ports_first,
    "ports-first-base64": lambda url: ports_first(url, "base64.channel.k8s.io"),
    "ports-unnamed": without_a_name(ports_first),
    "tunnel": tunnel,
}

socket.setdefaulttimeout(TIMEOUT)
print("ready", flush=True)
for line in sys.stdin:
    name, url = line.strip().split("=", 1)
    CLIENTS[name](url)
    print(name, flush=True)
