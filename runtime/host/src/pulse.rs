// SPDX-License-Identifier: Apache-2.0
//! Notices a guest that has fallen silent for good, and tells it from one that only gets no CPU.
//!
//! The agent is asked for a heartbeat every [`BEAT`]. As long as it has not answered, the VMM's threads are looked at
//! every [`LOOK`], and say why:
//!
//! ```text
//! stopped (SIGSTOP, a tracer)      dead when it is found so twice
//! run                              dead after RAN of CPU time for each vCPU: a kernel that spins
//! sleep                            dead after SLEPT: the guest is idle, and its agent does not answer
//! are ready, but do not run        alive: the host is busy, or the pod's CPU limit is reached
//! wait for a disk of the host      alive
//! ```
//! A guest that has halted is not found here: its VMM notices that by itself, and ends.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bulkhead_guest::agent::Agent;
use tokio::time::Instant;

use crate::patience::Scheduled;

/// The time from a heartbeat's answer to the next heartbeat.
const BEAT: Duration = Duration::from_secs(3);
/// The time between two looks.
const LOOK: Duration = Duration::from_secs(2);
/// The CPU time that a vCPU may get without an answer. It is long because an emulated host needs seconds for what
/// takes milliseconds elsewhere.
const RAN: Duration = Duration::from_secs(30);
/// The pause before a heartbeat is sent again that could not be sent.
const AGAIN: Duration = Duration::from_millis(500);
/// How long one heartbeat may be on its way. A guest that is found dead never answers it.
const LONGEST: Duration = Duration::from_secs(600);
/// How long a guest may sleep without an answer.
const SLEPT: Duration = Duration::from_secs(60);
/// How often a VMM must be found stopped.
const STOPPED: u32 = 2;
/// The beginning of the names of vCPU threads.
const VCPU: &str = "vcpu";

/// Whether a guest answers. Clones are about the same guest.
#[derive(Clone, Debug, Default)]
pub struct Pulse(Arc<AtomicBool>);

impl Pulse {
    /// Whether the last heartbeat had no answer.
    pub fn is_missed(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Waits until the guest of the VMM `pid` is dead, and returns a sentence that says how it was found. Does not return
/// while the guest lives, and not after the end of its VMM.
pub async fn until_dead(agent: &Agent, pulse: &Pulse, pid: i32) -> String {
    loop {
        let mut silence = Silence::new(Look::at(pid));
        let answered = answered(agent);
        tokio::pin!(answered);
        // One heartbeat for the whole silence: a slow guest may need longer for each than the time between two looks.
        while tokio::time::timeout(LOOK, &mut answered).await.is_err() {
            pulse.0.store(true, Ordering::Relaxed);
            if let Some(how) = silence.judge(Look::at(pid)) {
                return how;
            }
        }
        pulse.0.store(false, Ordering::Relaxed);
        tokio::time::sleep(BEAT).await;
    }
}

/// Waits for the answer to a heartbeat. One that cannot be sent, because the connection is broken, is sent again.
async fn answered(agent: &Agent) {
    while !agent.answers_within(LONGEST).await {
        tokio::time::sleep(AGAIN).await;
    }
}

/// What the threads of a VMM do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doing {
    Stopped,
    /// All vCPUs sleep.
    Sleeps,
    /// Some run, are ready to run, or wait for a disk.
    Else,
}

/// What was seen of a VMM at one time.
#[derive(Clone, Copy, Debug)]
struct Look {
    at: Instant,
    doing: Doing,
    vcpus: u32,
    on_cpu: Duration,
}

impl Look {
    fn at(pid: i32) -> Self {
        let threads = fs::read_dir(format!("/proc/{pid}/task"));
        let files = threads.into_iter().flatten().flatten();
        let files = files.filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok());
        let states: Vec<char> = files.filter_map(|stat| vcpu_state(&stat)).collect();
        Self {
            at: Instant::now(),
            doing: doing(&states),
            vcpus: u32::try_from(states.len()).unwrap_or(u32::MAX).max(1),
            on_cpu: Scheduled::of(pid).on_cpu,
        }
    }
}

/// The state of a thread from its stat file, if it is a vCPU (proc_pid_stat(5), fields 2 and 3).
fn vcpu_state(stat: &str) -> Option<char> {
    let (name, fields) = stat.rsplit_once(')')?;
    let (_, name) = name.split_once('(')?;
    name.starts_with(VCPU).then_some(())?;
    fields.trim_start().chars().next()
}

fn doing(states: &[char]) -> Doing {
    match states {
        states if states.iter().any(|state| matches!(state, 'T' | 't')) => Doing::Stopped,
        states if states.iter().all(|state| *state == 'S') => Doing::Sleeps,
        _ => Doing::Else,
    }
}

/// What was seen since the guest answered last.
struct Silence {
    first: Look,
    /// When the vCPUs were first seen asleep, without being seen awake since then.
    asleep: Option<Instant>,
    stopped: u32,
}

