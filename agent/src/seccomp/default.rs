// SPDX-License-Identifier: Apache-2.0
//! The default profile: the calls that ordinary programs make, more calls for each capability that needs them,
//! and EPERM for all others. It is close to the default of containerd and Docker, so that images that work there
//! work here, too.

use super::bpf::errno;
use super::{Action, Comparison, Condition, Filter, Rule};

const CLONE_NAMESPACES: u64 = 0x7e02_0000;
/// Sockets to the hypervisor lead to the daemon, so only the agent may use them.
const AF_VSOCK: u64 = 40;
/// Personalities that do not affect security: Linux, UNAME26, both, and the query of the current one.
const PERSONALITIES: [u64; 5] = [0, 0x0008, 0x2_0000, 0x2_0008, 0xffff_ffff];

pub fn filter(capabilities: &[String]) -> Filter {
    let has = |name: &str| capabilities.iter().any(|c| c == name || c == "ALL");
    let mut filter = Filter::new(Action::Errno(errno(libc::EPERM)));
    for name in ALWAYS {
        filter.add(name, allow(&[]));
    }
    for (capability, names) in WITH_CAPABILITY {
        if has(capability) {
            for name in names {
                filter.add(name, allow(&[]));
            }
        }
    }
    for value in PERSONALITIES {
        filter.add(
            "personality",
            allow(&[condition(0, Comparison::Equal, value)]),
        );
    }
    filter.add(
        "socket",
        allow(&[condition(0, Comparison::NotEqual, AF_VSOCK)]),
    );
    if !has("CAP_SYS_ADMIN") {
        // No new namespaces. The flags of clone3 are in memory, where a filter cannot look. So behave as if the
        // kernel did not have clone3; then C libraries use clone.
        filter.add(
            "clone",
            allow(&[condition(0, Comparison::MaskedEqual(CLONE_NAMESPACES), 0)]),
        );
        let missing = Action::Errno(errno(libc::ENOSYS));
        filter.add(
            "clone3",
            Rule {
                conditions: Vec::new(),
                action: missing,
            },
        );
    }
    filter
}

fn allow(conditions: &[Condition]) -> Rule {
    Rule {
        conditions: conditions.to_vec(),
        action: Action::Allow,
    }
}

fn condition(argument: u8, comparison: Comparison, value: u64) -> Condition {
    Condition {
        argument,
        comparison,
        value,
    }
}

#[rustfmt::skip]
const ALWAYS: [&str; 301] = [
    "accept", "accept4", "access", "alarm", "arch_prctl", "bind", "brk", "cachestat", "capget",
    "capset", "chdir", "chmod", "chown", "clock_adjtime", "clock_getres", "clock_gettime",
    "clock_nanosleep", "close", "close_range", "connect", "copy_file_range", "creat", "dup", "dup2",
    "dup3", "epoll_create", "epoll_create1", "epoll_ctl", "epoll_ctl_old", "epoll_pwait",
    "epoll_pwait2", "epoll_wait", "epoll_wait_old", "eventfd", "eventfd2", "execve", "execveat", "exit",
    "exit_group", "faccessat", "faccessat2", "fadvise64", "fallocate", "fanotify_mark", "fchdir",
    "fchmod", "fchmodat", "fchmodat2", "fchown", "fchownat", "fcntl", "fdatasync", "fgetxattr",
    "flistxattr", "flock", "fork", "fremovexattr", "fsetxattr", "fstat", "fstatfs", "fsync",
    "ftruncate", "futex", "futex_requeue", "futex_wait", "futex_waitv", "futex_wake", "futimesat",
    "get_robust_list", "get_thread_area", "getcpu", "getcwd", "getdents", "getdents64", "getegid",
    "geteuid", "getgid", "getgroups", "getitimer", "getpeername", "getpgid", "getpgrp", "getpid",
    "getppid", "getpriority", "getrandom", "getresgid", "getresuid", "getrlimit", "getrusage", "getsid",
    "getsockname", "getsockopt", "gettid", "gettimeofday", "getuid", "getxattr", "getxattrat",
    "inotify_add_watch", "inotify_init", "inotify_init1", "inotify_rm_watch", "io_cancel", "io_destroy",
    "io_getevents", "io_pgetevents", "io_setup", "io_submit", "ioctl", "ioprio_get", "ioprio_set",
    "kill", "landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self", "lchown",
    "lgetxattr", "link", "linkat", "listen", "listxattr", "listxattrat", "llistxattr", "lremovexattr",
    "lseek", "lsetxattr", "lstat", "madvise", "map_shadow_stack", "membarrier", "memfd_create",
    "memfd_secret", "mincore", "mkdir", "mkdirat", "mknod", "mknodat", "mlock", "mlock2", "mlockall",
    "mmap", "modify_ldt", "mprotect", "mq_getsetattr", "mq_notify", "mq_open", "mq_timedreceive",
    "mq_timedsend", "mq_unlink", "mremap", "mseal", "msgctl", "msgget", "msgrcv", "msgsnd", "msync",
    "munlock", "munlockall", "munmap", "name_to_handle_at", "nanosleep", "newfstatat", "open", "openat",
    "openat2", "pause", "pidfd_open", "pidfd_send_signal", "pipe", "pipe2", "pkey_alloc", "pkey_free",
    "pkey_mprotect", "poll", "ppoll", "prctl", "pread64", "preadv", "preadv2", "prlimit64",
    "process_mrelease", "process_vm_readv", "process_vm_writev", "pselect6", "ptrace", "pwrite64",
    "pwritev", "pwritev2", "read", "readahead", "readlink", "readlinkat", "readv", "recvfrom",
    "recvmmsg", "recvmsg", "remap_file_pages", "removexattr", "removexattrat", "rename", "renameat",
    "renameat2", "restart_syscall", "rmdir", "rseq", "rt_sigaction", "rt_sigpending", "rt_sigprocmask",
    "rt_sigqueueinfo", "rt_sigreturn", "rt_sigsuspend", "rt_sigtimedwait", "rt_tgsigqueueinfo",
    "sched_get_priority_max", "sched_get_priority_min", "sched_getaffinity", "sched_getattr",
    "sched_getparam", "sched_getscheduler", "sched_rr_get_interval", "sched_setaffinity",
    "sched_setattr", "sched_setparam", "sched_setscheduler", "sched_yield", "seccomp", "select",
    "semctl", "semget", "semop", "semtimedop", "sendfile", "sendmmsg", "sendmsg", "sendto",
    "set_robust_list", "set_thread_area", "set_tid_address", "setfsgid", "setfsuid", "setgid",
    "setgroups", "setitimer", "setpgid", "setpriority", "setregid", "setresgid", "setresuid",
    "setreuid", "setrlimit", "setsid", "setsockopt", "setuid", "setxattr", "setxattrat", "shmat",
    "shmctl", "shmdt", "shmget", "shutdown", "sigaltstack", "signalfd", "signalfd4", "socketpair",
    "splice", "stat", "statfs", "statx", "symlink", "symlinkat", "sync", "sync_file_range", "syncfs",
    "sysinfo", "tee", "tgkill", "time", "timer_create", "timer_delete", "timer_getoverrun",
    "timer_gettime", "timer_settime", "timerfd_create", "timerfd_gettime", "timerfd_settime", "times",
    "tkill", "truncate", "umask", "uname", "unlink", "unlinkat", "utime", "utimensat", "utimes",
    "vfork", "vmsplice", "wait4", "waitid", "write", "writev",
];

