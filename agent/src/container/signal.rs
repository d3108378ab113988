// SPDX-License-Identifier: Apache-2.0
//! Sends signals to containers.
//!
//! The kernel drops a signal for PID 1 of a PID namespace that has no handler for it. A program that has just started
//! and is about to install a handler would lose the signal and then be killed at the end of its grace period. So here
//! the signal waits for the handler.

use std::fs;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::state::State;
use super::{ContainerError, Containers};
use crate::sys;

const MAX_SIGNAL: i32 = 64;
/// The pause between two checks for a handler: a tenth of the time waited so far, within this range.
const HANDLER_PAUSE: RangeInclusive<Duration> = Duration::from_millis(20)..=Duration::from_secs(1);

impl Containers {
    /// Sends a signal to a container's first process, or with `all` to every process in its cgroup.
    pub fn signal(&self, id: &str, signal: i32, all: bool) -> Result<(), ContainerError> {
        if !(1..=MAX_SIGNAL).contains(&signal) {
            return Err(ContainerError::Invalid(format!("{signal} is not a signal")));
        }
        let container = self.get(id)?;
        let pidfd = container.running_pidfd("signal")?;
        match (all, signal) {
            (true, libc::SIGKILL) => container.cgroup.kill(),
            (true, _) => container.cgroup.signal(signal),
            (false, _) => {
                if let State::Running { pid, .. } = container.snapshot().0
                    && would_be_dropped(pid, signal)
                {
                    tokio::spawn(send_once_handled(pidfd, pid, signal));
                    return Ok(());
                }
                match sys::pidfd_send_signal(pidfd.as_fd(), signal) {
                    // The process is gone. Its exit will be reported soon.
                    Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {
                        return Err(container.illegal("signal"));
                    }
                    sent => sent.map_err(ContainerError::system("signal"))?,
                }
            }
        }
        Ok(())
    }
}

/// Sends a signal when the process has a handler for it. Waits as long as the process lives: whoever wants it to end
/// sends SIGKILL after a grace period. The pidfd makes sure that no new process with the same number gets the signal.
async fn send_once_handled(pidfd: Arc<OwnedFd>, pid: i32, signal: i32) {
    let started = Instant::now();
    while would_be_dropped(pid, signal) {
        let pause = started.elapsed() / 10;
        sleep(pause.clamp(*HANDLER_PAUSE.start(), *HANDLER_PAUSE.end())).await;
    }
    // Fails if the process is gone.
    let _ = sys::pidfd_send_signal(pidfd.as_fd(), signal);
}

fn would_be_dropped(pid: i32, signal: i32) -> bool {
    if matches!(signal, libc::SIGKILL | libc::SIGSTOP) {
        return false;
    }
    // If the process is gone, there is nothing to wait for.
    fs::read_to_string(format!("/proc/{pid}/status"))
        .is_ok_and(|status| is_dropped_by(&status, signal))
}

/// Whether the kernel drops `signal` for the process with this `status` (proc(5)): it is PID 1 of a namespace, and it
/// neither blocks, ignores nor handles the signal.
fn is_dropped_by(status: &str, signal: i32) -> bool {
    let field = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name));
        value.unwrap_or_default().trim()
    };
    let numbers: Vec<&str> = field("NSpid:").split_whitespace().collect();
    let is_first = numbers.len() > 1 && numbers.last() == Some(&"1");
    let bit = 1_u64 << (signal - 1);
    let has = |name| u64::from_str_radix(field(name), 16).is_ok_and(|mask| mask & bit != 0);
    is_first && !["SigBlk:", "SigIgn:", "SigCgt:"].into_iter().any(has)
}

#[cfg(test)]
mod tests {
    use super::{is_dropped_by, would_be_dropped};

    #[test]
    fn only_the_first_process_of_a_namespace_without_a_handler_loses_signals() {
        let status = |pids: &str, caught: &str| {
            format!(
                "Name:\tx\nNSpid:\t{pids}\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001000\nSigCgt:\t{caught}\n"
            )
        };
        let (term, pipe) = (libc::SIGTERM, libc::SIGPIPE);
        assert!(is_dropped_by(&status("77\t1", "0"), term));
        assert!(!is_dropped_by(&status("77\t1", "4000"), term));
        assert!(
            !is_dropped_by(&status("77\t1", "0"), pipe),
            "ignored is an answer"
        );
        assert!(!is_dropped_by(&status("77\t2", "0"), term));
        assert!(
            !is_dropped_by(&status("1", "0"), term),
            "the guest's own namespace"
        );
        assert!(is_dropped_by(&status("9\t77\t1", "0"), 64));
        assert!(!is_dropped_by("", term));
    }

    #[test]
    fn nothing_is_awaited_from_a_process_that_is_gone() {
        assert!(!would_be_dropped(i32::MAX, libc::SIGTERM));
    }
}
