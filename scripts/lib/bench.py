"""The benchmarks, run on a KVM host by scripts/bench.

boot   VMM start to agent ready, VM exits until then, and the VMM's private memory beside guest RAM;
       against QEMU's microvm machine with the same kernel, initramfs and devices.
pull   a 200 MB image of 6 layers until it can be run, and the daemon's peak memory; against containerd.
"""
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

PROGRAMS = os.environ["BULKHEAD_PROGRAMS"]
PROJECT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
READY_PORT = 1024
MEMORY_MIB = 256
BOOTS = 7
PULLS = 3


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
        control.sendall(b'"statistics"\n')
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
        ["qemu-system-x86_64", "-M", "microvm,x-option-roms=off,pit=off,pic=off,isa-serial=on,rtc=off", "-accel", "kvm",
         "-cpu", "host", "-smp", "1", "-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-display", "none",
         "-no-reboot", "-serial", "null", "-kernel", work.path("vmlinux"), "-initrd", work.path("initramfs.cpio"),
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


def start_registry(work):
    port = free_port()
    config = work.path("registry.yml")
    with open(config, "w") as file:
        file.write(f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nstorage:\n  filesystem: "
                   f"{{rootdirectory: {work.path('registry')}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n")
    child = subprocess.Popen(["docker-registry", "serve", config], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    wait_until(lambda: can_connect(port), "docker-registry")
    return child, f"127.0.0.1:{port}"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def can_connect(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition, what):
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"{what} did not come up in a minute")
        time.sleep(0.05)


def peak_mib(pid):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0


def pull_ours(work, registry, image):
    state = tempfile.mkdtemp(dir=work.name)
    config = os.path.join(state, "config.toml")
    with open(config, "w") as file:
        file.write(f'socket = "{state}/run/s.sock"\nstate_dir = "{state}/state"\nrun_dir = "{state}/run"\n'
                   f'[registries."{registry}"]\nplain_http = true\n')
    daemon = subprocess.Popen([program("bulkhead"), "serve", "--config", config], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: os.path.exists(f"{state}/run/s.sock"), "bulkhead serve")
        started = time.monotonic()
        subprocess.run([program("bulkhead"), "--socket", f"{state}/run/s.sock", "pull", image], check=True,
                       stdout=subprocess.DEVNULL)
        return time.monotonic() - started, peak_mib(daemon.pid)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()
        shutil.rmtree(state)


def pull_containerd(work, image):
    state = tempfile.mkdtemp(dir=work.name)
    config = os.path.join(state, "config.toml")
    with open(config, "w") as file:
        file.write(f'version = 2\nroot = "{state}/root"\nstate = "{state}/state"\n'
                   f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "{state}/c.sock"\n')
    daemon = subprocess.Popen(["containerd", "--config", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: os.path.exists(f"{state}/c.sock"), "containerd")
        time.sleep(1)
        started = time.monotonic()
        subprocess.run(["ctr", "--address", f"{state}/c.sock", "images", "pull", "--plain-http", image], check=True,
                       stdout=subprocess.DEVNULL)
        return time.monotonic() - started, peak_mib(daemon.pid)
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait()
        shutil.rmtree(state, ignore_errors=True)


def bench_pull():
    with Work() as work:
        child, registry = start_registry(work)
        try:
            subprocess.run([sys.executable, f"{PROJECT}/tests/images/make_images.py", "--registry",
                            f"http://{registry}", "--only", "bench"], check=True)
            image = f"{registry}/bench/six-layers:latest"
            ours, theirs = [], []
            for _ in range(PULLS):
                ours.append(pull_ours(work, registry, image))
                theirs.append(pull_containerd(work, image))
            report("pull: 200 MB in 6 layers, median", statistics.median(t for t, _ in ours) * 1000,
                   statistics.median(t for t, _ in theirs) * 1000, "ms")
            report("pull: peak memory of the daemon", max(m for _, m in ours), max(m for _, m in theirs), "MiB")
        finally:
            child.kill()
            child.wait()


BENCHMARKS = {"boot": bench_boot, "pull": bench_pull}


def main():
    names = sys.argv[1:] or list(BENCHMARKS)
    print(f"{'name':<44} {'ours':>10} {'theirs':>10} {'':<6} ratio")
    for name in names:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
