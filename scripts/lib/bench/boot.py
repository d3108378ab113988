# SPDX-License-Identifier: Apache-2.0
"""boot: from the VMM's start until the agent is ready, and the VMM's private memory beside the guest's. Compared with
QEMU's microvm machine with the same kernel, initramfs and devices."""
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

from daemon import program

READY_PORT = 1024
MEMORY_MIB = 256
PATIENCE_SECONDS = 120
# The command, as a list of words.
QEMU = shlex.split(os.environ["BULKHEAD_BENCH_QEMU"])


def private_kib(pid):
    """Returns the private memory of a process, without the mapping that is guest RAM."""
    total, size, private = 0, 0, 0
    with open(f"/proc/{pid}/smaps") as file:
        lines = [*file, "0-0 end\n"]
    for line in lines:
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            if size < MEMORY_MIB * 1024 // 2:
                total += private
            size, private = 0, 0
        elif line.startswith("Size:"):
            size = int(line.split()[1])
        elif line.startswith("Private_"):
            private += int(line.split()[1])
    return total


class Files:
    """The files that both VMMs boot: copies on the local disk, so that both read the same pages."""

    def __init__(self, directory):
        self.directory = directory
        for name in ("vmlinux", "initramfs.cpio"):
            shutil.copyfile(program(name), self.path(name))
        for name, size in (("scratch", 1 << 30), ("empty", 1 << 20)):
            with open(self.path(name), "wb") as file:
                file.truncate(size)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", self.path("scratch")], check=True)

    def path(self, name):
        return os.path.join(self.directory, name)


class Vmm:
    """A VMM. `prepare` returns the socket to which the agent connects when it is ready, `start` starts the process."""

    def __init__(self, cgroup, files, directory):
        self.cgroup, self.files, self.directory = cgroup, files, directory

    @contextlib.contextmanager
    def booted(self, lap):
        """Boots a VM and measures that. Yields the process, which ends with the block."""
        with self.prepare() as ready:
            ready.listen(1)
            ready.settimeout(PATIENCE_SECONDS)
            process = None

            def boot():
                nonlocal process
                process = self.start()
                return ready.accept()[0]

            try:
                with lap("boot: VMM start to agent ready", boot):
                    yield process
            except OSError:
                sys.stderr.write(self.console())
                raise
            finally:
                if process:
                    process.kill()
                    process.wait()


class Ours(Vmm):
    name = "bulkhead-vmm"

    def path(self, name):
        return os.path.join(self.directory, name)

    def prepare(self):
        for name in os.listdir(self.directory):
            os.unlink(self.path(name))
        ready = socket.socket(socket.AF_UNIX)
        ready.bind(self.path(f"vsock_{READY_PORT}"))
        return ready

    def start(self):
        config = {"kernel": self.files.path("vmlinux"), "initramfs": self.files.path("initramfs.cpio"), "vcpus": 1,
                  "memory_mib": MEMORY_MIB, "console_log": self.path("console"), "control_socket": self.path("control"),
                  "exit_report": self.path("report"), "vsock": {"guest_cid": 3, "socket": self.path("vsock")},
                  "image_disk": {"extents": []}, "scratch_disk": self.files.path("scratch")}
        process = subprocess.Popen([program("bulkhead-vmm"), "run"], stdin=subprocess.PIPE, preexec_fn=self.cgroup.enter)
        process.stdin.write(json.dumps(config).encode())
        process.stdin.close()
        return process

    def console(self):
        try:
            with open(self.path("console"), errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def statistics(self):
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(self.path("control"))
            control.sendall(b'{"request": "statistics"}\n')
            return json.loads(control.makefile().readline())


class Qemu(Vmm):
    name = "qemu"

    def prepare(self):
        ready = socket.socket(socket.AF_VSOCK)
        ready.bind((socket.VMADDR_CID_ANY, READY_PORT))
        return ready

    def start(self):
        path = self.files.path
        return subprocess.Popen(
            [*QEMU, "-M", "microvm,acpi=off,x-option-roms=off,pit=off,pic=off,rtc=off", "-accel", "kvm",
             "-cpu", "host", "-smp", "1", "-m", str(MEMORY_MIB), "-nodefaults", "-no-user-config", "-display", "none",
             "-no-reboot", "-serial", "null", "-global", "virtio-mmio.force-legacy=false",
             "-kernel", path("vmlinux"), "-initrd", path("initramfs.cpio"),
             "-append", "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t 8250.nr_uarts=1 no_timer_check tsc=reliable "
                        "random.trust_cpu=on rdinit=/init",
             "-drive", f"id=image,file={path('empty')},format=raw,if=none,readonly=on",
             "-device", "virtio-blk-device,drive=image",
             "-drive", f"id=scratch,file={path('scratch')},format=raw,if=none,cache=unsafe",
             "-device", "virtio-blk-device,drive=scratch",
             "-device", "vhost-vsock-device,guest-cid=42", "-device", "virtio-rng-device",
             "-device", "virtio-balloon-device,free-page-reporting=on"],
            stdin=subprocess.DEVNULL, preexec_fn=self.cgroup.enter)

    def console(self):
        return ""


def measure(setting):
    files = Files(setting.directory("boot"))
    sides = [kind(setting.cgroup.child(kind.name), files, setting.directory("vmm")) for kind in (Ours, Qemu)]
    exits = None

    def boot(side, lap):
        nonlocal exits
        with side.booted(lap) as process:
            lap.note("VMM's private memory beside guest RAM", {"KiB": private_kib(process.pid)})
            if side is sides[0]:
                exits = side.statistics()

    setting.comparison.alternate(sides, setting.effort.boots, boot)
    print("  counted by our VMM until then:", json.dumps(exits), flush=True)
