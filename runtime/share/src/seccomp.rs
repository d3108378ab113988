// SPDX-License-Identifier: Apache-2.0
//! The system calls that a running file server may make. All others fail with EPERM. Not allowed are, among
//! others, calls about mounts, namespaces, new sockets, signals to other processes, and files by handle, which
//! could reach files outside the shares. Set once for all threads.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// Why the filter could not be set.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("build the filter")]
    Build(#[from] seccompiler::BackendError),
    #[error("set the filter")]
    Set(#[from] seccompiler::Error),
}

/// `fchmodat2` (Linux 6.6). Newer C libraries try it before `fchmodat`.
const SYS_FCHMODAT2: libc::c_long = 452;

const ALLOWED: &[libc::c_long] = &[
    // Files, by name and by descriptor.
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    SYS_FCHMODAT2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_utimensat,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_setxattr,
    libc::SYS_getxattr,
    libc::SYS_listxattr,
    libc::SYS_removexattr,
    libc::SYS_fcntl,
    libc::SYS_dup,
    // The VMM's socket.
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    // Switching to a user of the guest.
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_umask,
    // Threads, memory, and the end of the process.
    libc::SYS_futex,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Applies the filter to all threads of this process.
pub fn confine() -> Result<(), SeccompError> {
    let program: BpfProgram = filter()?.try_into()?;
    Ok(seccompiler::apply_filter_all_threads(&program)?)
}

fn filter() -> Result<SeccompFilter, SeccompError> {
    let rules: BTreeMap<i64, _> = ALLOWED.iter().map(|&call| (call, Vec::new())).collect();
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    Ok(SeccompFilter::new(
        rules,
        refused,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_confined_thread_reads_files_and_can_do_nothing_about_mounts_or_others() {
        let thread = std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            let program: BpfProgram = filter().unwrap().try_into().unwrap();
            seccompiler::apply_filter(&program).unwrap();
            let read = std::fs::read("/proc/self/stat").is_ok();
            let unmounted = rustix::mount::unmount("/", rustix::mount::UnmountFlags::empty());
            let socket = std::os::unix::net::UnixStream::pair().map(drop);
            let pid = rustix::process::Pid::INIT;
            let signal = rustix::process::test_kill_process(pid);
            (read, unmounted, socket.unwrap_err().raw_os_error(), signal)
        });
        let refused = rustix::io::Errno::PERM;
        let expected = (true, Err(refused), Some(libc::EPERM), Err(refused));
        assert_eq!(thread.join().unwrap(), expected);
    }
}
