# SPDX-License-Identifier: Apache-2.0
"""pod: makes a pod on a bridge with one container that sleeps, then stops and removes it. Compared with containerd and
runc, both through CRI, both with the image already pulled."""
from bench.sides import SLEEP


def measure(setting):
    image = setting.image("busybox")
    with setting.both() as sides:
        for side in sides:
            side.pull(image)

        def life(side, lap):
            def make():
                pod = side.pod("pod", setting.directory("logs"))
                pod.start(image, *SLEEP)
                return pod

            pod = lap("pod: sandbox and container, until it runs", make)
            lap("pod: stopped and removed", pod.end)

        setting.comparison.alternate(sides, setting.effort.pods, life)
