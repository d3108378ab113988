// SPDX-License-Identifier: Apache-2.0
//! A VMM process: who it is, whether it lives, when it ends.
//!
//! A process id alone is reused; with the start time it is an identity that can be stored and recognized after
//! a restart. A pidfd tells of the end of a child and of an adopted process alike.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;

/// A process that can be recognized later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub pid: i32,
    /// Clock ticks after boot, field 22 of `/proc/<pid>/stat`.
    pub start_ticks: u64,
}

impl Identity {
    fn of(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_ticks = start_ticks(&stat).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { pid, start_ticks })
    }
}

impl Identity {
    /// Whether that process, and not another one with its id, is there.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).is_ok_and(|found| found == *self)
    }
}

/// The name in parentheses may hold anything, so fields are counted after the last one.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

/// A VMM process, a child of ours or adopted.
#[derive(Debug)]
pub struct VmmProcess {
    identity: Identity,
    pidfd: AsyncFd<OwnedFd>,
    /// To be waited for, if it is our child.
    child: Mutex<Option<std::process::Child>>,
}

impl VmmProcess {
    /// Takes a child that was just started.
    pub fn of_child(child: std::process::Child) -> io::Result<Self> {
        let pid = i32::try_from(child.id()).map_err(|_| io::ErrorKind::InvalidData)?;
        let mut process = Self::open(Identity::of(pid)?)?;
        process.child = Mutex::new(Some(child));
        Ok(process)
    }

    /// Finds a process of an earlier daemon; `None` if it is gone.
    pub fn adopt(identity: Identity) -> io::Result<Option<Self>> {
        let process = match Self::open(identity) {
            Ok(process) => process,
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(e) => return Err(e),
        };
        // After the pidfd is open the id cannot be reused: look now who it is.
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

    /// Returns once the process has ended. May be awaited by many.
    pub async fn ended(&self) {
        // An error cannot be waited out; it counts as the end, and who asks looks at the exit report.
        let _ready = self.pidfd.readable().await;
        let mut child = self
            .child
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(child) = child.as_mut() {
            // The exit report says more than the status.
            let _ = child.wait();
        }
        *child = None;
    }

    /// Kills it; an ended process is fine.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL);
    }

    /// Sets how readily the host kills it for memory. Not to inherit the daemon's own protection.
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

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(start_ticks(&format!("7 (a) b) {fields}")), Some(4242));
        assert_eq!(start_ticks("7 (x) S 1"), None);
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
        process.kill();
        process.ended().await;
        process.ended().await;
        assert!(VmmProcess::adopt(identity).unwrap().is_none());
    }
}
