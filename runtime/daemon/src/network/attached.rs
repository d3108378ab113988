// SPDX-License-Identifier: Apache-2.0
//! What is remembered of an attached network: enough to check it and to take it down, whatever the configuration
//! says by then. Twice: with the pod, and as a file that is there before anything is taken from the host.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::cni::{Conflist, Invocation};
use super::{Network, NetworkError, file_error};

/// All that is needed to take a pod's network down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    pub(super) pod_id: String,
    /// `None`: nothing was made.
    pub(super) attached: Option<AttachedRecord>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedRecord {
    pub netns: PathBuf,
    pub conflist: Conflist,
    pub invocation: Invocation,
    /// CNI's result, JSON.
    pub result: Option<String>,
}

impl NetworkRecord {
    pub(super) fn describe(&self) -> serde_json::Value {
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
}

impl Network {
    pub(super) fn record_path(&self, pod_id: &str) -> PathBuf {
        self.config.cache_dir.join(format!("{pod_id}.json"))
    }

    pub(super) fn remember(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        let path = self.record_path(&record.pod_id);
        let text = serde_json::to_vec(record).map_err(|e| file_error("write", &path)(e.into()))?;
        self.write(&path, &text)
    }

    /// Replaces a file at once. Plugins' configurations may have secrets.
    pub(super) fn write(&self, path: &std::path::Path, text: &[u8]) -> Result<(), NetworkError> {
        let temporary = path.with_extension("new");
        let mut options = std::fs::File::options();
        options.create(true).truncate(true).write(true).mode(0o600);
        options
            .open(&temporary)
            .and_then(|mut file| file.write_all(text))
            .map_err(file_error("write", &temporary))?;
        std::fs::rename(&temporary, path).map_err(file_error("write", path))
    }
}
