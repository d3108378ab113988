# SPDX-License-Identifier: Apache-2.0
"""containerd 2 with runc and its CRI plugin, with its own configuration. Benchmarks compare Bulkhead with it, and critest
and the nodes of a cluster have it as a delegate."""
import os

from background import start, wait_until
from daemon import merged, toml

# The directory that scripts/lib/containerd.sh prepared.
PROGRAMS = "BULKHEAD_CONTAINERD"
RUNTIME, IMAGES = "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images"


class Containerd:
    """A containerd that lives as long as its `with` block, with all its files in `directory`, unless `config` says
    otherwise. `config` has further keys of its configuration as nested dictionaries. Pods get the network that is
    configured in `directory`/cni, and `pause` is the image of their first process. `mirrors` are the mirrors of
    registries, by the host in an image's name. What it says goes to the file `log`, or to one
    in `directory`. `options` are Popen's."""

    def __init__(self, directory, pause, mirrors=None, config=None, log=None, **options):
        programs = os.environ[PROGRAMS]
        self.log, path = log or f"{directory}/log", f"{directory}/config.toml"
        runc = {"runtime_type": "io.containerd.runc.v2", "options": {"BinaryName": f"{programs}/runc"}}
        own = {
            "version": 3, "root": f"{directory}/state", "state": f"{directory}/run",
            "grpc": {"address": f"{directory}/run/containerd.sock"}, "plugins": {
                IMAGES: {"pinned_images": {"sandbox": pause}, "registry": {"config_path": f"{directory}/registries"}},
                RUNTIME: {"containerd": {"runtimes": {"runc": runc}},
                          "cni": {"bin_dirs": ["/usr/lib/cni"], "conf_dir": f"{directory}/cni"}},
                "io.containerd.grpc.v1.cri": {"stream_server_address": "127.0.0.1", "stream_server_port": "0"}}}
        config = merged(own, config or {})
        self.socket = config["grpc"]["address"]
        os.makedirs(os.path.dirname(self.socket), exist_ok=True)
        for host, mirror in (mirrors or {}).items():
            os.makedirs(f"{directory}/registries/{host}")
            with open(f"{directory}/registries/{host}/hosts.toml", "w") as file:
                file.write(toml({"host": {f"http://{mirror}": {"capabilities": ["pull", "resolve"]}}}) + "\n")
        with open(path, "w") as file:
            file.write(toml(config) + "\n")
        # containerd looks for its shim in PATH first, and this machine may have another one.
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        self.process = start([f"{programs}/containerd", "--config", path], self.log, env=environment, **options)
        wait_until(self.is_up, f"containerd with its CRI plugin; see {self.log}")

    def is_up(self):
        """Whether CRI is served. The message is the last before that."""
        if self.process.poll() is not None:
            raise SystemExit(f"containerd ended with {self.process.returncode}; see {self.log}")
        with open(self.log, errors="replace") as file:
            return "Start streaming server" in file.read()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