impl Silence {
    fn new(first: Look) -> Self {
        Self {
            first,
            asleep: None,
            stopped: 0,
        }
    }

    /// Whether the guest is dead, and how that was found.
    fn judge(&mut self, now: Look) -> Option<String> {
        let silent = now.at.duration_since(self.first.at);
        self.stopped = match now.doing {
            Doing::Stopped => self.stopped + 1,
            _ => 0,
        };
        self.asleep = match now.doing {
            Doing::Sleeps => Some(self.asleep.unwrap_or(now.at)),
            _ => None,
        };
        let ran = now.on_cpu.saturating_sub(self.first.on_cpu) / self.first.vcpus;
        let slept = self.asleep.map(|since| now.at.duration_since(since));
        let why = if self.stopped >= STOPPED {
            "its VMM's threads are stopped".to_owned()
        } else if ran >= RAN {
            format!("each of its vCPUs ran {ran:.0?}")
        } else if slept >= Some(SLEPT) {
            format!("its vCPUs slept {:.0?}", slept.unwrap_or_default())
        } else {
            return None;
        };
        Some(format!(
            "the guest has not answered for {silent:.0?}, and {why}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks every two seconds. Each has what the vCPUs do, and the CPU time in the two seconds before it.
    fn judged(vcpus: u32, looks: impl IntoIterator<Item = (Doing, f64)>) -> (u64, Option<String>) {
        let start = Instant::now();
        let mut now = Look {
            at: start,
            doing: Doing::Else,
            vcpus,
            on_cpu: Duration::from_secs(1000),
        };
        let mut silence = Silence::new(now);
        for (doing, ran) in looks {
            now.at += Duration::from_secs(2);
            now.doing = doing;
            now.on_cpu += Duration::from_secs_f64(ran);
            if let Some(how) = silence.judge(now) {
                return (now.at.duration_since(start).as_secs(), Some(how));
            }
        }
        (now.at.duration_since(start).as_secs(), None)
    }

    #[test]
    fn a_guest_is_dead_by_what_its_vcpus_do_and_a_starved_one_never() {
        let always = |doing, ran| std::iter::repeat_n((doing, ran), 300);
        let table: [(&str, u32, Doing, f64, u64, &str); 7] = [
            ("stopped", 1, Doing::Stopped, 0.0, 4, "stopped"),
            ("spins", 1, Doing::Else, 2.0, 30, "vCPUs ran 30"),
            ("spins on four", 4, Doing::Else, 8.0, 30, "vCPUs ran 30"),
            (
                "has a tenth of a CPU and spins",
                1,
                Doing::Else,
                0.2,
                300,
                "ran 30",
            ),
            ("is idle", 1, Doing::Sleeps, 0.001, 62, "slept 60"),
            ("is frozen or starved", 1, Doing::Else, 0.0, 600, ""),
            ("is starved", 4, Doing::Else, 0.01, 600, ""),
        ];
        for (case, vcpus, doing, ran, after, why) in table {
            let (seconds, how) = judged(vcpus, always(doing, ran));
            assert_eq!(seconds, after, "{case}: {how:?}");
            assert_eq!(how.is_some(), !why.is_empty(), "{case}");
            assert!(how.unwrap_or_default().contains(why), "{case}");
        }
    }

    #[test]
    fn a_guest_that_sleeps_and_wakes_or_is_stopped_for_a_moment_is_alive() {
        let turns = [(Doing::Sleeps, 0.0), (Doing::Else, 0.01)];
        assert_eq!(judged(1, turns.into_iter().cycle().take(300)).1, None);
        let turns = [(Doing::Stopped, 0.0), (Doing::Else, 0.01)];
        assert_eq!(judged(1, turns.into_iter().cycle().take(300)).1, None);
    }

    #[test]
    fn only_vcpu_threads_count() {
        assert_eq!(vcpu_state("12 (vcpu0) S 1 2 3"), Some('S'));
        assert_eq!(vcpu_state("12 (vcpu) 1) R 1 2 3"), Some('R'));
        assert_eq!(vcpu_state("12 (disks) T 1 2 3"), None);
        assert_eq!(vcpu_state("nonsense"), None);
        for (states, expected) in [
            ("SS", Doing::Sleeps),
            ("SR", Doing::Else),
            ("SD", Doing::Else),
            ("TT", Doing::Stopped),
            ("", Doing::Sleeps),
        ] {
            let states: Vec<char> = states.chars().collect();
            assert_eq!(doing(&states), expected);
        }
        let own = i32::try_from(std::process::id()).unwrap();
        let busy = std::thread::Builder::new().name("vcpu7".to_owned());
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let busy = busy.spawn(move || receiver.recv()).unwrap();
        while Look::at(own).doing != Doing::Sleeps {
            std::thread::yield_now();
        }
        assert_eq!(Look::at(own).vcpus, 1);
        drop(sender);
        busy.join().unwrap().unwrap_err();
    }
}