#[rustfmt::skip]
const WITH_CAPABILITY: [(&str, &[&str]); 14] = [
    ("CAP_BPF", &["bpf"]),
    ("CAP_DAC_READ_SEARCH", &["open_by_handle_at"]),
    ("CAP_PERFMON", &["perf_event_open"]),
    ("CAP_SYS_ADMIN", &["bpf", "clone", "clone3", "fanotify_init", "fsconfig", "fsmount", "fsopen", "fspick", "lookup_dcookie", "lsm_get_self_attr", "lsm_list_modules", "lsm_set_self_attr", "listmount", "mount", "mount_setattr", "move_mount", "open_tree", "open_tree_attr", "perf_event_open", "pivot_root", "quotactl", "quotactl_fd", "setdomainname", "sethostname", "setns", "statmount", "syslog", "umount2", "unshare"]),
    ("CAP_SYS_BOOT", &["reboot"]),
    ("CAP_SYS_CHROOT", &["chroot"]),
    ("CAP_SYS_MODULE", &["delete_module", "finit_module", "init_module", "query_module"]),
    ("CAP_SYS_NICE", &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    ("CAP_SYS_PACCT", &["acct"]),
    ("CAP_SYS_PTRACE", &["kcmp", "pidfd_getfd", "process_madvise"]),
    ("CAP_SYS_RAWIO", &["ioperm", "iopl"]),
    ("CAP_SYS_TIME", &["adjtimex", "clock_settime", "settimeofday"]),
    ("CAP_SYS_TTY_CONFIG", &["vhangup"]),
    ("CAP_SYSLOG", &["syslog"]),
];

#[cfg(test)]
mod tests {
    use super::{ALWAYS, WITH_CAPABILITY, filter};
    use crate::seccomp::bpf::compile;
    use crate::seccomp::machine::{ALLOWED, DENIED, verdict};
    use crate::seccomp::syscalls::number;

    fn answer(capabilities: &[&str], name: &str, first_argument: u64) -> u32 {
        let capabilities: Vec<String> = capabilities.iter().map(ToString::to_string).collect();
        let program = compile(&filter(&capabilities)).unwrap();
        verdict(
            &program,
            number(name).unwrap(),
            [first_argument, 0, 0, 0, 0, 0],
        )
    }

    #[test]
    fn every_name_is_a_system_call() {
        let extra = WITH_CAPABILITY.iter().flat_map(|(_, names)| names.iter());
        for name in ALWAYS.iter().chain(extra) {
            assert!(number(name).is_some(), "{name}");
        }
    }

    #[test]
    fn the_default_profile_decides_as_containerd_does() {
        let table: [(&[&str], &str, u64, u32); 14] = [
            (&[], "read", 0, ALLOWED),
            (&[], "mount", 0, DENIED),
            (&[], "keyctl", 0, DENIED),
            (&["CAP_SYS_ADMIN"], "mount", 0, ALLOWED),
            (&["CAP_SYS_CHROOT"], "chroot", 0, ALLOWED),
            (&[], "chroot", 0, DENIED),
            (&[], "clone", 0x11, ALLOWED),
            (&[], "clone", 0x1000_0011, DENIED),
            (&["CAP_SYS_ADMIN"], "clone", 0x1000_0011, ALLOWED),
            (&[], "clone3", 0, 0x0005_0026),
            (&["CAP_SYS_ADMIN"], "clone3", 0, ALLOWED),
            (&[], "socket", 2, ALLOWED),
            (&[], "socket", 40, DENIED),
            (&[], "personality", 0x40000, DENIED),
        ];
        for (capabilities, name, argument, expected) in table {
            assert_eq!(
                answer(capabilities, name, argument),
                expected,
                "{capabilities:?} {name} {argument:#x}"
            );
        }
    }
}
