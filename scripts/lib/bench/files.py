# SPDX-License-Identifier: Apache-2.0
"""files: fio and a loop over small files in a container, on its root file system (overlay), on an emptyDir and on a
hostPath. Each is compared with the same on the host's disk, which holds all three. A counted pass counts each program
from its start to its end.

Caches: before a read, both kernels write back, the host drops its page cache, and fio makes the guest drop the file. So
reads come from the host's disk (on an emulated host: from the memory of the machine that emulates it). Random reads
touch no block twice. Sequential writes end with an fsync, which a volatile overlay ignores. Each random write is
O_DSYNC. The guest mounts its scratch disk without barriers, so on the overlay a synced write has reached the host's
page cache, not its disk. Small files are neither synced nor evicted. The guest remembers a hostPath's attributes for a
second.
"""
import json
import os
import subprocess

POD_BYTES = 512 << 20
UID = "bench-files"
# Directories in the container.
PLACES = {"overlay": "/bench", "emptyDir": "/empty", "hostPath": "/share"}
# The loop starts no process per file. /proc/uptime counts hundredths of a second.
SMALL_FILES = """
mkdir "$1" && cd "$1" || exit 1
read -r begin _ </proc/uptime
i=0; while [ $i -lt "$2" ]; do : >$i; i=$((i+1)); done
read -r created _ </proc/uptime
i=0; while [ $i -lt "$2" ]; do [ -f $i ] || exit 1; i=$((i+1)); done
read -r seen _ </proc/uptime
/bin/busybox rm -f -- *
read -r gone _ </proc/uptime
rmdir "$1"
echo "$begin $created $seen $gone"
"""


class Place:
    """A directory, and a way to run commands where it is. To a comparison it is a side, so it has a cgroup."""

    def __init__(self, cgroup, run, directory):
        self.cgroup, self.run, self.directory = cgroup, run, directory

    def fio(self, job, file_mib, *options):
        answer = self.run("fio", f"--name={job}", f"--filename={self.directory}/file", f"--size={file_mib}M",
                          "--ioengine=psync", "--thread", "--fallocate=none", "--output-format=json", f"--rw={job}",
                          *options)
        # There may be warnings before the JSON.
        result = json.loads(answer[answer.index("{"):])["jobs"][0]
        if result["error"]:
            raise SystemExit(f"fio {job} in {self.directory}: error {result['error']}")
        return result["read" if "read" in job else "write"]

    def sequential(self, job, effort, *options):
        return {"MiB/s": self.fio(job, effort.file_mib, "--bs=1M", *options)["bw_bytes"] / 2**20}

    def random(self, job, effort, *options):
        result = self.fio(job, effort.file_mib, "--bs=4k", f"--number_ios={effort.random_requests}", *options)
        return {"IOPS": result["iops"], "us, mean": result["clat_ns"]["mean"] / 1e3,
                "us, 99 %": result["clat_ns"]["percentile"]["99.000000"] / 1e3}

    def small_files(self, count):
        words = self.run("/bin/busybox", "sh", "-c", SMALL_FILES, "sh", f"{self.directory}/small", str(count)).split()
        times = [float(word) * 1000 for word in words]
        parts = {f"ms, {name}": end - begin for name, begin, end in zip(("create", "stat", "unlink"), times, times[1:])}
        return {**parts, "ms, all": times[-1] - times[0]}


def on_host(cgroup):
    return lambda *command: subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                                           preexec_fn=cgroup.enter).stdout


def forget(pod, container):
    """Writes everything back and drops the host's page cache. The guest's `sync` covers all of its file systems, so
    also the disk below a volatile overlay, which itself ignores syncs."""
    pod.run(container, "sync")
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


def start(setting, ours, roots):
    """Starts a pod with a container that has an emptyDir and a hostPath."""
    image, share = setting.image("fio"), setting.directory("share")
    empty = f"{roots}/pods/{UID}/volumes/kubernetes.io~empty-dir/scratch"
    os.makedirs(empty)
    for directory in (empty, share):
        os.chmod(directory, 0o777)
    ours.pull(image)
    pod = ours.pod(UID, setting.directory("logs"), linux={"resources": {"memory_limit_in_bytes": POD_BYTES}})
    mounts = [{"host_path": empty, "container_path": PLACES["emptyDir"]},
              {"host_path": share, "container_path": PLACES["hostPath"]}]
    return pod, pod.start(image, "sleep", "100000", mounts=mounts)


def measure(setting):
    effort, roots = setting.effort, setting.directory("kubelet")
    host = setting.cgroup.child("host")
    with setting.bulkhead({"volumes": {"kubelet_roots": [roots]}}) as ours:
        pod, container = start(setting, ours, roots)
        on_disk = Place(host, on_host(host), setting.directory("disk"))

        for name, directory in PLACES.items():
            in_pod = Place(ours.cgroup, lambda *command: pod.run(container, *command), directory)

            def once(place, lap):
                def job(title, action, *arguments):
                    forget(pod, container)
                    amount = (effort.file_mib, "MiB") if "sequential" in title else (effort.random_requests, "request")
                    lap.told(f"{name}: {title}", lambda: action(*arguments), *amount)

                job("sequential write", place.sequential, "write", effort, "--end_fsync=1")
                job("sequential read", place.sequential, "read", effort)
                job("random read", place.random, "randread", effort)
                job("random write", place.random, "randwrite", effort, "--sync=dsync")
                place.run("rm", f"{place.directory}/file")
                lap.told(f"{name}: small files", lambda: place.small_files(effort.small_files), effort.small_files, "file")

            setting.comparison.alternate([in_pod, on_disk], effort.file_rounds, once, warm_up=False)
        pod.end()
