// SPDX-License-Identifier: Apache-2.0
//! Faults at every point of every call: the daemon is killed there, a step fails, the VMM or the file server dies. Then
//! the test does what kubelet would do, and the node must be as it was.
//!
//! Each call is made once while its points are traced. So the test knows which points a call passes, how often, and
//! whether any point is passed by none. [`plugins`] has CNI plugins that die, [`load`] kills at random moments.

mod load;
mod plugins;
mod world;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::client::Pod;
use bulkhead_tests::daemon::{Daemon, program};
use bulkhead_tests::faults::{self, Action, Faults};
use bulkhead_tests::table::Table;
use bulkhead_tests::wait::{until, whether};
use tonic::Status;

use self::world::{Call, World};

/// How long after the answer to a call a point may still be passed: logs and mirrors are followed in the background.
const BACKGROUND: Duration = Duration::from_millis(1500);

/// A point, and how often its call has passed it before.
#[derive(Clone, Debug)]
struct Event {
    point: String,
    passes: usize,
}

/// Who dies, or what happens, at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    DaemonDies,
    StepFails,
    VmmDies,
    FileServerDies,
}

/// A call passes some points often, such as that before a change of the records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Passes {
    First,
    All,
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes ten minutes: scripts/test --only faults::a_daemon"]
async fn a_daemon_that_dies_at_any_point_leaves_nothing_that_the_next_one_does_not_mend() {
    all_points(Fault::DaemonDies, Passes::First).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes twelve minutes: scripts/test --only faults::a_step"]
async fn a_step_that_fails_at_any_point_is_undone_and_can_be_done_again() {
    all_points(Fault::StepFails, Passes::First).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes many minutes: scripts/test --only faults::every"]
async fn every_pass_of_every_point_the_daemon_dies() {
    all_points(Fault::DaemonDies, Passes::All).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes many minutes: scripts/test --only faults::every"]
async fn every_pass_of_every_point_a_step_fails() {
    all_points(Fault::StepFails, Passes::All).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes seven minutes: scripts/test --only faults::every_point"]
async fn every_point_the_vmm_dies() {
    all_points(Fault::VmmDies, Passes::First).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it takes seven minutes: scripts/test --only faults::every_point"]
async fn every_point_the_file_server_dies() {
    all_points(Fault::FileServerDies, Passes::First).await;
}

#[test]
fn the_released_daemon_has_no_points() {
    let bytes = |name| std::fs::read(program(name)).expect("read a program");
    let contains = |name| {
        let word = b"SpawnFileServer";
        bytes(name).windows(word.len()).any(|bytes| bytes == word)
    };
    assert!(contains(faults::PROGRAM) && !contains("bulkhead"));
    let listed = Command::new(program("bulkhead")).arg("faults").output();
    assert!(!listed.expect("run bulkhead").status.success());
}

/// Goes through the points of all calls, and shows what happened in a table.
async fn all_points(fault: Fault, which: Passes) {
    let mut world = World::new().await;
    let mut table = Table::new(&format!("{fault:?}:"));
    let mut passed = BTreeSet::new();
    for call in Call::ALL {
        let events = trace(&mut world, call).await;
        passed.extend(events.iter().map(|event| event.point.clone()));
        let events = chosen(events, call, fault, which);
        go_through(&mut world, call, fault, events, &mut table).await;
    }
    world.assert_sound().await;
    let mut forgotten = Faults::points(&program(faults::PROGRAM));
    forgotten.retain(|point| !passed.contains(point));
    table.equal("points that no call passes", forgotten, Vec::new());
    table.finish();
}

/// Makes a call and notes what it passes. The node is at the call's end then.
async fn trace(world: &mut World, call: Call) -> Vec<Event> {
    if call == Call::Create {
        // In a new pod more is done.
        world.end_pod().await.expect("end the pod");
    }
    world.prepare(call).await;
    if call == Call::Restart {
        // What faults before left behind, such as a network that is taken down later, is gone then.
        restart(world).await;
    }
    world.faults.start_trace();
    if call == Call::Restart {
        restart(world).await;
    } else {
        let made = world.call(call).await;
        let made = made.unwrap_or_else(|error| panic!("{call:?}: {error:?}"));
        world.note(call, made);
    }
    tokio::time::sleep(BACKGROUND).await;
    let mut passes: BTreeMap<String, usize> = BTreeMap::new();
    let trace = world.faults.end_trace().into_iter();
    let count = |point: String| {
        let count = passes.entry(point.clone()).or_default();
        *count += 1;
        let passes = *count - 1;
        Event { point, passes }
    };
    trace.map(count).collect()
}

async fn restart(world: &mut World) {
    world.daemon.restart().await;
    world.revive().await.expect("a daemon");
}

/// The events at which a fault makes sense.
fn chosen(mut events: Vec<Event>, call: Call, fault: Fault, which: Passes) -> Vec<Event> {
    let has_vm = !matches!(
        call,
        Call::Pull | Call::RemoveImage | Call::Restart | Call::RemovePod
    );
    let mut after = false;
    events.retain(|event| match fault {
        // Between the end of a step and the beginning of the next one nothing happens.
        Fault::DaemonDies => {
            let is_same = after && event.point.ends_with(".before");
            after = event.point.ends_with(".after");
            !is_same
        }
        Fault::StepFails => true,
        Fault::VmmDies => has_vm,
        Fault::FileServerDies => has_vm && call != Call::Run,
    });
    if which == Passes::First {
        events.retain(|event| event.passes == 0);
    }
    events
}

/// Lets the fault happen at each event. A call that is made again in the same pod does less, so an event that it does not
/// reach is tried again in a new pod.
async fn go_through(
    world: &mut World,
    call: Call,
    fault: Fault,
    events: Vec<Event>,
    table: &mut Table,
) {
    let mut left: VecDeque<Event> = events.into();
    let mut is_fresh = false;
    while let Some(event) = left.front().cloned() {
        let case = format!("{call:?} {}#{}", event.point, event.passes);
        let started = Instant::now();
        world.prepare(call).await;
        let prepared = started.elapsed();
        match happen(world, call, fault, &event).await {
            Ok(seen) => {
                eprintln!("{case} {prepared:.1?} {:.1?}: {seen}", started.elapsed());
                table.row(&case, true, seen);
                is_fresh = false;
            }
            Err(Wrong::NotReached) if !is_fresh => {
                world.end_pod().await.expect("end the pod");
                is_fresh = true;
                continue;
            }
            Err(wrong) => {
                eprintln!("{case}: WRONG: {wrong}");
                table.row(&case, false, wrong);
                if let Err(why) = world.revive().await {
                    panic!("{case}: the daemon does not come back: {why}");
                }
                world.end_pod().await.expect("end the pod");
                world.accept();
            }
        }
        left.pop_front();
    }
    // What is left of the pod's life must leave nothing either.
    world.prepare(Call::Run).await;
    let idle = world.is_idle().await;
    let case = format!("{call:?}: the census");
    table.row(&case, idle.is_ok(), idle.err().unwrap_or_default());
}

/// What is not as it should be.
enum Wrong {
    NotReached,
    Is(String),
}

impl fmt::Display for Wrong {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotReached => to.write_str("the point was not passed"),
            Self::Is(why) => to.write_str(why),
        }
    }
}

/// Lets one fault happen in a call. Returns what the caller got.
async fn happen(
    world: &mut World,
    call: Call,
    fault: Fault,
    event: &Event,
) -> Result<String, Wrong> {
    let action = match fault {
        Fault::DaemonDies => Action::Kill,
        Fault::StepFails => Action::Fail,
        Fault::VmmDies | Fault::FileServerDies => Action::Hold,
    };
    world.faults.plan(&event.point, event.passes, action);
    let answer = if call == Call::Restart {
        let restarted = world.daemon.try_restart().await;
        restarted
            .map(|()| "it serves".to_owned())
            .unwrap_or_else(|_| "it ends".to_owned())
    } else {
        let (made, killed) = interfered(world, call, fault).await;
        let answer = match &made {
            Ok(_) => "ok".to_owned(),
            Err(status) => format!("{}: {}", status.code(), status.message()),
        };
        if let Ok(made) = made {
            world.note(call, made);
        }
        match killed {
            Some(0) => format!("nobody to kill; {answer}"),
            _ => answer,
        }
    };
    if world.faults.comes_true(BACKGROUND).await.is_err() {
        world.faults.drop_plan();
        return match answer.starts_with("ok") || answer.starts_with("it serves") {
            true => Err(Wrong::NotReached),
            false => Err(Wrong::Is(format!("without a fault: {answer}"))),
        };
    }
    if fault == Fault::DaemonDies {
        until("the daemon is dead", async || {
            whether(world.daemon.has_ended(), "it lives")
        })
        .await;
    }
    world.revive().await.map_err(Wrong::Is)?;
    let recovered = match fault {
        Fault::DaemonDies | Fault::StepFails => world.recover(call).await,
        // The pod cannot go on, and all that kubelet can do is to remove it.
        Fault::VmmDies | Fault::FileServerDies if answer.starts_with("nobody") => Ok(()),
        Fault::VmmDies | Fault::FileServerDies => match world.end_pod().await {
            Ok(()) => world.is_idle().await,
            Err(error) => Err(format!("{error:?}")),
        },
    };
    recovered.map(|()| answer).map_err(Wrong::Is)
}

/// Makes a call. If it is held at a point, kills the pod's VMM or file server meanwhile. Returns the answer, and how many
/// were killed if the daemon was held.
async fn interfered(
    world: &World,
    call: Call,
    fault: Fault,
) -> (Result<Option<Pod>, Status>, Option<usize>) {
    let pids = match fault {
        Fault::VmmDies => Daemon::vmm_pids,
        Fault::FileServerDies => Daemon::file_server_pids,
        Fault::DaemonDies | Fault::StepFails => return (world.call(call).await, None),
    };
    let interfering = async {
        until("the daemon is held", async || {
            whether(world.faults.is_held(), "it is not")
        })
        .await;
        let pids = pids(&world.daemon);
        world.kill_processes(&pids).await;
        world.faults.release();
        pids.len()
    };
    let calling = world.call(call);
    tokio::pin!(interfering, calling);
    let answer = tokio::select! {
        killed = &mut interfering => return (calling.await, Some(killed)),
        answer = &mut calling => answer,
    };
    // A point in the background may come a little later.
    match world.faults.comes_true(BACKGROUND).await {
        Ok(()) => (answer, Some(interfering.await)),
        Err(_) => (answer, None),
    }
}
