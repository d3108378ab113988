// SPDX-License-Identifier: Apache-2.0
//! The record of an attached network. It is enough to check the network and to tear it down, even if the configuration
//! has changed. It is stored twice: in the pod's record, and as a file that is written before anything is made on the
//! host.

use std::collections::HashSet;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cni::{Conflist, Invocation};
use crate::failure::{NetworkError, file_error};

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

    /// Writes the record into `directory`. Replaces an earlier one of the same pod.
    pub(crate) fn write(&self, directory: &Path) -> Result<(), NetworkError> {
        let path = path_of(directory, &self.pod_id);
        let text = serde_json::to_vec(self).map_err(|e| file_error("write", &path)(e.into()))?;
        replace(&path, &text)
    }

    /// Removes the file. It is no error if it does not exist.
    pub(crate) fn remove(&self, directory: &Path) -> Result<(), NetworkError> {
        let path = path_of(directory, &self.pod_id);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(file_error("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    /// All records in `directory` whose pods are not among `pods`.
    pub(crate) fn all_but(directory: &Path, pods: &HashSet<String>) -> Vec<Self> {
        let entries = std::fs::read_dir(directory);
        let paths = entries
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path());
        let records = paths.filter_map(|path| {
            let bytes = std::fs::read(path).ok()?;
            serde_json::from_slice::<Self>(&bytes).ok()
        });
        records
            .filter(|record| !pods.contains(&record.pod_id))
            .collect()
    }
}

fn path_of(directory: &Path, pod_id: &str) -> PathBuf {
    directory.join(format!("{pod_id}.json"))
}

/// Replaces a file in one step. Only root may read it, because configurations of plugins may contain secrets.
pub fn replace(path: &Path, text: &[u8]) -> Result<(), NetworkError> {
    let temporary = path.with_extension("new");
    let mut options = std::fs::File::options();
    options.create(true).truncate(true).write(true).mode(0o600);
    options
        .open(&temporary)
        .and_then(|mut file| file.write_all(text))
        .map_err(file_error("write", &temporary))?;
    std::fs::rename(&temporary, path).map_err(file_error("write", path))
}
