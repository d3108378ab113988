# SPDX-License-Identifier: Apache-2.0
"""containers: a command in a running container, and the life of a container. Compared with containerd and runc. Both
sides are used through CRI, each with a pod on a bridge."""
import os
import signal

from background import wait_until
from bench.sides import SLEEP

HANDLED = 7
HANDLER = f'trap "exit {HANDLED}" TERM; echo ready; sleep 1000 & wait'


def measure(setting):
    image, effort = setting.image("busybox"), setting.effort
    with setting.pods(image) as pods:
        sleepers = {pod: pod.start(image, *SLEEP) for pod in pods}

        def command(pod, lap):
            lap("exec: ExecSync of true", lambda: pod.run(sleepers[pod], "true"))

        def killed(pod, lap):
            container = lap("container: create and start", lambda: pod.start(image, *SLEEP))
            lap("container: stop, grace 0", lambda: pod.stop(container, 0))
            pod.require_exit(container, 128 + signal.SIGKILL)
            lap("container: remove", lambda: pod.remove(container))

        def terminated(pod, lap):
            container = pod.start(image, "sh", "-c", HANDLER)
            # The script prints its line once the handler is set.
            wait_until(lambda: os.path.exists(pod.log()) and os.path.getsize(pod.log()), "the handler of TERM")
            lap("container: stop, handler of TERM", lambda: pod.stop(container, 30))
            pod.require_exit(container, HANDLED)
            pod.remove(container)

        setting.comparison.alternate(pods, effort.commands, command)
        setting.comparison.alternate(pods, effort.containers, killed)
        setting.comparison.alternate(pods, effort.containers, terminated)
