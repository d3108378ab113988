# SPDX-License-Identifier: Apache-2.0
"""Starts processes in the background, and waits for conditions."""
import subprocess
import time

# Long, because an emulated host is slow, and may have to share its core.
PATIENCE_SECONDS = 180
# Commands that start a process: so that it ends with this one, however that ends; so that it stays.
ENDS_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
STAYS = ["setsid"]


def start(command, log=None, holder=ENDS_WITH_US, **options):
    """Starts a process. Both its outputs go to the file `log`, or nowhere. `options` are Popen's."""
    output = open(log, "wb") if log else subprocess.DEVNULL
    try:
        return subprocess.Popen([*holder, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                **options)
    finally:
        if log:
            output.close()


def wait_until(condition, what, every=0.05):
    """Waits until a condition is true. Checks it every `every` seconds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not in {PATIENCE_SECONDS} s")
        time.sleep(every)
