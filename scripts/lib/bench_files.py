"""The file benchmark of bench.py: fio and a loop over small files in a container, on its root file system (overlay), on
an emptyDir and on a hostPath; each against the same on the host's disk that holds all three.

What is cached: before a read, both kernels write back and the host forgets everything; fio makes the guest forget the
file. So reads come from the host's disk (on an emulated host: from the memory of the machine that emulates it). Random
reads touch no block twice. Sequential writes end with an fsync, which a volatile overlay ignores; each random write is
O_DSYNC. The guest mounts its scratch disk without barriers, so on overlay and emptyDir a synced write has reached the
host's page cache, not its disk. Small files are neither synced nor evicted; the guest remembers a hostPath's
attributes for a second.
"""
import importlib
import json
import os
import subprocess
import sys

ROUNDS = 2  # of a minute each on an emulated host
FILE_MIB = 128
RANDOM = 2000
SMALL = 2000
POD_BYTES = 512 << 20
UID = "bench-files"
# In the container.
PLACES = {"overlay": "/bench", "emptyDir": "/empty", "hostPath": "/share"}
JOBS = {
    "write": ["--rw=write", "--bs=1M", "--end_fsync=1"],
    "read": ["--rw=read", "--bs=1M"],
    "randread": ["--rw=randread", "--bs=4k", f"--number_ios={RANDOM}"],
    "randwrite": ["--rw=randwrite", "--bs=4k", f"--number_ios={RANDOM}", "--sync=dsync"],
}
# Without a process per file; /proc/uptime counts in hundredths of a second.
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


def kubelet_root(work):
    return work.path("kubelet")


def config(work):
    """The lines of the daemon's configuration that make a directory of ours kubelet's."""
    os.makedirs(kubelet_root(work))
    return f'[volumes]\nkubelet_roots = ["{kubelet_root(work)}"]\n'


class Cri:
    """The runtime service of a daemon; its messages are compiled when they are needed."""

    def __init__(self, socket, project, directory):
        import grpc  # Debian's, which not every python3 has: no other benchmark should need it
        subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{project}/proto/proto",
                        f"--python_out={directory}", "cri.proto"], check=True)
        sys.path.insert(0, directory)
        self.messages = importlib.import_module("cri_pb2")
        self.channel = grpc.insecure_channel(f"unix:{socket}")

    def call(self, name, **fields):
        answer = getattr(self.messages, f"{name}Response").FromString
        method = self.channel.unary_unary(f"/runtime.v1.RuntimeService/{name}", lambda one: one.SerializeToString(),
                                          answer)
        return method(getattr(self.messages, f"{name}Request")(**fields), timeout=300)


class Pod:
    """A pod with one container that has an emptyDir and a hostPath."""

    def __init__(self, cri, work, image):
        self.cri = cri
        empty = f"{kubelet_root(work)}/pods/{UID}/volumes/kubernetes.io~empty-dir/scratch"
        share = work.path("share")
        for directory in (empty, share):
            os.makedirs(directory)
            os.chmod(directory, 0o777)
        sandbox = {"metadata": {"name": "files", "uid": UID, "namespace": "bench"},
                   "linux": {"resources": {"memory_limit_in_bytes": POD_BYTES}}}
        self.id = cri.call("RunPodSandbox", config=sandbox).pod_sandbox_id
        mounts = [{"host_path": empty, "container_path": PLACES["emptyDir"]},
                  {"host_path": share, "container_path": PLACES["hostPath"]}]
        container = {"metadata": {"name": "fio"}, "image": {"image": image}, "command": ["sleep", "10000"],
                     "mounts": mounts}
        self.container = cri.call("CreateContainer", pod_sandbox_id=self.id, config=container,
                                  sandbox_config=sandbox).container_id
        cri.call("StartContainer", container_id=self.container)

    def run(self, command):
        answer = self.cri.call("ExecSync", container_id=self.container, cmd=command, timeout=240)
        if answer.exit_code:
            raise SystemExit(f"{command} in the pod: {answer.exit_code}: {answer.stderr.decode()}")
        return answer.stdout.decode()

    def close(self):
        self.cri.call("StopPodSandbox", pod_sandbox_id=self.id)
        self.cri.call("RemovePodSandbox", pod_sandbox_id=self.id)


def on_host(command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def forget(pod):
    """Writes back, also what a volatile overlay would keep (sync is for all file systems of a kernel), and drops."""
    pod.run(["sync"])
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")


def fio(run, directory, job):
    answer = run(["fio", f"--name={job}", f"--filename={directory}/file", f"--size={FILE_MIB}M", "--ioengine=psync",
                  "--thread", "--fallocate=none", "--output-format=json", *JOBS[job]])
    # Warnings come before.
    result = json.loads(answer[answer.index("{"):])["jobs"][0]
    if result["error"]:
        raise SystemExit(f"fio {job} in {directory}: error {result['error']}")
    return result["read" if "read" in job else "write"]


def once(pod, run, directory):
    """Everything in one place, as {name: (figure, unit)}."""
    figures = {}
    for job in ("write", "read"):
        forget(pod)
        figures[f"sequential {job}"] = fio(run, directory, job)["bw_bytes"] / 2**20, "MiB/s"
    for job in ("randread", "randwrite"):
        forget(pod)
        result = fio(run, directory, job)
        name = job.replace("rand", "random ")
        figures[name] = result["iops"], "IOPS"
        figures[f"{name}, mean"] = result["clat_ns"]["mean"] / 1e3, "us"
        figures[f"{name}, 99 %"] = result["clat_ns"]["percentile"]["99.000000"] / 1e3, "us"
    run(["rm", f"{directory}/file"])
    times = [float(word) for word in
             run(["/bin/busybox", "sh", "-c", SMALL_FILES, "sh", f"{directory}/small", str(SMALL)]).split()]
    for name, begin, end in zip(("create", "stat", "unlink"), times, times[1:]):
        figures[f"{name} {SMALL} files"] = (end - begin) * 1000, "ms"
    figures[f"all of {SMALL} small files"] = (times[-1] - times[0]) * 1000, "ms"
    return figures


def measure(cri, work, image, report, mean):
    host = work.path("host")
    os.makedirs(host)
    pod = Pod(cri, work, image)
    try:
        rounds = []
        for _ in range(ROUNDS):
            one = {place: once(pod, pod.run, directory) for place, directory in PLACES.items()}
            rounds.append({**one, "host": once(pod, on_host, host)})
        for place in PLACES:
            for name, (_, unit) in rounds[0][place].items():
                ours, theirs = (mean(one[where][name][0] for one in rounds) for where in (place, "host"))
                report(f"{place}: {name}", ours, theirs, unit)
    finally:
        pod.close()
