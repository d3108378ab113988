// SPDX-License-Identifier: Apache-2.0
//! How a pod's owner saves it: `CheckpointPod`.
//!
//! ```text
//! refuse what cannot be saved -> freeze the containers -> the VMM saves -> thaw -> sync -> manifest
//! ```
//! The containers are frozen by the guest's kernel before the VM stops, so in the copy only agent and kernel run until a
//! container is started. Whatever happens, the VM goes on and the containers are thawed: the VMM resumes by itself, the
//! owner thaws after every outcome, and if the daemon dies meanwhile, the agent does when its lease is over.

use std::fs::File;
use std::path::Path;
use std::sync::PoisonError;
use std::time::Duration;

use bulkhead_guest::agent::AgentError;
use bulkhead_host::control::{self, ControlError};
use bulkhead_host::launch::Launcher;
use bulkhead_host::{Guest, saved};
use bulkhead_records::Sum;
use bulkhead_text::chain;
use bulkhead_vmm::config::KernelSum;
use tokio::time::Instant;

use super::Owner;
use super::template::sources;
use crate::pod::checkpoint::{CheckpointError, Draft, Manifest, SavedLayer, Wanted, fit};
use crate::pod::errors::PodError;
use crate::pod::life::record::ContainerRecord;
use crate::pod::registry::find;

/// For how much longer than the checkpoint may take the agent keeps containers frozen if it hears nothing: the time in
/// which a copy must be brought back and told so.
const LEASE: Duration = Duration::from_secs(120);

impl Owner {
    /// Saves the pod.
    pub(super) async fn checkpoint(&mut self, wanted: &Wanted) -> Result<(), PodError> {
        let guest = self.ledger.ready_guest("a checkpoint")?;
        let containers = self.chosen(&wanted.containers)?;
        let pod = self.ledger.pod().clone();
        let refused = |why| CheckpointError::Refused {
            id: pod.id.clone(),
            why,
        };
        if let Some(why) = fit::obstacle(&pod, &containers) {
            return Err(refused(why).into());
        }
        let launcher = &self.shared.host.launcher;
        if sources(launcher).is_none_or(|now| now != pod.made_from) {
            return Err(refused(
                "this node has another VMM, guest kernel or agent than when the pod was started; start the pod anew"
                    .to_owned(),
            )
            .into());
        }
        let begun = Instant::now();
        let (kernel, modules) = self.sums()?;
        let layers = self.saved_layers()?;
        let draft = tokio::task::block_in_place(|| Draft::begin(&wanted.directory))?;
        let paused = self
            .save(&guest, &containers, kernel, &draft, wanted)
            .await?;
        let id = pod.id.clone();
        let manifest = Manifest::new(kernel, modules, pod, containers, layers);
        let completed = tokio::task::spawn_blocking(move || draft.complete(&manifest)).await;
        completed.map_err(|_| CheckpointError::Panicked)??;
        tracing::info!(
            pod = id,
            directory = %wanted.directory.display(),
            ?paused,
            total = ?begun.elapsed(),
            "checkpoint is complete"
        );
        Ok(())
    }

    /// The containers with these ids, which must be all that run.
    fn chosen(&self, ids: &[String]) -> Result<Vec<ContainerRecord>, PodError> {
        let known = self.ledger.containers();
        let mut chosen: Vec<ContainerRecord> = Vec::new();
        for id in ids {
            let (id, record) = find(known, id, "container")?;
            if !record.state.is_running() {
                return Err(PodError::container_is(record, "a checkpoint"));
            }
            if chosen.iter().any(|one| one.id == *id) {
                return Err(CheckpointError::Containers(format!("has {id} twice")).into());
            }
            chosen.push(record.clone());
        }
        let is_left = |one: &&ContainerRecord| {
            one.state.is_running() && !chosen.iter().any(|known| known.id == one.id)
        };
        if chosen.is_empty() {
            return Err(CheckpointError::Containers("is empty".to_owned()).into());
        }
        match known.values().find(is_left) {
            None => Ok(chosen),
            Some(one) => Err(CheckpointError::Refused {
                id: one.pod_id.clone(),
                why: format!(
                    "container {} runs and is not in container_ids: the containers of a VM are saved together",
                    one.id
                ),
            }
            .into()),
        }
    }

    /// What the guest's kernel and its modules are. They are read once, as long as they do not change.
    pub(super) fn sums(&self) -> Result<(KernelSum, Sum), CheckpointError> {
        let launcher = &self.shared.host.launcher;
        let now = sources(launcher);
        let known = self.shared.guest_sums.lock();
        let mut known = known.unwrap_or_else(PoisonError::into_inner);
        if let Some((of, kernel, modules)) = &*known
            && now.as_ref() == Some(of)
        {
            return Ok((*kernel, modules.clone()));
        }
        let (kernel, modules) = tokio::task::block_in_place(|| read_sums(launcher))?;
        *known = now.map(|now| (now, kernel, modules.clone()));
        Ok((kernel, modules))
    }

