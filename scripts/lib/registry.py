# SPDX-License-Identifier: Apache-2.0
"""A docker-registry, for other scripts."""
import os
import socket

from background import start, wait_until


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def can_connect(port, address="127.0.0.1"):
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


class Registry:
    """Lives as long as its `with` block, whose value is its address. Its files are in `directory`. It listens on
    loopback, unless `address` is another of this machine's. `options` are those of background.start."""

    def __init__(self, directory, port=None, address="127.0.0.1", **options):
        self.port = port or free_port()
        self.address = address
        config = os.path.join(directory, "registry.yml")
        with open(config, "w") as file:
            file.write("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: "
                       f"{{rootdirectory: {directory}/registry}}}}\nhttp: {{addr: '{address}:{self.port}'}}\n")
        self.process = start(["docker-registry", "serve", config], **options)
        wait_until(lambda: can_connect(self.port, address), "docker-registry")

    def __enter__(self):
        return f"{self.address}:{self.port}"

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
