// SPDX-License-Identifier: Apache-2.0
//! Warmed pods: checkpoints of pods that had warmed up, as which new pods of the same kind can begin.
//!
//! ```text
//! DIRECTORY/NAMESPACE/NAME    what `CheckpointPod` writes; see [`super::checkpoint`]
//! ```
//! A pod names one with an annotation ([`ANNOTATION`]). Pods of other namespaces cannot: its memory has what the saved pod
//! knew. The VM goes on where it was saved, as another pod. The containers are frozen in it, and no client sees them until it
//! asks for one with the same image, command, environment and all else that a process is started with; then it is that one
//! ([`super::owner`]). A pod or container that is not as what was saved begins as any other, with a warning, and is counted.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::checkpoint::{CheckpointError, Saved, fit};
use super::life::spec::PodSpec;
use super::volumes::kind::is_label;

/// The annotation of a pod with the name of a warmed pod, a DNS label.
pub const ANNOTATION: &str = "bulkhead.dev/warmed";

/// The warmed pods of this node.
#[derive(Debug)]
pub struct Warmed {
    directory: Option<PathBuf>,
    counts: Mutex<Counts>,
}

/// How pods and containers began that were to begin warmed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    pub pods: u64,
    pub cold_pods: u64,
    pub containers: u64,
    pub cold_containers: u64,
}

/// What there is, for status answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Where they are. `None`: pods cannot begin warmed.
    pub directory: Option<PathBuf>,
    #[serde(flatten)]
    pub counts: Counts,
}

impl Status {
    /// For people: how pods began.
    pub fn sentence(&self) -> String {
        let Counts {
            pods,
            cold_pods,
            containers,
            cold_containers,
        } = self.counts;
        match &self.directory {
            None => "no pod begins warmed (sandbox.warmed is not set)".to_owned(),
            Some(directory) => format!(
                "{pods} pods and {containers} containers began warmed, from {}; {cold_pods} pods and {cold_containers} \
                 containers were to, and could not: the daemon's log says why",
                directory.display()
            ),
        }
    }
}

impl Warmed {
    /// `directory` is where they are; without one, there are none.
    pub fn new(directory: Option<PathBuf>) -> Self {
        Self {
            directory,
            counts: Mutex::default(),
        }
    }

    /// The warmed pod as which this one is to begin. `None` if it names none. Blocks.
    pub fn find(&self, spec: &PodSpec) -> Result<Option<Saved>, CheckpointError> {
        let Some(name) = spec.annotations.get(ANNOTATION) else {
            return Ok(None);
        };
        let directory = self.directory.as_ref().ok_or(CheckpointError::NoneWarmed)?;
        let namespace = &spec.name.namespace;
        if let Some(wrong) = [namespace, name].into_iter().find(|one| !is_label(one)) {
            return Err(CheckpointError::NoLabel(wrong.clone()));
        }
        let saved = Saved::open(&directory.join(namespace).join(name))?;
        fit::warmed(&saved.manifest.pod.spec, spec)?;
        Ok(Some(saved))
    }

    pub fn count_pod(&self, is_warm: bool) {
        let mut counts = self.counts();
        counts.pods += u64::from(is_warm);
        counts.cold_pods += u64::from(!is_warm);
    }

    pub fn count_container(&self, is_warm: bool) {
        let mut counts = self.counts();
        counts.containers += u64::from(is_warm);
        counts.cold_containers += u64::from(!is_warm);
    }

    pub fn status(&self) -> Status {
        Status {
            directory: self.directory.clone(),
            counts: *self.counts(),
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixtures;

    #[test]
    fn a_pod_finds_only_what_is_of_its_namespace() {
        let directory = tempfile::tempdir().unwrap();
        let warmed = Warmed::new(Some(directory.path().to_owned()));
        let mut spec = fixtures::pod_spec();
        assert!(warmed.find(&spec).unwrap().is_none(), "it names none");
        let mut said = |namespace: &str, name: &str| {
            spec.name.namespace = namespace.to_owned();
            spec.annotations.insert(ANNOTATION.into(), name.into());
            warmed.find(&spec).unwrap_err().to_string()
        };
        let missing = said("tests", "one");
        assert!(missing.contains("tests/one is no checkpoint"), "{missing}");
        for (namespace, name) in [("..", "one"), ("a/b", "one"), ("a", ".."), ("a", "")] {
            let said = said(namespace, name);
            assert!(said.ends_with("is no DNS label"), "{said}");
        }
        let off = Warmed::new(None).find(&spec).unwrap_err().to_string();
        assert!(off.contains("sandbox.warmed"), "{off}");
    }

    #[test]
    fn what_began_warmed_and_what_did_not_is_counted() {
        let warmed = Warmed::new(Some("/w".into()));
        for is_warm in [true, false, false] {
            warmed.count_pod(is_warm);
            warmed.count_container(!is_warm);
        }
        let status = warmed.status();
        let said = status.sentence();
        assert!(
            said.starts_with("1 pods and 2 containers began warmed, from /w; 2 pods and 1 "),
            "{said}"
        );
        let shown = serde_json::to_value(&status).unwrap();
        assert_eq!(shown["coldContainers"], 1);
        assert!(Warmed::new(None).status().sentence().contains("not set"));
    }
}
