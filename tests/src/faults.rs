// SPDX-License-Identifier: Apache-2.0
//! Faults on demand: the program `bulkhead-faults` is the daemon, built with points at which it can be killed or made to
//! fail. A test and that daemon share a directory; runtime/faults/src/plan.rs says what its files mean.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::wait::{Late, try_until, whether};

/// The daemon with the points. `scripts/test` builds it beside the others.
pub const PROGRAM: &str = "bulkhead-faults";
/// Names the shared directory to that daemon.
pub const VARIABLE: &str = "BULKHEAD_FAULTS";

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The daemon dies as by `kill -9`.
    Kill,
    /// The step before or after the point fails.
    Fail,
    /// The daemon waits there until [`Faults::release`].
    Hold,
}

/// The directory that a test shares with a daemon.
#[derive(Clone, Debug)]
pub struct Faults(PathBuf);

impl Faults {
    /// Makes the directory, without a plan.
    pub fn new(directory: PathBuf) -> Self {
        fs::create_dir_all(&directory).expect("a directory for faults");
        Self(directory)
    }

    /// The names of all points that `path`, the daemon's program, has.
    pub fn points(path: &Path) -> Vec<String> {
        let listed = Command::new(path).arg("faults").output();
        let listed = listed.unwrap_or_else(|error| {
            panic!(
                "{}: {error}: run scripts/test, which builds it",
                path.display()
            )
        });
        let text = String::from_utf8(listed.stdout).expect("names");
        text.lines().map(str::to_owned).collect()
    }

    /// Asks for `action` at a point, after it was passed so many times.
    pub fn plan(&self, point: &str, passes: usize, action: Action) {
        let verb = format!("{action:?}").to_lowercase();
        // In one step: the daemon may look at any time.
        let unfinished = self.0.join("plan.new");
        fs::write(&unfinished, format!("{point} {passes} {verb}")).expect("write a plan");
        fs::rename(unfinished, self.0.join("plan")).expect("make a plan");
    }

    /// Waits for at most `patience` until the plan has come true.
    pub async fn comes_true(&self, patience: Duration) -> Result<(), Late> {
        let plan = self.0.join("plan");
        try_until("the planned point is passed", patience, async || {
            whether(!plan.exists(), fs::read_to_string(&plan))
        })
        .await
    }

    /// Drops a plan that has not come true.
    pub fn drop_plan(&self) {
        let _ = fs::remove_file(self.0.join("plan"));
    }

    /// Whether the daemon waits at the planned point.
    pub fn is_held(&self) -> bool {
        self.0.join("held").exists()
    }

    /// Lets a daemon go on that was held.
    pub fn release(&self) {
        let _ = fs::remove_file(self.0.join("held"));
    }

    /// From now on all points that are passed are noted.
    pub fn start_trace(&self) {
        fs::write(self.0.join("trace"), "").expect("begin a trace");
    }

    /// The points that were passed since, in this order.
    pub fn end_trace(&self) -> Vec<String> {
        let path = self.0.join("trace");
        let text = fs::read_to_string(&path).expect("read the trace");
        fs::remove_file(path).expect("end the trace");
        text.lines().map(str::to_owned).collect()
    }

    /// The directory, for the daemon's environment.
    pub fn directory(&self) -> &PathBuf {
        &self.0
    }
}
