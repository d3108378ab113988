// SPDX-License-Identifier: Apache-2.0
//! Proves that the files of records are intact before the daemon opens them.
//!
//! The library that reads them may panic on a damaged file, and a release build aborts then. So this program is started
//! once more for it, with the hidden command `check-records`. It reads the whole file, says in one line what is wrong,
//! and ends.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Output, Stdio};
use std::time::Duration;

use bulkhead_records::{Found, RecordsError};
use bulkhead_text::{chain, cut, one_line};
use tokio::process::Command;

/// The name of the command.
pub const COMMAND: &str = "check-records";
/// Also the program that has been replaced by an upgrade since it was started.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// How long a check may take. It reads some 100 MiB in a second, and a node's records are some MiB.
const LIMIT: Duration = Duration::from_secs(120);
/// The code of an end that the file's damage has not caused.
const OTHER_CAUSE: u8 = 2;
/// How much of what the command says is shown.
const SAID_BYTES: usize = 300;

/// Why the daemon does not start with these records.
#[derive(Debug, thiserror::Error)]
pub enum IntactError {
    #[error(
        "{path} is damaged ({why}): stop the daemon, move the file away, and start the daemon again. {then}"
    )]
    Damaged {
        path: PathBuf,
        why: String,
        /// What happens to what was recorded there.
        then: &'static str,
    },
    #[error("check {path}: {why}")]
    Failed { path: PathBuf, why: String },
    #[error("check {path}: start {THIS_PROGRAM}")]
    Start { path: PathBuf, source: io::Error },
}

/// Checks a file of records. `then` is a sentence that says what happens without the file. A file that does not exist is
/// no error.
pub async fn check(path: &Path, then: &'static str) -> Result<(), IntactError> {
    if !path.exists() {
        return Ok(());
    }
    let mut command = Command::new(THIS_PROGRAM);
    command
        .arg(COMMAND)
        .arg(path)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let path = path.to_owned();
    match tokio::time::timeout(LIMIT, command.output()).await {
        Ok(Ok(output)) => judge(path, &output, then),
        Ok(Err(source)) => Err(IntactError::Start { path, source }),
        Err(_) => Err(IntactError::Damaged {
            path,
            why: format!("it cannot be read within {LIMIT:?}"),
            then,
        }),
    }
}

fn judge(path: PathBuf, output: &Output, then: &'static str) -> Result<(), IntactError> {
    let said = one_line(&String::from_utf8_lossy(&output.stderr));
    let why = cut(said.trim(), SAID_BYTES).to_owned();
    if output.status.success() {
        if !why.is_empty() {
            tracing::warn!("{}: {why}", path.display());
        }
        return Ok(());
    }
    match output.status.code() {
        Some(code) if code == i32::from(OTHER_CAUSE) => Err(IntactError::Failed { path, why }),
        _ => Err(IntactError::Damaged { path, why, then }),
    }
}

/// The command: checks a file in this process, and says on standard error what is wrong with it.
pub fn check_here(path: &Path) -> ExitCode {
    match bulkhead_records::check(path) {
        Ok(Found::Intact) => ExitCode::SUCCESS,
        Ok(Found::Repaired) => {
            eprintln!("it was damaged and has been repaired");
            ExitCode::SUCCESS
        }
        Err(RecordsError::Damaged { why, .. }) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{}", chain(&error));
            ExitCode::from(OTHER_CAUSE)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_that_says_no_or_crashes_means_damage_and_says_what_to_do() {
        let run = |script: &str| {
            let mut shell = std::process::Command::new("sh");
            let output = shell.args(["-c", script]).output().unwrap();
            let judged = judge("/x/pods.redb".into(), &output, "Then all is well.");
            judged.map_err(|error| chain(&error))
        };
        assert_eq!(run("exit 0"), Ok(()));
        for (script, expected) in [
            (
                "echo it is empty >&2; exit 1",
                "/x/pods.redb is damaged (it is empty): stop the daemon, move the file away, and start the daemon \
                 again. Then all is well.",
            ),
            (
                "echo it is in use >&2; exit 2",
                "check /x/pods.redb: it is in use",
            ),
        ] {
            assert_eq!(run(script).unwrap_err(), expected);
        }
        let crashed = run("echo thread panicked at x; kill -ABRT $$").unwrap_err();
        assert!(crashed.contains("is damaged"), "{crashed}");
    }
}
