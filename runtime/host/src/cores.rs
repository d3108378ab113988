// SPDX-License-Identifier: Apache-2.0
//! Core scheduling: the threads of one VM and of its file server never run beside those of another VM on the two threads of
//! one CPU core (SMT), so side channels inside a core show a guest nothing but itself.
//!
//! The kernel runs two tasks on one core at the same time only if they have the same *cookie*. A VMM gets a cookie of its
//! own before it reads its configuration, and its threads inherit it. See the kernel's
//! Documentation/admin-guide/hw-vuln/core-scheduling.rst.

use std::fs;
use std::io;

use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{
    CoreSchedulingScope, core_scheduling_cookie, create_core_scheduling_cookie,
    pull_core_scheduling_cookie, push_core_scheduling_cookie,
};

use crate::process::Identity;

/// `1` if at least one core runs two threads at the same time.
const SMT: &str = "/sys/devices/system/cpu/smt/active";

/// With whom a VM may share a CPU core at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cores {
    Shared,
    OwnForEachVm,
}

/// What this host can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// The kernel keeps cookies apart.
    Works,
    /// A core runs one thread at a time, so nobody shares one.
    NoSmt,
    /// Cores are shared, and the kernel was built without CONFIG_SCHED_CORE.
    Missing,
}

/// Finds out what this host can do. SMT can be turned off and on while the host runs.
pub fn support() -> Support {
    let asked = core_scheduling_cookie(rustix::process::getpid(), CoreSchedulingScope::Thread);
    judge(asked.map(drop), is_smt_active())
}

/// Whether some core runs two threads at the same time. Old kernels do not say; then it counts as yes.
fn is_smt_active() -> bool {
    fs::read_to_string(SMT).map_or(true, |text| text.trim() != "0")
}

fn judge(asked: Result<(), Errno>, is_smt_active: bool) -> Support {
    match asked {
        Ok(()) => Support::Works,
        Err(Errno::NODEV) => Support::NoSmt,
        Err(_) if !is_smt_active => Support::NoSmt,
        Err(_) => Support::Missing,
    }
}

/// The cookie of a process, `None` if it has none or the kernel knows no cookies. The number itself is random.
pub fn cookie(pid: i32) -> Option<u64> {
    let pid = Pid::from_raw(pid)?;
    let cookie = core_scheduling_cookie(pid, CoreSchedulingScope::Thread).ok()?;
    (cookie != 0).then_some(cookie)
}

/// Gives a new VMM cores of its own, if that is wanted. Where no core runs two threads it has them anyway.
pub(crate) fn separate(cores: Cores, vmm: Identity) -> io::Result<()> {
    if cores == Cores::Shared {
        return Ok(());
    }
    let pid = Pid::from_raw(vmm.pid).ok_or(io::ErrorKind::InvalidInput)?;
    match create_core_scheduling_cookie(pid, CoreSchedulingScope::ThreadGroup) {
        Ok(()) => Ok(()),
        Err(e) if judge(Err(e), is_smt_active()) == Support::NoSmt => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Lets the file server of a VM run beside its VMM, if that has a cookie.
pub(crate) fn join(vmm: Identity, server: Identity) -> io::Result<()> {
    if cookie(vmm.pid).is_none() {
        return Ok(());
    }
    let pid = |of: Identity| Pid::from_raw(of.pid).ok_or(io::ErrorKind::InvalidInput);
    let (vmm, server) = (pid(vmm)?, pid(server)?);
    // A cookie goes from one process to another only by a thread that has it for a moment.
    let carrier = std::thread::Builder::new().name("cores".into());
    let carried = carrier.spawn(move || {
        pull_core_scheduling_cookie(vmm, CoreSchedulingScope::Thread)?;
        push_core_scheduling_cookie(server, CoreSchedulingScope::ThreadGroup)
    })?;
    let carried = carried
        .join()
        .map_err(|_| io::Error::other("a thread panicked"))?;
    Ok(carried?)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_a_kernel_without_it_on_a_host_with_smt_cannot_do_it() {
        let table = [
            (Ok(()), true, Support::Works),
            (Err(Errno::NODEV), false, Support::NoSmt),
            // SMT was turned off between both looks.
            (Err(Errno::NODEV), true, Support::NoSmt),
            (Err(Errno::INVAL), false, Support::NoSmt),
            (Err(Errno::INVAL), true, Support::Missing),
            (Err(Errno::PERM), true, Support::Missing),
        ];
        for (asked, is_smt_active, expected) in table {
            assert_eq!(judge(asked, is_smt_active), expected, "{asked:?}");
        }
    }

    #[test]
    fn a_vmm_has_a_cookie_of_its_own_and_its_file_server_has_the_same() {
        let mut children: Vec<_> = (0..3)
            .map(|_| Command::new("sleep").arg("1000").spawn().unwrap())
            .collect();
        let identity = |at: usize| Identity::of(i32::try_from(children[at].id()).unwrap()).unwrap();
        let (vmm, other, server) = (identity(0), identity(1), identity(2));
        let can = support();
        if can == Support::Missing {
            separate(Cores::OwnForEachVm, vmm).unwrap_err();
        } else {
            separate(Cores::OwnForEachVm, vmm).unwrap();
            separate(Cores::OwnForEachVm, other).unwrap();
            separate(Cores::Shared, server).unwrap();
        }
        join(vmm, server).unwrap();
        let found = [vmm, other, server].map(|one| cookie(one.pid));
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        if can == Support::Works {
            assert!(found[0].is_some() && found[1].is_some());
            assert_ne!(found[0], found[1]);
            assert_eq!(found[0], found[2]);
        } else {
            eprintln!("ONLY THE REFUSAL WAS CHECKED: on this host core scheduling is {can:?}");
            assert_eq!(found, [None; 3]);
        }
    }
}
