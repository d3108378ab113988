"""A docker-registry on loopback that lives as long as its `with` block, for the scripts beside this one."""
import os
import socket
import subprocess
import time

PATIENCE_SECONDS = 60


def wait_until(condition, what):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not in {PATIENCE_SECONDS} s")
        time.sleep(0.05)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def can_connect(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Registry:
    """Its files are in `directory`; entering gives its address."""

    def __init__(self, directory):
        self.directory = directory

    def __enter__(self):
        port = free_port()
        config = os.path.join(self.directory, "registry.yml")
        with open(config, "w") as file:
            file.write("version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\nstorage: {filesystem: "
                       f"{{rootdirectory: {self.directory}/registry}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n")
        # Ends with us, however we end.
        self.process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "docker-registry", "serve", config],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: can_connect(port), "docker-registry")
        return f"127.0.0.1:{port}"

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
