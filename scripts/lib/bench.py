"""The benchmarks, run on a KVM host by scripts/bench.

boot   VMM start to agent ready, VM exits until then, and the VMM's private memory beside guest RAM;
       against QEMU's microvm machine with the same kernel, initramfs and devices.
pod    a pod with one container that ends at once, from nothing to nothing; and a command in a running container;
       against containerd with runc, both without a network, both with the image at hand.
net    iperf3 between host and pod, both ways; against a veth on the same bridge.
files  fio and small files on a container's root, an emptyDir and a hostPath; against the host's disk below them.
streaming
       commands, containers and streams, each through the CRI socket: times, throughput, system calls, VM exits;
       against containerd with runc. BULKHEAD_BENCH_STREAM_MIB (32) goes through a stream; on hardware, take 1024.
many   25 and 50 pods at once, and one after the other (BULKHEAD_BENCH_PODS="25 50"); against containerd with runc.
pull   a 200 MB image of 6 layers until it can be run, and the daemon's peak memory; against containerd.
"""
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import bench_files
import bench_many
import bench_network
import bench_streaming
from registry import Registry, wait_until

PROGRAMS = os.environ["BULKHEAD_PROGRAMS"]
PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
READY_PORT = 1024
MEMORY_MIB = 256
BOOTS = 7
PULLS = 3
PODS = 7
EXECS = 15


def report(name, ours, theirs, unit):
    ratio = f"{ours / theirs:.2f}" if theirs else "-"
    shown = f"{theirs:.1f}" if theirs else "-"
    print(f"{name:<44} {ours:>10.1f} {shown:>10} {unit:<6} {ratio}", flush=True)


def program(name):
    return os.path.join(PROGRAMS, name)


class Work(tempfile.TemporaryDirectory):
    def __init__(self):
        super().__init__(prefix="bench-", dir="/var/lib/bulkhead" if os.path.isdir("/var/lib/bulkhead") else None)

    def __enter__(self):
        return self

    def path(self, name):
        return os.path.join(self.name, name)


def scratch_disk(path):
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", path], check=True)


def local_copies(work):
    """The kernel and the initramfs from the local disk: both contenders read the same pages."""
    for name in ("vmlinux", "initramfs.cpio"):
        shutil.copyfile(program(name), work.path(name))


def private_kib(pid, guest_bytes):
    """Private memory of a process without the mapping that is guest RAM."""
    total, size, private = 0, 0, 0
    for line in [*open(f"/proc/{pid}/smaps"), "0-0 end\n"]:
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            if size < guest_bytes // 4096 * 4 // 8:
                total += private
            size, private = 0, 0
        elif line.startswith("Size:"):
            size = int(line.split()[1])
        elif line.startswith("Private_"):
            private += int(line.split()[1])
    return total


def boot_ours(work):
    directory = tempfile.mkdtemp(dir=work.name)
    def path(name):
        return os.path.join(directory, name)
    ready = socket.socket(socket.AF_UNIX)
    ready.bind(path(f"vsock_{READY_PORT}"))
    ready.listen(1)
    ready.settimeout(60)
    config = {"kernel": work.path("vmlinux"), "initramfs": work.path("initramfs.cpio"), "vcpus": 1,
              "memory_mib": MEMORY_MIB, "console_log": path("console"), "control_socket": path("control"),
              "exit_report": path("report"), "vsock": {"guest_cid": 3, "socket": path("vsock")},
              "image_disk": {"extents": []}, "scratch_disk": work.path("scratch")}
    started = time.monotonic()
    vmm = subprocess.Popen([program("bulkhead-vmm"), "run"], stdin=subprocess.PIPE)
    try:
        vmm.stdin.write(json.dumps(config).encode())
        vmm.stdin.close()
        connection, _ = ready.accept()
        took = time.monotonic() - started
        control = socket.socket(socket.AF_UNIX)
        control.connect(path("control"))
        control.sendall(b'{"request": "statistics"}\n')
        answer = json.loads(control.makefile().readline())
        kib = private_kib(vmm.pid, MEMORY_MIB << 20)
        connection.close()
    except OSError:
        sys.stderr.write(open(path("console"), errors="replace").read() if os.path.exists(path("console")) else "")
        raise
    finally:
        vmm.kill()
        vmm.wait()
    return took, answer, kib


