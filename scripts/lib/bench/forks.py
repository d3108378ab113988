# SPDX-License-Identifier: Apache-2.0
"""forks: RunPodSandbox with CNI's bridge: by a VM that was ready (sandbox.spares), and forked from a template, beside the
same booted, and beside containerd and runc. A pod is made when all spares are there again."""
import contextlib
import json

from background import wait_until

SPARES = 2
# Configurations of a daemon.
READY = {"sandbox": {"spares": SPARES}, "cni": {"in_advance": True}}
BOOTED = {"sandbox": {"templates_mib": 0}}


def until_ready(side):
    """Waits until a daemon has all spares."""
    def are_ready():
        config = side.cri.call("Status", verbose=True).info["config"]
        return json.loads(config)["spares"]["ready"] == SPARES

    wait_until(are_ready, "all spares are ready", every=0.2)


def measure(setting):
    with contextlib.ExitStack() as ends:
        spare = ends.enter_context(setting.bulkhead(READY, "spare", "10.88.0.0/24"))
        forked = ends.enter_context(setting.bulkhead())
        booted = ends.enter_context(setting.bulkhead(BOOTED, "booted", "10.87.0.0/24"))
        theirs = ends.enter_context(setting.containerd())
        for own, how in (spare, "ready"), (forked, "forked"):
            for beside, what in (booted, "booted"), (theirs, "containerd"):
                def life(side, lap, how=how, what=what):
                    until_ready(spare)
                    pod = lap(f"RunPodSandbox, {how}; beside it {what}", lambda: side.pod("pod", setting.directory("logs")))
                    lap(f"removed, was {how}; beside it {what}", pod.end)

                setting.comparison.alternate((own, beside), setting.effort.pods, life)
