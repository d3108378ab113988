// SPDX-License-Identifier: Apache-2.0
//! The process of a VMM or file server: its identity, whether it lives, and when it ends.
//!
//! Process ids are reused. But together with the start time they are an identity that can be stored, and recognized
//! after a restart of the daemon. A pidfd tells when a process ends, both for children and for adopted processes.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Mutex;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

/// One clock tick in `/proc/<pid>/stat`. USER_HZ is 100 on all platforms with KVM that we support.
const TICK_MILLISECONDS: u64 = 10;
/// States of a process that has ended and was not waited for yet.
const ZOMBIE: &str = "Z";
const DEAD: &str = "X";

/// The identity of a process, by which it can be recognized later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub pid: i32,
    /// The start time in clock ticks since the boot, field 22 of `/proc/<pid>/stat`.
    pub start_ticks: u64,
}

impl Identity {
    /// The identity of a process that has not ended.
    pub(crate) fn of(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        match state_and_start(&stat).ok_or(io::ErrorKind::InvalidData)? {
            (ZOMBIE | DEAD, _) => Err(io::ErrorKind::NotFound.into()),
            (_, start_ticks) => Ok(Self { pid, start_ticks }),
        }
    }
}

impl Identity {
    /// Whether this process is alive. Another process with the same id does not count.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).is_ok_and(|found| found == *self)
    }

    /// How long ago it started, by a clock that nobody sets.
    pub fn age(&self) -> Duration {
        let now = Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default();
        let start = self.start_ticks.saturating_mul(TICK_MILLISECONDS);
        now.saturating_sub(Duration::from_millis(start))
    }
}

/// Finds the state and the start time. The process name in parentheses may contain anything, so fields are counted after
/// the last `)`.
fn state_and_start(stat: &str) -> Option<(&str, u64)> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    Some((fields.next()?, fields.nth(18)?.parse().ok()?))
}

/// A process of a VMM or file server, which is a child of the daemon or was adopted.
#[derive(Debug)]
pub struct VmmProcess {
    identity: Identity,
    pidfd: AsyncFd<OwnedFd>,
    /// Set if it is a child, which must be waited for.
    child: Mutex<Option<std::process::Child>>,
}

impl VmmProcess {
    /// Takes over a child that was just started.
    pub fn of_child(mut child: std::process::Child) -> io::Result<Self> {
        let opened = || {
            let pid = i32::try_from(child.id()).map_err(|_| io::ErrorKind::InvalidData)?;
            Self::open(Identity::of(pid)?)
        };
        match opened() {
            Ok(mut process) => {
                process.child = Mutex::new(Some(child));
                Ok(process)
            }
            Err(error) => {
                // Nobody else would wait for it.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Finds a process of an earlier daemon. `None` if it has ended.
    pub fn adopt(identity: Identity) -> io::Result<Option<Self>> {
        let process = match Self::open(identity) {
            Ok(process) => process,
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(e) => return Err(e),
        };
        // While the pidfd is open, the id cannot be reused. So check the identity after opening it.
        match Identity::of(identity.pid) {
            Ok(found) if found == identity => Ok(Some(process)),
            _ => Ok(None),
        }
    }

    fn open(identity: Identity) -> io::Result<Self> {
        let pid = Pid::from_raw(identity.pid).ok_or(io::ErrorKind::InvalidInput)?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK)?;
        Ok(Self {
            identity,
            pidfd: crate::sys::register(pidfd)?,
            child: Mutex::new(None),
        })
    }

    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Waits until the process has ended. Several tasks may wait at the same time.
    pub async fn ended(&self) {
        // An error counts as the end, because waiting again would not help. The caller looks at the exit report.
        let _ready = self.pidfd.readable().await;
        let mut child = self
            .child
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        match child.take() {
            // The status is not used: the exit report tells more.
            Some(mut child) => drop(child.wait()),
            // In a container the daemon may be the process that gets all orphans.
            None => {
                let id = WaitId::PidFd(self.pidfd.get_ref().as_fd());
                let _ = rustix::process::waitid(id, WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
            }
        }
    }

    /// Kills the process. It is no error if it has ended.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }

    /// Lets the process write files of this many bytes. A higher limit stays.
    pub fn allow_file_size(&self, bytes: u64) -> io::Result<()> {
        if !self.identity.is_alive() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let pid = self.identity.pid;
        if crate::sys::file_size_limit(pid)? < bytes {
            crate::sys::set_file_size_limit(pid, bytes)?;
        }
        Ok(())
    }

    /// Sets its OOM score adjustment on the host. A new process must not keep the value that protects the daemon.
    pub fn set_oom_score_adj(&self, score: i32) -> io::Result<()> {
        fs::write(
            format!("/proc/{}/oom_score_adj", self.identity.pid),
            score.to_string(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[tokio::test]
    async fn a_limit_of_file_sizes_is_raised_and_never_lowered() {
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -S -f 2; exec sleep 1000"]);
        let process = VmmProcess::of_child(command.spawn().unwrap()).unwrap();
        let pid = process.identity().pid;
        let blocks = |count: u64| count * 512;
        while crate::sys::file_size_limit(pid).unwrap() != blocks(2) {
            tokio::task::yield_now().await;
        }
        for (asked, has) in [
            (1, blocks(2)),
            (blocks(3), blocks(3)),
            (blocks(2), blocks(3)),
        ] {
            process.allow_file_size(asked).unwrap();
            assert_eq!(crate::sys::file_size_limit(pid).unwrap(), has);
        }
        process.kill();
        process.ended().await;
        let gone = process.allow_file_size(1).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        let stat = format!("7 (a) b) {fields}");
        assert_eq!(state_and_start(&stat), Some(("S", 4242)));
        assert_eq!(state_and_start("7 (x) S 1"), None);
    }

    #[tokio::test]
    async fn a_child_is_seen_alive_killed_and_gone() {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = VmmProcess::of_child(child).unwrap();
        let identity = process.identity();
        assert!(VmmProcess::adopt(identity).unwrap().is_some());
        let other = Identity {
            start_ticks: identity.start_ticks + 1,
            ..identity
        };
        assert!(
            VmmProcess::adopt(other).unwrap().is_none(),
            "another process with its id"
        );
        let since_boot = Identity {
            start_ticks: 0,
            ..identity
        };
        assert!(identity.age() < since_boot.age());
        process.kill();
        process.ended().await;
        process.ended().await;
        assert!(VmmProcess::adopt(identity).unwrap().is_none());
    }
}