def boot_qemu(work):
    ready = socket.socket(socket.AF_VSOCK)
    ready.bind((socket.VMADDR_CID_ANY, READY_PORT))
    ready.listen(1)
    ready.settimeout(120)
    started = time.monotonic()
    qemu = subprocess.Popen(
        ["qemu-system-x86_64", "-M", "microvm,acpi=off,x-option-roms=off,pit=off,pic=off,rtc=off", "-accel", "kvm",
         "-cpu", "host", "-smp", "1", "-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-display", "none",
         "-no-reboot", "-serial", "null", "-global", "virtio-mmio.force-legacy=false",
         "-kernel", work.path("vmlinux"), "-initrd", work.path("initramfs.cpio"),
         "-append", "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t 8250.nr_uarts=1 no_timer_check tsc=reliable "
                    "random.trust_cpu=on rdinit=/init",
         "-drive", f"id=image,file={work.path('empty')},format=raw,if=none,readonly=on",
         "-device", "virtio-blk-device,drive=image",
         "-drive", f"id=scratch,file={work.path('scratch')},format=raw,if=none,cache=unsafe",
         "-device", "virtio-blk-device,drive=scratch",
         "-device", "vhost-vsock-device,guest-cid=42", "-device", "virtio-rng-device",
         "-device", "virtio-balloon-device,free-page-reporting=on"],
        stdin=subprocess.DEVNULL)
    try:
        connection, _ = ready.accept()
        took = time.monotonic() - started
        kib = private_kib(qemu.pid, MEMORY_MIB << 20)
        connection.close()
    finally:
        qemu.kill()
        qemu.wait()
        ready.close()
    return took, kib


def bench_boot():
    with Work() as work:
        local_copies(work)
        scratch_disk(work.path("scratch"))
        with open(work.path("empty"), "wb") as file:
            file.truncate(1 << 20)
        ours, theirs, our_kib, their_kib, exits = [], [], [], [], []
        for _ in range(BOOTS):  # alternating, so that both see the same noise
            took, answer, kib = boot_ours(work)
            ours.append(took * 1000)
            our_kib.append(kib)
            exits.append(answer)
            took, kib = boot_qemu(work)
            theirs.append(took * 1000)
            their_kib.append(kib)
        report("boot: VMM start to agent ready, median", statistics.median(ours), statistics.median(theirs), "ms")
        report("boot: the fastest", min(ours), min(theirs), "ms")
        report("VMM private memory beside guest RAM", statistics.median(our_kib), statistics.median(their_kib), "KiB")
        print("exits until ready:", json.dumps(exits[-1]))


def peak_mib(pid):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0


