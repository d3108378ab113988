// SPDX-License-Identifier: Apache-2.0
//! Programs that run in a container before its own: OCI's `startContainer` hooks, which CDI devices can have.
//!
//! They run in the process that becomes the container's program, when that has nothing left to do but the exec. So a
//! hook has the container's files, namespaces, user, capabilities, filter of system calls and cgroup, as with runc. It
//! cannot do more than the container itself, and may come from the container's image.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use bulkhead_proto::agent::StartHook;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::json;

use super::config::{Failure, Hooks, Stage};

/// What all hooks of a container may take. It is less than the agent waits for the start, so the error names the hook.
const ALL_HOOKS_TIMEOUT: Duration = Duration::from_secs(45);
/// How much of what a failed hook has printed is told.
const TOLD_BYTES: u64 = 1024;
const OCI_VERSION: &str = "1.2.0";

/// Hooks that are about to run. What they read and print is in memory files, because nobody could serve pipes: this
/// process has one thread, and that waits for the hook's end. The memory is the container's.
#[derive(Debug)]
pub struct Prepared<'a> {
    hooks: &'a [StartHook],
    state: File,
    output: File,
}

impl<'a> Prepared<'a> {
    /// Makes the files. Call it before the filter of system calls is loaded, which need not allow that.
    pub fn new(hooks: &'a Hooks) -> Result<Self, Failure> {
        let mut state = memory_file().stage("create a file for the state that hooks read")?;
        let text = state_of(hooks).to_string();
        state
            .write_all(text.as_bytes())
            .stage("write the state that hooks read")?;
        Ok(Self {
            hooks: &hooks.programs,
            state,
            output: memory_file().stage("create a file for the output of hooks")?,
        })
    }

    /// Runs one hook after the other. The first one that fails ends the start.
    pub fn run(mut self) -> Result<(), Failure> {
        let last = Instant::now() + ALL_HOOKS_TIMEOUT;
        for hook in self.hooks {
            let failed =
                |why: String| Failure::other(format!("startContainer hook {:?}: {why}", hook.path));
            let left = last.saturating_duration_since(Instant::now());
            let own = Duration::from_millis(hook.timeout_milliseconds.into());
            let limit = if own.is_zero() { left } else { own.min(left) };
            let ended = self.run_one(hook, limit);
            match ended.map_err(|e| failed(e.to_string()))? {
                Some(status) if status.success() => {}
                Some(status) => return Err(failed(format!("{status}: {}", self.printed()))),
                None => {
                    return Err(failed(format!(
                        "it did not end within {limit:?} and was killed: {}",
                        self.printed()
                    )));
                }
            }
        }
        Ok(())
    }

    /// Returns `None` if the hook was killed at the end of `limit`.
    fn run_one(&mut self, hook: &StartHook, limit: Duration) -> io::Result<Option<ExitStatus>> {
        self.state.rewind()?;
        self.output.set_len(0)?;
        self.output.rewind()?;
        let (name, args) = match hook.args.split_first() {
            Some((name, args)) => (name, args),
            None => (&hook.path, &[][..]),
        };
        let variables = hook.env.iter().filter_map(|one| one.split_once('='));
        let child = Command::new(&hook.path)
            .arg0(OsStr::new(name))
            .args(args)
            .env_clear()
            .envs(variables)
            .stdin(self.state.try_clone()?)
            .stdout(self.output.try_clone()?)
            .stderr(self.output.try_clone()?)
            .spawn()?;
        wait(child, limit)
    }

    /// The beginning of what the last hook has printed.
    fn printed(&mut self) -> String {
        let mut bytes = Vec::new();
        let read = self.output.seek(SeekFrom::Start(0)).and_then(|_| {
            let output = Read::by_ref(&mut self.output);
            output.take(TOLD_BYTES).read_to_end(&mut bytes)
        });
        match read {
            Ok(_) => String::from_utf8_lossy(&bytes).trim_end().to_owned(),
            Err(e) => format!("read its output: {e}"),
        }
    }
}

/// The container's state, as OCI's specification has it. Its bundle is the root, because it has no other directory that
/// a hook could reach.
fn state_of(hooks: &Hooks) -> serde_json::Value {
    json!({
        "ociVersion": OCI_VERSION,
        "id": hooks.container_id,
        "status": "created",
        "pid": std::process::id(),
        "bundle": "/",
        "annotations": hooks.annotations,
    })
}

fn wait(mut child: Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    // The child cannot have been collected: nobody else does.
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
    let pidfd = pidfd.inspect_err(|_| drop(child.kill()))?;
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Ok(0) => break,
            Ok(_) => return child.wait().map(Some),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                let _ = child.kill();
                return Err(e.into());
            }
        }
    }
    pidfd_send_signal(&pidfd, Signal::KILL)?;
    child.wait()?;
    Ok(None)
}

fn memory_file() -> io::Result<File> {
    Ok(memfd_create(c"hook", MemfdFlags::CLOEXEC)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str, timeout_milliseconds: u32) -> Result<(), Failure> {
        let hook = |script: &str| StartHook {
            path: "/bin/sh".into(),
            args: ["name", "-c", script].map(str::to_owned).to_vec(),
            env: vec!["MINE=a=b".into()],
            timeout_milliseconds,
        };
        let hooks = Hooks {
            programs: vec![hook("cat >/dev/null"), hook(script)],
            container_id: "the-id".into(),
            annotations: [("key".to_owned(), "value".to_owned())].into(),
        };
        Prepared::new(&hooks)?.run()
    }

    #[test]
    fn a_hook_reads_the_state_and_has_its_own_variables_only() {
        run(
            r#"state=$(cat) && [ "$MINE" = a=b ] && [ -z "$HOME$CARGO" ] && [ "$0" = name ] || exit 1
            for part in '"bundle":"/"' '"id":"the-id"' '"status":"created"' '"key":"value"'; do
                case $state in *"$part"*) ;; *) echo "$part: $state"; exit 1;; esac
            done"#,
            0,
        )
        .unwrap();
    }

    #[test]
    fn a_hook_that_fails_is_named_with_what_it_printed() {
        let message = |script: &str, limit| run(script, limit).unwrap_err().message;
        let failed = message("echo first; echo second >&2; exit 3", 0);
        assert_eq!(
            failed,
            "startContainer hook \"/bin/sh\": exit status: 3: first\nsecond"
        );
        let long = message("head -c 100000 /dev/zero | tr '\\0' x; exit 1", 0);
        assert!(long.len() < 1200, "{}", long.len());
        // The shell is replaced, so that the kill hits what sleeps.
        let late = message("echo slow; exec sleep 1000", 200);
        assert!(late.contains("within 200ms and was killed: slow"), "{late}");
        let missing = Hooks {
            programs: vec![StartHook {
                path: "/no/such".into(),
                ..StartHook::default()
            }],
            ..Hooks::default()
        };
        let failed = Prepared::new(&missing).unwrap().run().unwrap_err().message;
        assert!(failed.contains("No such file"), "{failed}");
    }
}