    fn saved_layers(&self) -> Result<Vec<SavedLayer>, PodError> {
        let images = &self.shared.host.images;
        let layers = self.ledger.pod().layers.iter();
        layers
            .map(|(diff_id, extent)| {
                Ok(SavedLayer {
                    diff_id: diff_id.clone(),
                    extent: *extent,
                    sum: images.layer_sum(diff_id)?,
                })
            })
            .collect()
    }

    /// Freezes the containers, lets the VMM save, and thaws them. Returns for how long the VM stood still.
    async fn save(
        &self,
        guest: &Guest,
        containers: &[ContainerRecord],
        kernel: KernelSum,
        draft: &Draft,
        wanted: &Wanted,
    ) -> Result<Duration, PodError> {
        let lost = || PodError::Lost {
            id: self.ledger.pod().id.clone(),
        };
        let ids = containers.iter().map(|one| one.id.clone()).collect();
        let left = left_until(wanted.until)?;
        let saving = async {
            guest
                .agent
                .freeze(ids, left.saturating_add(LEASE))
                .await
                .map_err(|error| self.not_frozen(error))?;
            self.save_frozen(guest, kernel, draft, wanted).await
        };
        let saved = tokio::select! {
            saved = saving => saved,
            () = guest.process.ended() => return Err(lost()),
        };
        // Also after a failure, which may have come after the guest froze them.
        let thawed = tokio::select! {
            thawed = guest.agent.thaw() => thawed,
            () = guest.process.ended() => return Err(lost()),
        };
        match (saved, thawed) {
            (Err(error), Err(also)) => {
                self.ledger
                    .complain("thaw after a checkpoint that failed", &also);
                Err(error)
            }
            (Err(error), Ok(())) => Err(error),
            (Ok(_), Err(source)) => Err(self.guest_error(source)),
            (Ok(paused), Ok(())) => Ok(paused),
        }
    }

    async fn save_frozen(
        &self,
        guest: &Guest,
        kernel: KernelSum,
        draft: &Draft,
        wanted: &Wanted,
    ) -> Result<Duration, PodError> {
        let clone = |file: &File| {
            file.try_clone().map_err(|source| CheckpointError::File {
                path: wanted.directory.clone(),
                source,
            })
        };
        let files = control::CheckpointFiles {
            state: clone(&draft.state)?,
            memory: clone(&draft.memory)?,
            scratch: clone(&draft.scratch)?,
        };
        let limit = left_until(wanted.until)?;
        let _hold = guest.pulse.hold();
        let saved = control::checkpoint(guest, kernel, files, limit).await;
        let saved = saved.map_err(|source| self.not_saved(source, draft, wanted))?;
        tracing::info!(
            pod = self.ledger.pod().id,
            memory_bytes = saved.memory_bytes,
            scratch_bytes = saved.scratch_bytes,
            "VM is saved"
        );
        Ok(Duration::from_micros(saved.paused_us))
    }

    fn not_frozen(&self, error: AgentError) -> PodError {
        if !error.is_unknown_call() {
            return self.guest_error(error);
        }
        CheckpointError::Refused {
            id: self.ledger.pod().id.clone(),
            why: "its agent is of an earlier version; start the pod anew".to_owned(),
        }
        .into()
    }

    fn not_saved(&self, source: ControlError, draft: &Draft, wanted: &Wanted) -> CheckpointError {
        if Instant::now() >= wanted.until {
            tracing::warn!(pod = self.ledger.pod().id, "{}", chain(&source));
            return CheckpointError::Late;
        }
        if draft.is_full() {
            let path = wanted.directory.clone();
            return CheckpointError::Full { path, source };
        }
        CheckpointError::Save(source)
    }
}

fn read_sums(launcher: &Launcher) -> Result<(KernelSum, Sum), CheckpointError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| CheckpointError::File { path, source }
    };
    let kernel = saved::kernel_sum(&launcher.kernel).map_err(failed(&launcher.kernel))?;
    let modules = File::open(&launcher.modules).and_then(|file| Sum::of(&file));
    Ok((kernel, modules.map_err(failed(&launcher.modules))?))
}

fn left_until(until: Instant) -> Result<Duration, CheckpointError> {
    let left = until.saturating_duration_since(Instant::now());
    match left.is_zero() {
        true => Err(CheckpointError::Late),
        false => Ok(left),
    }
}
