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
//! A VM that stands still on purpose, because it is being saved, is not judged ([`Pulse::hold`]).
//! A guest that has halted is not found here: its VMM notices that by itself, and ends.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use bulkhead_guest::agent::Agent;

use crate::patience::{Clock, Spent};

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
pub struct Pulse(Arc<Known>);

#[derive(Debug, Default)]
struct Known {
    is_missed: AtomicBool,
    holds: AtomicU32,
}

/// As long as one of these lives, the VM stands still on purpose, and silence says nothing of its guest.
#[derive(Debug)]
pub struct Hold(Pulse);

impl Pulse {
    /// Whether the last heartbeat had no answer.
    pub fn is_missed(&self) -> bool {
        self.0.is_missed.load(Ordering::Relaxed)
    }

    /// The VM stands still on purpose until this is dropped.
    pub fn hold(&self) -> Hold {
        self.0.holds.fetch_add(1, Ordering::Relaxed);
        Hold(self.clone())
    }

    /// Whether the VM stands still on purpose.
    pub fn is_held(&self) -> bool {
        self.0.holds.load(Ordering::Relaxed) > 0
    }

    fn note(&self, is_missed: bool) {
        self.0.is_missed.store(is_missed, Ordering::Relaxed);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.0.holds.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Waits until the guest of the VMM `pid` is dead, and returns a sentence that says how it was found. Does not return
/// while the guest lives, and not after the end of its VMM.
pub async fn until_dead(agent: &Agent, pulse: &Pulse, pid: i32) -> String {
    loop {
        let (mut clock, mut silence) = (Clock::of(pid), Silence::default());
        let answered = answered(agent);
        tokio::pin!(answered);
        // One heartbeat for the whole silence: a slow guest may need longer for each than the time between two looks.
        while tokio::time::timeout(LOOK, &mut answered).await.is_err() {
            pulse.note(true);
            if pulse.is_held() {
                // What it does from the end of the hold on counts.
                (clock, silence) = (Clock::of(pid), Silence::default());
            } else if let Some(how) = silence.judge(&vcpu_states(pid), &clock.spent()) {
                return how;
            }
        }
        pulse.note(false);
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

/// The states of the vCPU threads of a VMM.
fn vcpu_states(pid: i32) -> Vec<char> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let files = threads.into_iter().flatten().flatten();
    let files = files.filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok());
    files.filter_map(|stat| vcpu_state(&stat)).collect()
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
#[derive(Debug, Default)]
struct Silence {
    /// How long it had lasted when the vCPUs were first seen asleep, without being seen awake since then.
    asleep: Option<Duration>,
    stopped: u32,
}

impl Silence {
    /// Whether the guest is dead, and how that was found. `states` are those of its vCPUs, and `spent` is what the VM has
    /// had since the guest answered last.
    fn judge(&mut self, states: &[char], spent: &Spent) -> Option<String> {
        let (silent, doing) = (spent.passed, doing(states));
        self.stopped = match doing {
            Doing::Stopped => self.stopped + 1,
            _ => 0,
        };
        self.asleep = match doing {
            Doing::Sleeps => Some(self.asleep.unwrap_or(silent)),
            _ => None,
        };
        let vcpus = u32::try_from(states.len()).unwrap_or(u32::MAX).max(1);
        let ran = spent.scheduled.on_cpu / vcpus;
        let slept = self.asleep.map(|since| silent.saturating_sub(since));
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
    use crate::patience::Scheduled;

    /// Looks every two seconds. Each has the state of all vCPUs, and the CPU time in the two seconds before it.
    fn judged(vcpus: usize, looks: impl IntoIterator<Item = (char, f64)>) -> (u64, Option<String>) {
        let mut silence = Silence::default();
        let mut spent = Spent {
            passed: Duration::ZERO,
            scheduled: Scheduled::default(),
        };
        for (state, ran) in looks {
            spent.passed += Duration::from_secs(2);
            spent.scheduled.on_cpu += Duration::from_secs_f64(ran);
            if let Some(how) = silence.judge(&vec![state; vcpus], &spent) {
                return (spent.passed.as_secs(), Some(how));
            }
        }
        (spent.passed.as_secs(), None)
    }

    #[test]
    fn a_guest_is_dead_by_what_its_vcpus_do_and_a_starved_one_never() {
        let always = |state, ran| std::iter::repeat_n((state, ran), 300);
        let table: [(&str, usize, char, f64, u64, &str); 7] = [
            ("stopped", 1, 'T', 0.0, 4, "stopped"),
            ("spins", 1, 'R', 2.0, 30, "vCPUs ran 30"),
            ("spins on four", 4, 'R', 8.0, 30, "vCPUs ran 30"),
            ("has a tenth of a CPU and spins", 1, 'R', 0.2, 300, "ran 30"),
            ("is idle", 1, 'S', 0.001, 62, "slept 60"),
            ("is frozen or starved", 1, 'R', 0.0, 600, ""),
            ("is starved", 4, 'R', 0.01, 600, ""),
        ];
        for (case, vcpus, state, ran, after, why) in table {
            let (seconds, how) = judged(vcpus, always(state, ran));
            assert_eq!(seconds, after, "{case}: {how:?}");
            assert_eq!(how.is_some(), !why.is_empty(), "{case}");
            assert!(how.unwrap_or_default().contains(why), "{case}");
        }
    }

    #[test]
    fn a_guest_that_sleeps_and_wakes_or_is_stopped_for_a_moment_is_alive() {
        let turns = [('S', 0.0), ('R', 0.01)];
        assert_eq!(judged(1, turns.into_iter().cycle().take(300)).1, None);
        let turns = [('T', 0.0), ('R', 0.01)];
        assert_eq!(judged(1, turns.into_iter().cycle().take(300)).1, None);
    }

    #[test]
    fn a_vm_is_held_until_the_last_hold_ends() {
        let pulse = Pulse::default();
        assert!(!pulse.is_held());
        let holds = [pulse.hold(), pulse.clone().hold()];
        for hold in holds {
            assert!(pulse.is_held());
            drop(hold);
        }
        assert!(!pulse.is_held());
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
        while vcpu_states(own) != ['S'] {
            std::thread::yield_now();
        }
        drop(sender);
        busy.join().unwrap().unwrap_err();
    }
}
