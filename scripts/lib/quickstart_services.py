# SPDX-License-Identifier: Apache-2.0
"""Starts a service for scripts/lib/quickstart-pod and leaves it running: a registry with an image, or a daemon.

    quickstart_services.py registry|daemon RUN STATE PORT

RUN is a directory for sockets, logs (NAME.log) and process ids (NAME.pid). STATE is a directory on disk. PORT is the
registry's.
"""
import os
import subprocess
import sys

from background import STAYS
from daemon import Daemon, write_bridge
from registry import Registry

IMAGES = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "tests/images")


def registry(run, state, port):
    process = Registry(state, port, log=f"{run}/registry.log", holder=STAYS).process
    subprocess.run([sys.executable, f"{IMAGES}/make_images.py", "--registry", f"http://127.0.0.1:{port}",
                    "--only", "busybox"], check=True)
    return process


def daemon(run, state, port):
    write_bridge(run, "bulkhead-quickstart", "bulkhead1", "10.87.0.0/16")
    config = {"socket": f"{run}/bulkhead.sock", "state_dir": f"{state}/daemon",
              "registries": {f"127.0.0.1:{port}": {"plain_http": True}}}
    return Daemon(run, config, log=f"{run}/daemon.log", holder=STAYS).process


def main(what, run, state, port):
    process = {"registry": registry, "daemon": daemon}[what](run, state, int(port))
    with open(f"{run}/{what}.pid", "w") as file:
        file.write(f"{process.pid}\n")
    # The process must outlive this one. With a return code, Popen does not complain that it still runs.
    process.returncode = 0


main(*sys.argv[1:])
