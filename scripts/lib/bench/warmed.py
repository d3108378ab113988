# SPDX-License-Identifier: Apache-2.0
"""warmed: a pod whose process first fills 60 MiB, which takes long, begins as one that was saved when it had done so. Beside
it, the same pod is made anew. Both until the process goes on."""
import json
import os

from bench.checkpoint import made

ANNOTATION = {"bulkhead.dev/warmed": "filled"}


def measure(setting):
    image, directory = setting.image("busybox"), setting.directory("warmed")
    with setting.bulkhead({"sandbox": {"warmed": directory}}) as warmed, \
            setting.bulkhead({}, "anew", "10.87.0.0/24") as anew:
        for side in warmed, anew:
            side.pull(image)
        save(setting, warmed, image, f"{directory}/bench/filled")

        def life(side, lap):
            named = ANNOTATION if side is warmed else {}
            lap("pod until its process goes on", lambda: made(setting, side, image, annotations=named)).end()

        setting.comparison.alternate((warmed, anew), setting.effort.boots, life)
        counts = json.loads(warmed.cri.call("Status", verbose=True).info["config"])["warmed"]
        if counts["coldPods"] or counts["coldContainers"] or not counts["containers"]:
            raise SystemExit(f"what was to begin warmed did not: {counts}")


def save(setting, side, image, directory):
    """Makes a pod, and saves it as the warmed one in `directory`."""
    pod = made(setting, side, image)
    os.makedirs(directory, 0o700)
    ids = [one.id for one in side.cri.call("ListContainers").containers]
    side.cri.call("CheckpointPod", pod_sandbox_id=pod.id, output_path=directory, container_ids=ids)
    pod.end()
