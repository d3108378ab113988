# SPDX-License-Identifier: Apache-2.0
"""Processes in the background, and waiting for what they bring."""
import subprocess
import time

PATIENCE_SECONDS = 60
# What starts a process: one that ends with us, however we end; one that stays.
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
    """Asks for a condition every so many seconds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not in {PATIENCE_SECONDS} s")
        time.sleep(every)
