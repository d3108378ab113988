// SPDX-License-Identifier: Apache-2.0
//! `bulkhead warm`: saves a running pod where the daemon looks for warmed pods, as soon as it is ready.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_proto::cri;
use rustix::fs::RenameFlags;
use tokio::time::{Instant, sleep};

use super::client::{Client, failed};
use super::{CliError, checkpoint, templates};
use crate::pod::volumes::kind::is_label;
use crate::pod::warmed;
use crate::random::new_id;

/// How long to wait before the command is run again.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The pod's id, or a unique prefix of it.
    pod: String,
    /// What the annotation bulkhead.dev/warmed of new pods says; a DNS label. A warmed pod that has the name is replaced.
    name: String,
    /// The name of the container in which COMMAND runs [default: the only one].
    #[arg(long, value_name = "NAME")]
    container: Option<String>,
    /// How many seconds COMMAND may take to succeed.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    /// Wait until this command succeeds in the container; it is run once a second, as a startup probe is.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Saves the pod, and prints where it is.
pub async fn save(client: &mut Client, arguments: Arguments) -> Result<(), CliError> {
    let Arguments {
        pod,
        name,
        container,
        timeout,
        command,
    } = arguments;
    label("the name", &name)?;
    let details = templates::details(client).await?;
    let status: Option<warmed::Status> = serde_json::from_value(details["warmed"].clone()).ok();
    let directory = status.and_then(|status| status.directory);
    let directory = directory.ok_or(CliError::NoneWarmed)?;
    let (pod, running) = checkpoint::running(client, &pod).await?;
    let namespace = pod.metadata.unwrap_or_default().namespace;
    label("the pod's namespace", &namespace)?;
    if !command.is_empty() {
        let container = chosen(running, container)?;
        ready(client, container, command, Duration::from_secs(timeout)).await?;
    }
    let of_namespace = directory.join(namespace);
    remove_left(&of_namespace);
    let new = of_namespace.join(format!(".{}", new_id()));
    let saved = checkpoint::save(client, &pod.id, &new).await;
    let placed = match saved {
        Ok(()) => {
            let place = of_namespace.join(&name);
            let put = put(&new, &place);
            put.map(|()| println!("{}", place.display()))
        }
        Err(error) => Err(error),
    };
    // What is there now is of no use: a part, or what was replaced.
    match fs::remove_dir_all(&new) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            placed.and(Err(not("remove", &new)(source)))
        }
        _ => placed,
    }
}

/// Removes what a command has left that was killed: a directory without a name, older than any that is being written.
fn remove_left(of_namespace: &Path) {
    let entries = fs::read_dir(of_namespace).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b".")) {
        let changed = entry.metadata().and_then(|found| found.modified()).ok();
        let age = changed.and_then(|at| at.elapsed().ok());
        if age.is_some_and(|age| age > 2 * checkpoint::LIMIT) {
            // What cannot be removed is in nobody's way.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn label(what: &'static str, value: &str) -> Result<(), CliError> {
    match is_label(value) {
        true => Ok(()),
        false => Err(CliError::NoLabel {
            what,
            value: value.to_owned(),
        }),
    }
}

/// The id of the container with this name, or of the only one.
fn chosen(running: Vec<cri::ContainerStatus>, name: Option<String>) -> Result<String, CliError> {
    let is_only = running.len() == 1;
    let wanted = match &name {
        Some(name) => format!("has the name {name:?}"),
        None => format!("is the only one of {}", running.len()),
    };
    let found = running.into_iter().find(|one| match &name {
        Some(name) => one.metadata.as_ref().is_some_and(|own| own.name == *name),
        None => is_only,
    });
    Ok(found.ok_or(CliError::NoContainer(wanted))?.id)
}

/// Runs the command until it succeeds.
async fn ready(
    client: &mut Client,
    container: String,
    command: Vec<String>,
    limit: Duration,
) -> Result<(), CliError> {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now()).as_secs();
        let request = cri::ExecSyncRequest {
            container_id: container.clone(),
            cmd: command.clone(),
            timeout: i64::try_from(left.max(1)).unwrap_or(i64::MAX),
        };
        let said = match client.runtime.exec_sync(request).await {
            Ok(answer) if answer.get_ref().exit_code == 0 => return Ok(()),
            Ok(answer) => String::from_utf8_lossy(&answer.get_ref().stderr).into_owned(),
            Err(status) if status.code() == tonic::Code::DeadlineExceeded => {
                status.message().to_owned()
            }
            Err(status) => return Err(failed(format!("container {container}"))(status)),
        };
        if Instant::now() >= until {
            let said = said.trim().to_owned();
            return Err(CliError::NotReady {
                container,
                limit,
                said,
            });
        }
        sleep(PAUSE).await;
    }
}

/// Gives a directory its name at once, and what had the name before that of the directory.
fn put(new: &Path, place: &Path) -> Result<(), CliError> {
    use rustix::fs::{CWD, renameat_with};
    let rename = |how| renameat_with(CWD, new, CWD, place, how);
    let put = match rename(RenameFlags::NOREPLACE) {
        Err(rustix::io::Errno::EXIST) => rename(RenameFlags::EXCHANGE),
        put => put,
    };
    put.map_err(|e| not("give a name to", place)(e.into()))
}

fn not(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CliError {
    let path: PathBuf = path.to_owned();
    move |source| CliError::File {
        operation,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(names: &[&str]) -> Vec<cri::ContainerStatus> {
        let one = |name: &&str| cri::ContainerStatus {
            id: format!("id-{name}"),
            metadata: Some(cri::ContainerMetadata {
                name: (*name).to_owned(),
                attempt: 0,
            }),
            ..Default::default()
        };
        names.iter().map(one).collect()
    }

    #[test]
    fn a_command_runs_in_the_container_of_that_name_or_in_the_only_one() {
        let of = |names: &[&str], name: Option<&str>| {
            chosen(running(names), name.map(str::to_owned)).ok()
        };
        assert_eq!(of(&["a"], None).as_deref(), Some("id-a"));
        assert_eq!(of(&["a", "b"], Some("b")).as_deref(), Some("id-b"));
        assert_eq!(of(&["a", "b"], None), None);
        assert_eq!(of(&["a"], Some("b")), None);
        assert_eq!(of(&[], None), None);
    }

    #[test]
    fn a_directory_takes_the_name_and_what_had_it_gets_the_other() {
        let directory = tempfile::tempdir().unwrap();
        let [new, place] = ["new", "place"].map(|name| directory.path().join(name));
        let make = |content: &str| {
            fs::create_dir(&new).unwrap();
            fs::write(new.join("file"), content).unwrap();
        };
        let read = |at: &Path| fs::read_to_string(at.join("file")).unwrap();
        make("first");
        put(&new, &place).unwrap();
        assert!(!new.exists());
        assert_eq!(read(&place), "first");
        make("second");
        put(&new, &place).unwrap();
        assert_eq!([read(&place), read(&new)], ["second", "first"]);
    }
}