class Ours:
    """bulkhead serve with directories of its own."""

    def __init__(self, work, registry, more=""):
        self.state = tempfile.mkdtemp(dir=work.name)
        self.socket = f"{self.state}/run/s.sock"
        config = os.path.join(self.state, "config.toml")
        with open(config, "w") as file:
            file.write(f'socket = "{self.socket}"\nstate_dir = "{self.state}/state"\nrun_dir = "{self.state}/run"\n'
                       f'cgroup_parent = "bench"\n[cni]\nconf_dir = "{self.state}/cni"\n'
                       f'[registries."{registry}"]\nplain_http = true\n{more}')
        self.daemon = subprocess.Popen([program("bulkhead"), "serve", "--config", config], stderr=subprocess.DEVNULL)
        wait_until(lambda: os.path.exists(self.socket), "bulkhead serve")

    def command(self, *arguments):
        return [program("bulkhead"), "--socket", self.socket, *arguments]

    def pull(self, image):
        run(self.command("pull", image))

    def pod(self, image):
        run(self.command("run", image, "true"))

    def start(self, image, *words):
        command = self.command("run", image, *(words or ("sleep", "1000")))
        self.background = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        def running():
            rows = subprocess.run(self.command("ps"), check=True, capture_output=True, text=True).stdout.splitlines()
            self.container = next((row.split()[3] for row in rows if "Running" in row), None)
            return self.container
        wait_until(running, "the container")

    def execute(self):
        run(self.command("exec", self.container, "true"))

    def stop(self):
        self.background.terminate()
        self.background.wait()

    def close(self):
        self.daemon.terminate()
        self.daemon.wait()
        shutil.rmtree(self.state)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Containerd:
    """containerd with runc and directories of its own, without its CRI plugin."""

    def __init__(self, work):
        self.state = tempfile.mkdtemp(dir=work.name)
        config = os.path.join(self.state, "config.toml")
        with open(config, "w") as file:
            file.write(f'version = 2\nroot = "{self.state}/root"\nstate = "{self.state}/state"\n'
                       f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "{self.state}/c.sock"\n')
        self.daemon = subprocess.Popen(["containerd", "--config", config], stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
        ready = self.command("version")
        wait_until(lambda: subprocess.run(ready, capture_output=True).returncode == 0, "containerd")
        self.count = 0

    def command(self, *arguments):
        return ["ctr", "--address", f"{self.state}/c.sock", *arguments]

    def pull(self, image):
        run(self.command("images", "pull", "--plain-http", image))

    def pod(self, image):
        self.count += 1
        run(self.command("run", "--rm", image, f"bench-{self.count}", "true"))

    def start(self, image):
        run(self.command("run", "--detach", image, "bench-long", "sleep", "1000"))

    def execute(self):
        self.count += 1
        run(self.command("task", "exec", "--exec-id", f"exec-{self.count}", "bench-long", "true"))

    def stop(self):
        run(self.command("task", "kill", "--signal", "SIGKILL", "bench-long"))
        time.sleep(1)
        run(self.command("container", "rm", "bench-long"))

    def close(self):
        self.daemon.terminate()
        self.daemon.wait()
        shutil.rmtree(self.state, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def run(command):
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def timed(action, *arguments):
    started = time.monotonic()
    action(*arguments)
    return (time.monotonic() - started) * 1000


def side_by_side(name, ours, theirs, times):
    """Alternates, so that both see the same noise."""
    pairs = [(timed(ours), timed(theirs)) for _ in range(times)]
    report(f"{name}, median", statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), "ms")


def bench_pod():
    with Work() as work, Registry(work.name) as registry, Ours(work, registry) as ours, Containerd(work) as theirs:
        push_images(registry, "busybox")
        image = f"{registry}/test/busybox:latest"
        for contender in (ours, theirs):
            contender.pull(image)
            contender.pod(image)
        side_by_side("pod: run, end, remove", lambda: ours.pod(image), lambda: theirs.pod(image), PODS)
        for contender in (ours, theirs):
            contender.start(image)
            contender.execute()
        side_by_side("exec in a running container", ours.execute, theirs.execute, EXECS)
        for contender in (ours, theirs):
            contender.stop()


def bench_net():
    with Work() as work, Registry(work.name) as registry, Ours(work, registry) as ours:
        push_images(registry, "iperf3")
        bench_network.configure(ours.state)
        image = f"{registry}/bench/iperf3:latest"
        ours.pull(image)
        ours.start(image, "iperf3", "-s")
        bench_network.measure(ours, report, statistics.median)
        ours.stop()


def bench_file_systems():
    with Work() as work, Registry(work.name) as registry, Ours(work, registry, bench_files.config(work)) as ours:
        push_images(registry, "fio")
        image = f"{registry}/bench/fio:latest"
        ours.pull(image)
        cri = bench_files.Cri(ours.socket, PROJECT, work.name)
        bench_files.measure(cri, work, image, report, statistics.mean)


def bench_streams():
    with Work() as work, Registry(work.name) as registry, Ours(work, registry) as ours:
        push_images(registry, "busybox")
        bench_streaming.measure(ours, work, registry, PROJECT, f"{registry}/test/busybox:latest", report)


def bench_many_pods():
    with Work() as work, Registry(work.name) as registry, Ours(work, registry) as ours:
        push_images(registry, "busybox")
        bench_many.measure(ours, work, registry, PROJECT, f"{registry}/test/busybox:latest", report)


def bench_pull():
    with Work() as work, Registry(work.name) as registry:
        push_images(registry, "bench")
        image = f"{registry}/bench/six-layers:latest"
        times, peaks = [], []
        for _ in range(PULLS):
            with Ours(work, registry) as ours, Containerd(work) as theirs:
                times.append([timed(contender.pull, image) for contender in (ours, theirs)])
                peaks.append([peak_mib(contender.daemon.pid) for contender in (ours, theirs)])
        report("pull: 200 MB in 6 layers, median", *map(statistics.median, zip(*times)), "ms")
        report("pull: peak memory of the daemon", *map(max, zip(*peaks)), "MiB")


def push_images(registry, name):
    run([sys.executable, f"{PROJECT}/tests/images/make_images.py", "--registry", f"http://{registry}", "--only", name])


BENCHMARKS = {"boot": bench_boot, "pod": bench_pod, "net": bench_net, "files": bench_file_systems,
              "streaming": bench_streams, "many": bench_many_pods, "pull": bench_pull}


def main():
    names = sys.argv[1:] or list(BENCHMARKS)
    print(f"{'name':<44} {'ours':>10} {'theirs':>10} {'':<6} ratio")
    for name in names:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
