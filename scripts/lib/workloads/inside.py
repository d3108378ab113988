# SPDX-License-Identifier: Apache-2.0
"""Runs on a KVM host: runs workloads one by one, and prints a line for each when it has ended.

usage: inside.py PROGRAM NAME...
"""
import json
import os
import subprocess
import sys
import time

# What the page needs to know of the host.
RESULT = "result: "
# A workload that hangs must not take the others with it.
LONGEST_SECONDS = 1800


def run(program, name):
    """Runs one workload. Returns what it said, and by what code it ended."""
    started = time.monotonic()
    command = [program, "--test-threads=1", "--nocapture", "--include-ignored", "--exact", name]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LONGEST_SECONDS)
        code, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        code, said = None, late.stdout or b""
    return {"name": name, "code": code, "said": said.decode(errors="replace"), "seconds": round(time.monotonic() - started),
            "host": f"{os.environ.get('BULKHEAD_KVM_HOST', 'unknown')}, Linux {os.uname().release}, CPUs: {os.cpu_count()}"}


if __name__ == "__main__":
    for each in sys.argv[2:]:
        print(RESULT + json.dumps(run(sys.argv[1], each)), flush=True)
