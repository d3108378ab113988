# SPDX-License-Identifier: Apache-2.0
"""checkpoint: a pod of 256 MiB, a quarter of which its process has filled, is saved, and brought back until its process goes
on. Beside it, the same pod is made anew until its process has done the same."""
import os
import shutil

from background import wait_until

MIB = 1 << 20
# Most of what /dev/shm may have.
FILLED_BYTES = 60 * MIB
# Fills memory with what cannot be left out, then writes a line now and then.
SCRIPT = f"head -c {FILLED_BYTES} /dev/urandom >/dev/shm/filled || exit 1; while true; do echo goes on; sleep 0.05; done"
LIMIT = {"memory_limit_in_bytes": 256 * MIB}


def measure(setting):
    image = setting.image("busybox")
    with setting.bulkhead() as saved, setting.bulkhead({}, "anew", "10.87.0.0/24") as anew:
        for side in saved, anew:
            side.pull(image)
        original = made(setting, saved, image)
        kept = setting.directory("checkpoint")
        ids = [one.id for one in saved.cri.call("ListContainers").containers]

        def life(side, lap):
            if side is anew:
                pod = lap("pod until its process goes on", lambda: made(setting, side, image))
                return pod.end()
            shutil.rmtree(kept)
            os.mkdir(kept, 0o700)
            lap("CheckpointPod", lambda: side.cri.call(
                "CheckpointPod", pod_sandbox_id=original.id, output_path=kept, container_ids=ids))
            lap.note("checkpoint on disk", {"MiB": sum(file.stat().st_blocks for file in os.scandir(kept)) * 512 / MIB})
            pod = lap("pod until its process goes on", lambda: brought_back(setting, side, kept, original))
            side.cri.call("RemovePodSandbox", pod_sandbox_id=pod)

        setting.comparison.alternate((saved, anew), setting.effort.pods, life)
        original.end()


def made(setting, side, image, **config):
    """Makes a pod, and waits until its process has filled its memory. `config` has further fields of its configuration."""
    logs = setting.directory("logs")
    pod = side.pod(os.path.basename(logs), logs, **config)
    pod.start(image, "sh", "-c", SCRIPT, linux={"security_context": pod.security, "resources": LIMIT})
    wait_until(lambda: has_written(pod.log()), "the first line of a process")
    return pod


def brought_back(setting, side, kept, original):
    """Brings the pod back, and waits until its process has written a line. Returns its id."""
    logs = setting.directory("logs")
    config = {"metadata": {"name": "copy", "uid": logs, "namespace": "bench"}, "log_directory": logs,
              "linux": {"cgroup_parent": original.sandbox["linux"]["cgroup_parent"]}}
    restored = side.cri.call("RestorePod", checkpoint_path=kept, config=config, options={"settings": "checkpoint"})
    for container in restored.restored_containers:
        side.cri.call("StartContainer", container_id=container.container_id)
    wait_until(lambda: has_written(f"{logs}/{os.path.basename(original.log())}"), "a line of the process")
    return restored.pod_sandbox_id


def has_written(log):
    return os.path.exists(log) and os.path.getsize(log) > 0
