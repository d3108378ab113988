# SPDX-License-Identifier: Apache-2.0
"""boot: from the VMM's start until the agent is ready, and the VMM's private memory beside the guest's. Compared with
QEMU's microvm machine with the same kernel, initramfs and devices."""
import contextlib
import fcntl
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys

from daemon import program

READY_PORT = 1024
FIRST_DESCRIPTOR = 3
# A user that nobody else is.
USER = 1879048192
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
        for name in ("vmlinux", "initramfs.cpio", "modules.erofs"):
            shutil.copyfile(program(name), self.path(name))
        for name, size in (("scratch", 1 << 30), ("empty", 1 << 20)):
            with open(self.path(name), "wb") as file:
                file.truncate(size)
        subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", self.path("scratch")], check=True)

    def path(self, name):
        return os.path.join(self.directory, name)


class Vmm:
    """A VMM. `prepare` returns a socket, `wait` waits at it until the agent is ready and returns
    the agent's connection, `start` starts the process."""

    def __init__(self, cgroup, files, directory):
        self.cgroup, self.files, self.directory = cgroup, files, directory

    @contextlib.contextmanager
    def booted(self, lap):
        """Boots a VM and measures that. Yields the process, which ends with the block."""
        with self.prepare() as ready:
            ready.settimeout(PATIENCE_SECONDS)
            process = None

            def boot():
                nonlocal process
                process = self.start()
                return self.wait(ready)

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


class Jailed:
    """The process of our VMM, which is no child of this one: the program that was started has told its number."""

    def __init__(self, program):
        self.pid = int(program.stdout.read())
        program.wait()
        self.descriptor = os.pidfd_open(self.pid)

    def kill(self):
        signal.pidfd_send_signal(self.descriptor, signal.SIGKILL)

    def wait(self):
        select.select([self.descriptor], [], [])
        os.close(self.descriptor)


class Ours(Vmm):
    name = "bulkhead-vmm"

    def path(self, name):
        return os.path.join(self.directory, name)

    def prepare(self):
        for name in os.listdir(self.directory):
            os.unlink(self.path(name))
        ready, self.theirs = socket.socketpair()
        return ready

    def wait(self, ready):
        ready.recv(1)
        # The connection was there from the start.
        return contextlib.nullcontext()

    def open_all(self):
        """Opens what the VMM gets, in the order of its numbers (runtime/vmm/src/inherited.rs)."""
        def new(name):
            return open(self.path(name), "wb", buffering=0)

        def listening(name):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self.path(name))
            listener.listen()
            return listener

        def existing(path, mode):
            return open(path, mode, buffering=0)

        return [new("report"), existing("/dev/kvm", "r+b"), existing(self.files.path("vmlinux"), "rb"),
                existing(self.files.path("initramfs.cpio"), "rb"), new("console"), listening("control"),
                listening("vsock"), self.theirs, None, existing(self.files.path("scratch"), "r+b"),
                existing(self.files.path("modules.erofs"), "rb")]

    def start(self):
        config = {"vcpus": 1, "memory_mib": MEMORY_MIB, "vsock": {"guest_cid": 3, "ready_port": READY_PORT},
                  "scratch_disk": True, "modules": True, "user": {"uid": USER, "gid": USER}}
        opened = self.open_all()

        def enter():
            self.cgroup.enter()
            # First beyond the numbers that they get, so that none is overwritten before it is copied.
            high = [file and fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 100) for file in opened]
            for number, descriptor in enumerate(high, FIRST_DESCRIPTOR):
                if descriptor is not None:
                    os.dup2(descriptor, number)

        started = subprocess.Popen([program("bulkhead-vmm"), "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   close_fds=False, preexec_fn=enter)
        for file in opened:
            if file:
                file.close()
        started.stdin.write(json.dumps(config).encode())
        started.stdin.close()
        return Jailed(started)

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
        ready.listen(1)
        return ready

    def wait(self, ready):
        return ready.accept()[0]

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
