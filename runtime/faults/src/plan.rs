// SPDX-License-Identifier: Apache-2.0
//! What a test wants, in a directory that it and the daemon share. It is read at each point, so the test can change it
//! while the daemon runs.
//!
//! ```text
//! plan     "POINT PASSES ACTION", such as "AddCni.after 0 kill": what to do at a point that was passed so many times
//! trace    if it is there, each point appends its name
//! held     made by the action hold; the daemon goes on when it is removed
//! ```
//! A plan fires once, and is removed before it does. A point that is passed but does not fire counts its passes down.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use crate::{Fault, Side, Step};

/// How often a point that is held looks whether it may go on.
const LOOK: Duration = Duration::from_millis(5);

/// Where the test keeps its plan. A global, because points are everywhere, and this is a program for tests.
static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
/// Held while the plan is read and changed: points are passed by several threads.
static READING: Mutex<()> = Mutex::new(());

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// The daemon dies, as by `kill -9`.
    Kill,
    /// The step fails.
    Fail,
    /// The daemon waits here, so that the test can do what it wants meanwhile.
    Hold,
}

/// From now on, points do what is in this directory.
pub fn arm(directory: PathBuf) {
    let _ = DIRECTORY.set(directory);
}

/// The names of all points.
pub fn all() -> impl Iterator<Item = String> {
    let sides = [Side::Before, Side::After];
    let points = Step::ALL.iter().copied();
    points.flat_map(move |step| sides.map(|side| name(step, side)))
}

fn name(step: Step, side: Side) -> String {
    match side {
        Side::Before => format!("{step:?}.before"),
        Side::After => format!("{step:?}.after"),
    }
}

pub fn pass(step: Step, side: Side) -> Result<(), Fault> {
    let Some(directory) = DIRECTORY.get() else {
        return Ok(());
    };
    let name = name(step, side);
    match look(directory, &name) {
        None => Ok(()),
        Some(Action::Fail) => Err(Fault(name)),
        Some(Action::Hold) => {
            hold(&directory.join("held"));
            Ok(())
        }
        Some(Action::Kill) => {
            let _ = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::KILL,
            );
            // Until the signal arrives, nothing must go on here.
            loop {
                std::thread::park();
            }
        }
    }
}

/// Notes that a point is passed. Returns what is to be done there now.
fn look(directory: &Path, name: &str) -> Option<Action> {
    let _alone = READING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Ok(mut trace) = File::options().append(true).open(directory.join("trace")) {
        let _ = writeln!(trace, "{name}");
    }
    let plan = directory.join("plan");
    let text = fs::read_to_string(&plan).ok()?;
    let (passes, action) = wanted(&text, name)?;
    match passes.checked_sub(1) {
        None => {
            let _ = fs::remove_file(&plan);
            Some(action)
        }
        Some(left) => {
            let verb = format!("{action:?}").to_lowercase();
            let _ = fs::write(&plan, format!("{name} {left} {verb}"));
            None
        }
    }
}

/// What the text of a plan says about a point: after how many passes, and what.
fn wanted(text: &str, name: &str) -> Option<(u32, Action)> {
    let mut words = text.split_whitespace();
    if words.next()? != name {
        return None;
    }
    let passes = words.next()?.parse().ok()?;
    let action = match words.next()? {
        "kill" => Action::Kill,
        "fail" => Action::Fail,
        "hold" => Action::Hold,
        _ => return None,
    };
    Some((passes, action))
}

fn hold(held: &Path) {
    if File::create(held).is_ok() {
        while held.exists() {
            std::thread::sleep(LOOK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_fires_once_after_its_passes_and_at_no_other_point() {
        let directory = tempfile::tempdir().unwrap();
        let look = |name| look(directory.path(), name);
        fs::write(directory.path().join("plan"), "AddCni.after 1 fail").unwrap();
        let seen = [
            "AddCni.before",
            "AddCni.after",
            "AddCni.after",
            "AddCni.after",
        ]
        .map(look);
        assert_eq!(seen, [None, None, Some(Action::Fail), None]);
        assert!(!directory.path().join("trace").exists());
    }

    #[test]
    fn every_point_has_a_name_of_its_own_and_is_traced() {
        let directory = tempfile::tempdir().unwrap();
        let trace = directory.path().join("trace");
        File::create(&trace).unwrap();
        for name in all() {
            look(directory.path(), &name);
        }
        let traced = fs::read_to_string(trace).unwrap();
        let names: std::collections::BTreeSet<_> = traced.lines().collect();
        assert_eq!(names.len(), 2 * Step::ALL.len());
    }
}
