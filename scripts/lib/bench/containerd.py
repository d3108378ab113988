# SPDX-License-Identifier: Apache-2.0
"""containerd 2 with runc and its CRI plugin, with its own configuration. Bulkhead is compared with it."""
import os

from background import start, wait_until
from cri import Cri
from daemon import toml

# The directory that scripts/lib/anchor.sh prepared. containerd finds its shim beside itself.
ANCHOR = os.environ["BULKHEAD_BENCH_ANCHOR"]
RUNTIME, IMAGES = "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images"


class Containerd:
    """A containerd that lives as long as its `with` block, with all its files in `directory`. Pods get the network that
    is configured in `directory`/cni, and `pause` is the image of their first process. `options` are Popen's."""

    def __init__(self, directory, pause, **options):
        self.socket = f"{directory}/run/containerd.sock"
        path = f"{directory}/config.toml"
        runc = {"runtime_type": "io.containerd.runc.v2", "options": {"BinaryName": f"{ANCHOR}/runc"}}
        config = {
            "version": 3, "root": f"{directory}/state", "state": f"{directory}/run",
            "grpc": {"address": self.socket}, "plugins": {
                IMAGES: {"pinned_images": {"sandbox": pause}},
                RUNTIME: {"containerd": {"runtimes": {"runc": runc}},
                          "cni": {"bin_dirs": ["/usr/lib/cni"], "conf_dir": f"{directory}/cni"}},
                "io.containerd.grpc.v1.cri": {"stream_server_address": "127.0.0.1", "stream_server_port": "0"}}}
        os.makedirs(f"{directory}/run", exist_ok=True)
        with open(path, "w") as file:
            file.write(toml(config) + "\n")
        self.process = start([f"{ANCHOR}/containerd", "--config", path], f"{directory}/log", **options)
        cri = Cri(self.socket)
        wait_until(cri.answers, "containerd with its CRI plugin")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
