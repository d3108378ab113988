// SPDX-License-Identifier: Apache-2.0
//! The record of an attached network. It is enough to check the network and to tear it down, even if the configuration
//! has changed. It is stored twice: in the pod's record, and as a file that is written before anything is made on the
//! host.

use std::collections::{BTreeSet, HashSet};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bulkhead_faults::{self as faults, Step};
use serde::{Deserialize, Serialize};

use crate::cni::{Conflist, Invocation};
use crate::failure::{NetworkError, file_error};

const SUFFIX: &str = ".json";
/// What a record is called until it is complete.
const UNFINISHED: &str = ".new";
/// How long the id of a pod is.
const ID_DIGITS: usize = 64;

/// All that is needed to tear down a pod's network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    pub(crate) pod_id: String,
    /// `None` if the pod has only loopback.
    pub(crate) attached: Option<AttachedRecord>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedRecord {
    pub netns: PathBuf,
    pub conflist: Conflist,
    pub invocation: Invocation,
    /// CNI's result as JSON.
    pub result: Option<String>,
}

impl NetworkRecord {
    /// Whether the pod has an interface, and not only loopback.
    pub fn has_interface(&self) -> bool {
        self.attached.is_some()
    }

    /// The same plan for a network namespace that is there already.
    pub fn moved_to(mut self, netns: &Path) -> Self {
        self.attached = self.attached.map(|attached| AttachedRecord {
            netns: netns.to_owned(),
            invocation: attached.invocation.moved_to(netns),
            ..attached
        });
        self
    }

    /// Whether what was made by this record is what `planned` would make, but for the identity of the pod.
    pub fn serves(&self, planned: &Self) -> bool {
        match (&self.attached, &planned.attached) {
            (None, None) => true,
            (Some(made), Some(planned)) => {
                made.conflist == planned.conflist
                    && made
                        .conflist
                        .asks_the_same(&made.invocation, &planned.invocation)
            }
            _ => false,
        }
    }

    pub(crate) fn describe(&self) -> serde_json::Value {
        let Some(attached) = &self.attached else {
            return serde_json::json!({ "name": null });
        };
        let result = attached.result.as_deref();
        let result = result.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
        serde_json::json!({
            "name": attached.conflist.name,
            "cniVersion": attached.conflist.version.name(),
            "namespace": attached.netns,
            "cniResult": result,
        })
    }

    /// The path of the pod's namespace, whether it exists or not.
    pub(crate) fn netns(&self, directory: &Path) -> PathBuf {
        match &self.attached {
            Some(attached) => attached.netns.clone(),
            None => directory.join(&self.pod_id),
        }
    }

    /// Writes the record into `directory`. Replaces an earlier one of the same pod.
    pub(crate) fn write(&self, directory: &Path) -> Result<(), NetworkError> {
        let path = path_of(directory, &self.pod_id);
        let text = serde_json::to_vec(self).map_err(|e| file_error("write", &path)(e.into()))?;
        replace(&path, &text)
    }

    /// Removes the file. It is no error if it does not exist.
    pub(crate) fn remove(&self, directory: &Path) -> Result<(), NetworkError> {
        let path = path_of(directory, &self.pod_id);
        faults::within(Step::RemoveNetworkRecord, || {
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    Err(file_error("remove", &path)(e))
                }
                _ => Ok(()),
            }
        })
    }

    /// Reads the record of a pod.
    fn read(directory: &Path, pod_id: &str) -> io::Result<Self> {
        let bytes = std::fs::read(path_of(directory, pod_id))?;
        let record: Self = serde_json::from_slice(&bytes)?;
        match record.pod_id == pod_id {
            true => Ok(record),
            false => Err(io::Error::other("it is the record of another pod")),
        }
    }

    /// Writes the file again if it is not there or cannot be read.
    pub(crate) fn mend(&self, directory: &Path) -> Result<(), NetworkError> {
        if self.attached.is_none() {
            return Ok(());
        }
        match Self::read(directory, &self.pod_id) {
            Ok(_) => Ok(()),
            Err(error) => {
                let path = path_of(directory, &self.pod_id);
                tracing::error!("{} is damaged ({error}); it is made anew", path.display());
                self.write(directory)
            }
        }
    }
}

/// What is found in the directories of records and namespaces.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub records: Vec<NetworkRecord>,
    /// Ids of pods that have a namespace, or a record that cannot be read.
    pub traces: Vec<String>,
}

impl Found {
    /// Looks for all that does not belong to `pods`. Files with other names than ours are left alone.
    pub fn all_but(pods: &HashSet<&str>, records: &Path, namespaces: &Path) -> Self {
        let mut found = Self::default();
        let ids = names(records).filter_map(|name| name.strip_suffix(SUFFIX).map(str::to_owned));
        let ids: BTreeSet<String> = ids
            .chain(names(namespaces).filter(|name| is_id(name)))
            .collect();
        for id in ids.into_iter().filter(|id| !pods.contains(id.as_str())) {
            match NetworkRecord::read(records, &id) {
                Ok(record) => found.records.push(record),
                Err(error) => {
                    let path = path_of(records, &id);
                    tracing::error!("{} cannot be read: {error}", path.display());
                    found.traces.extend(Some(id).filter(|id| is_id(id)));
                }
            }
        }
        found
    }
}

/// Removes what a daemon left that died while it wrote a record. Call it before any pod is attached.
pub(crate) fn remove_unfinished(directory: &Path) {
    for name in names(directory) {
        let id = name.strip_suffix(UNFINISHED);
        if id.is_some_and(is_id)
            && let Err(error) = std::fs::remove_file(directory.join(&name))
        {
            tracing::warn!("remove {name} in {}: {error}", directory.display());
        }
    }
}

fn names(directory: &Path) -> impl Iterator<Item = String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

/// Whether this is the id of a pod, and not something that others have put there.
fn is_id(name: &str) -> bool {
    name.len() == ID_DIGITS && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn path_of(directory: &Path, pod_id: &str) -> PathBuf {
    directory.join(format!("{pod_id}{SUFFIX}"))
}

/// Replaces a file in one step. Only root may read it, because configurations of plugins may contain secrets.
pub fn replace(path: &Path, text: &[u8]) -> Result<(), NetworkError> {
    let temporary = path.with_extension("new");
    let replaced = replace_by(&temporary, path, text);
    if replaced.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    replaced
}

fn replace_by(temporary: &Path, path: &Path, text: &[u8]) -> Result<(), NetworkError> {
    let mut options = std::fs::File::options();
    options.create(true).truncate(true).write(true).mode(0o600);
    faults::within(Step::WriteNetworkRecord, || {
        let opened = options.open(temporary);
        let written = opened.and_then(|mut file| file.write_all(text));
        written.map_err(file_error("write", temporary))
    })?;
    faults::within(Step::NameNetworkRecord, || {
        std::fs::rename(temporary, path).map_err(file_error("write", path))
    })
}
