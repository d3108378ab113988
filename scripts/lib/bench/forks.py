# SPDX-License-Identifier: Apache-2.0
"""forks: RunPodSandbox with CNI's bridge, forked from a template, beside the same booted, and beside containerd and runc."""
import contextlib


def measure(setting):
    with contextlib.ExitStack() as ends:
        forked = ends.enter_context(setting.bulkhead())
        booted = ends.enter_context(setting.bulkhead({"sandbox": {"templates_mib": 0}}, "booted", "10.87.0.0/24"))
        theirs = ends.enter_context(setting.containerd())
        for beside, what in (booted, "booted"), (theirs, "containerd"):
            def life(side, lap, what=what):
                pod = lap(f"RunPodSandbox, forked; beside it {what}", lambda: side.pod("pod", setting.directory("logs")))
                lap(f"removed; beside it {what}", pod.end)

            setting.comparison.alternate((forked, beside), setting.effort.pods, life)
