// SPDX-License-Identifier: Apache-2.0
//! PID 1, from the kernel's start of it to the first call that it serves.
//!
//! This file does only what every guest needs at once. What takes longer or depends on the pod waits for
//! `ConfigureSandbox` ([`crate::sandbox`]). A failure here ends the guest, with a line on the console
//! that says what failed.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use rustix::mount::{MountAttrFlags, MountFlags, mount_remount};
use rustix::process::{Resource, Rlimit, chroot, fchdir, setrlimit};
use tokio::runtime;

use crate::disk::layers;
use crate::init::limits::MAX_OPEN_FILES;
use crate::init::mounts;
use crate::{cgroup, network, power, server};

/// The most signals that may be queued for one user: what a node of 64 GiB has.
const MAX_PENDING_SIGNALS: u64 = 1 << 18;
/// The most processes and threads: what systemd sets on a node. It is also the most that the kernel can have.
const MAX_PIDS: &str = "4194304";
/// The most namespaces of a kind: what a node of 64 GiB has.
const MAX_NAMESPACES: &str = "262144";
/// The most connections that nobody holds any more: what a node of 64 GiB has.
const MAX_LEFTOVERS: &str = "262144";
/// Limits below `/proc/sys` that the kernel derives from the memory that it boots with. A pod's containers are charged for
/// the memory of what is counted here, and a pod may grow, so a small VM needs no lower limits than a node.
const NODE_LIMITS: [(&str, &str); 21] = [
    ("kernel/threads-max", MAX_PIDS),
    ("kernel/pid_max", MAX_PIDS),
    // As systemd sets it on a node.
    ("fs/file-max", "9223372036854775807"),
    // The most that the kernel gives to any node by itself.
    ("fs/inotify/max_user_watches", "1048576"),
    ("fs/fanotify/max_user_marks", "1048576"),
    // What a node of 64 GiB has.
    ("fs/epoll/max_user_watches", "14316557"),
    ("user/max_cgroup_namespaces", MAX_NAMESPACES),
    ("user/max_ipc_namespaces", MAX_NAMESPACES),
    ("user/max_mnt_namespaces", MAX_NAMESPACES),
    ("user/max_net_namespaces", MAX_NAMESPACES),
    ("user/max_pid_namespaces", MAX_NAMESPACES),
    ("user/max_time_namespaces", MAX_NAMESPACES),
    ("user/max_user_namespaces", MAX_NAMESPACES),
    ("user/max_uts_namespaces", MAX_NAMESPACES),
    ("net/ipv4/tcp_max_orphans", MAX_LEFTOVERS),
    ("net/ipv4/tcp_max_tw_buckets", MAX_LEFTOVERS),
    ("net/ipv4/tcp_max_syn_backlog", "4096"),
    // In pages: from where on the kernel saves memory for sockets, and the most that they get.
    ("net/ipv4/tcp_mem", "768000 1024000 1536000"),
    ("net/ipv4/udp_mem", "1536000 2048000 3072000"),
    // The most that the kernel gives to a socket on any node by itself.
    ("net/ipv4/tcp_rmem", "4096 131072 6291456"),
    ("net/ipv4/tcp_wmem", "4096 16384 4194304"),
];
/// Threads for work that blocks: mounts and unmounts, the scratch disk.
const BLOCKING_THREADS: usize = 4;

const PLAIN: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

pub fn run() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| power::fatal(&panic.to_string())));
    if let Err((what, error)) = prepare() {
        power::fatal(&format!("{what}: {error}"));
    }
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build();
    let served = runtime.and_then(|runtime| runtime.block_on(server::serve()));
    match served {
        Ok(()) => power::fatal("the server ended"),
        Err(e) => power::fatal(&format!("serve: {e}")),
    }
}

type Failure = (&'static str, io::Error);

/// Prepares the guest for the agent: mounts, cgroups, limits, loopback. An error names the failed step.
fn prepare() -> Result<(), Failure> {
    leave_initramfs().map_err(|e| ("leave the initramfs", e))?;
    mount_at(c"sysfs", c"/sys", PLAIN).map_err(|e| ("mount sysfs", e))?;
    // Creating namespaces, mounts and cgroups waits for RCU grace periods, milliseconds each. With this
    // switch the kernel interrupts the few CPUs of the guest instead, which costs almost nothing. A kernel
    // without the switch is only slower.
    let _ = fs::write("/sys/kernel/rcu_expedited", "1");
    let device_files = MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NOEXEC);
    for (kind, target, attributes) in [
        (c"proc", c"/proc", PLAIN),
        (c"devtmpfs", c"/dev", device_files),
        (c"cgroup2", c"/sys/fs/cgroup", PLAIN),
    ] {
        mount_at(kind, target, attributes).map_err(|e| ("mount a kernel file system", e))?;
    }
    cgroup::enable_controllers().map_err(|e| ("enable cgroup controllers", e))?;
    // The OOM killer must never choose the agent. Each container sets its own score.
    fs::write("/proc/self/oom_score_adj", "-1000").map_err(|e| ("set the OOM score", e))?;
    raise_limits().map_err(|e| ("raise the limits of processes", e))?;
    network::start_loopback().map_err(|e| ("bring the loopback interface up", e))
}

/// Raises the limits that the kernel derives from the guest's memory at boot, or that are lower than a node's. Containers
/// inherit them. What a pod may have is bounded by its cgroup and by its memory.
fn raise_limits() -> io::Result<()> {
    for (file, limit) in NODE_LIMITS {
        fs::write(Path::new("/proc/sys").join(file), limit)?;
    }
    for (resource, most) in [
        (Resource::Nofile, Some(MAX_OPEN_FILES)),
        (Resource::Nproc, None),
        (Resource::Sigpending, Some(MAX_PENDING_SIGNALS)),
    ] {
        let limit = Rlimit {
            current: most,
            maximum: most,
        };
        setrlimit(resource, limit)?;
    }
    Ok(())
}

/// Changes to a root that can be pivoted from, which the initramfs cannot, and that takes mount points.
fn leave_initramfs() -> io::Result<()> {
    // The agent's binary stays in the initramfs. Nobody may write to it through /proc/<pid>/exe.
    mount_remount(c"/", MountFlags::BIND | MountFlags::RDONLY, c"")?;
    let root = mounts::new_filesystem(c"tmpfs", &[("mode", "755")], PLAIN)?;
    mounts::attach_at(&root, c"/")?;
    fchdir(root.as_fd())?;
    chroot(c".")?;
    for directory in ["/proc", "/sys", "/dev", "/run", layers::MOUNTS] {
        if !Path::new(directory).is_dir() {
            fs::create_dir(directory)?;
        }
    }
    Ok(())
}

fn mount_at(kind: &CStr, target: &CStr, attributes: MountAttrFlags) -> io::Result<()> {
    let mount = mounts::new_filesystem(kind, &[], attributes)?;
    Ok(mounts::attach_at(&mount, target)?)
}
