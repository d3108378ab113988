# SPDX-License-Identifier: Apache-2.0
"""busy: a BestEffort pod with a container beside busy processes of a Burstable pod, on all of the node's CPUs: by a VM that
was ready, forked and booted, each beside containerd and runc. kubelet gives a BestEffort pod the least CPU weight."""
import contextlib
import os
import subprocess
import time

from bench import forks
from bench.many import Crowd

# How many processes there are for each CPU.
BUSY = 3


@contextlib.contextmanager
def busy(crowd):
    """Keeps the CPUs busy from within a Burstable pod of the same node."""
    cgroup = crowd.runtime.cgroup.child("pods").child("burstable")
    cgroup.write("cpu.weight", "20")
    loops = [subprocess.Popen(["sh", "-c", "while :; do :; done"], preexec_fn=cgroup.enter)
             for _ in range(BUSY * os.cpu_count())]
    try:
        # Until the scheduler knows them.
        time.sleep(1)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(setting):
    image = setting.image("busybox")
    with contextlib.ExitStack() as ends:
        sides = {
            "ready": setting.bulkhead(forks.READY, "spare", "10.88.0.0/24"),
            "forked": setting.bulkhead(),
            "booted": setting.bulkhead(forks.BOOTED, "booted", "10.87.0.0/24"),
            "containerd": setting.containerd(),
        }
        sides = {how: ends.enter_context(side) for how, side in sides.items()}
        for side in sides.values():
            side.pull(image)
        crowds = {how: Crowd(side, setting, image) for how, side in sides.items()}
        theirs = crowds.pop("containerd")
        for how, own in crowds.items():
            def life(crowd, lap, how=how):
                forks.until_ready(sides["ready"])
                for name, beside in ("on an idle node", contextlib.nullcontext()), ("on a busy node", busy(crowd)):
                    with beside:
                        lap(f"pod with a container {name}, {how}", lambda: crowd.start_all(crowd.in_a_row, 1))
                    crowd.end_all()

            setting.comparison.alternate((own, theirs), 3, life)
