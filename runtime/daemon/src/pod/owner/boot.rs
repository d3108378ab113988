// SPDX-License-Identifier: Apache-2.0
//! How a pod boots: it takes resources of the host, one after the other, until its guest is configured.
//!
//! ```text
//! run directory, state directory, network, cgroup, VMM, file server
//! ```
//! Or it takes over a VM that has all of this already ([`super::spare`]). [`super::teardown`] releases them in reverse order. If the caller goes away, the boot is given up: while the guest
//! boots at once, otherwise after the current step.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_faults::{self as faults, Step};
use bulkhead_guest::protocol;
use bulkhead_host::launch::{self, lost};
use bulkhead_host::template::Template;
use bulkhead_host::{Files, Guest};
use bulkhead_network::{Attachment, NetworkError, NetworkRecord};
use bulkhead_text::{chain, hex};
use bulkhead_vmm::extent::SECTOR_BYTES;

use super::limits::Plan;
use super::restore::{BringBack, Prepared, Way};
use super::vm::{Origin, Vm, launch_failed};
use super::{Owner, template};
use crate::clock::now;
use crate::pod::admission::Turn;
use crate::pod::checkpoint::CheckpointError;
use crate::pod::errors::{BootError, PodError};
use crate::pod::life::record::{Held, PodRecord, scratch_file};
use crate::pod::life::spec::PodSpec;
use crate::pod::life::state::PodEvent;
use crate::pod::plan::wire;
use crate::pod::request::Answer;
use crate::random::random;
use crate::scratch::Purpose;

/// How many digits of the id are in the run directory's name. It is short because the path of a unix socket has at most
/// 107 bytes.
pub const RUN_NAME_DIGITS: usize = 16;
/// The host's DNS settings, for pods without their own.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// A VM that only has to be configured.
pub(super) struct Made {
    pub vm: Vm,
    pub guest: Guest,
    /// What it was forked from.
    pub template: Option<Arc<Template>>,
    /// What a checkpoint had, if the pod is brought back.
    pub containers: Option<Prepared>,
    /// The cgroup that it is still in, if that is not the pod's.
    pub old_cgroup: Option<PathBuf>,
    /// How long the network and the scratch disk took.
    pub prepared: Duration,
}

impl Owner {
    /// Boots the pod until its guest is configured, or brings it back from a checkpoint. After an error the caller of this
    /// function removes the pod.
    pub(super) async fn boot(
        &mut self,
        way: &Way,
        turn: &Turn,
        caller: &mut Answer<()>,
    ) -> Result<(), BootError> {
        let booted = self.boot_by(way, turn, caller).await;
        if let (Err(_), Some(from)) = (&booted, way.saved()) {
            self.give_up(from);
        }
        booted
    }

    async fn boot_by(
        &mut self,
        way: &Way,
        turn: &Turn,
        caller: &mut Answer<()>,
    ) -> Result<(), BootError> {
        let started = Instant::now();
        let from = way.saved();
        let plan = self.plan()?;
        let PodRecord { id, spec, .. } = self.ledger.pod();
        let request = wire::attach_request(id, spec);
        let network = self.shared.host.network.plan(request).await?;
        let spare = match way {
            Way::Saved(_) | Way::Boot => None,
            Way::Any => self.find_spare(&plan, &network),
        };
        let was_spare = spare.is_some();
        let Made {
            vm,
            guest,
            template,
            containers,
            old_cgroup,
            prepared,
        } = match spare {
            Some(spare) => self.take_over(spare, plan, network).await?,
            None => self.make_vm(way, plan, network, turn, caller).await?,
        };
        let configuring = Instant::now();
        let configured = tokio::select! {
            configured = self.configure(&guest, &vm, template.as_ref(), from) => configured,
            () = caller.closed() => Err(BootError::Abandoned),
        };
        let configured = match (configured, old_cgroup) {
            (Ok(()), Some(old)) => self.leave_cgroup(&guest, &old).await,
            (configured, _) => configured,
        };
        if let Err(error) = configured {
            let is_lost = error.is_lost_guest();
            let error = match error {
                BootError::Configure(error) if is_lost => {
                    let source = lost(&guest, "becoming the pod's", chain(&error)).await;
                    launch_failed(turn.waited, source)
                }
                error => error,
            };
            guest.process.kill();
            guest.process.ended().await;
            return Err(match template {
                Some(template) if is_lost => {
                    self.shared.host.templates.give_up(&template);
                    BootError::Fork(Box::new(error))
                }
                _ => error,
            });
        }
        let configuration = configuring.elapsed();
        let booted = started.elapsed();
        self.serve_guest(guest.clone());
        self.ledger.move_pod(&PodEvent::Booted)?;
        if let Some(containers) = containers {
            self.add_containers(&guest, containers);
        }
        tracing::info!(
            pod = self.ledger.pod().id,
            forked = self.ledger.pod().size.is_forked,
            spare = was_spare,
            restored = from.is_some(),
            warmed = from.is_some_and(|from| from.is_warmed),
            turn = ?turn.waited,
            ahead = turn.ahead,
            network_and_disk = ?prepared,
            vm_and_agent = ?booted.saturating_sub(prepared + configuration),
            configuration = ?configuration,
            total = ?started.elapsed(),
            "pod ready"
        );
        Ok(())
    }

    /// Takes all resources for the VM, one after the other, and starts it.
    async fn make_vm(
        &mut self,
        way: &Way,
        plan: Plan,
        network: NetworkRecord,
        turn: &Turn,
        caller: &mut Answer<()>,
    ) -> Result<Made, BootError> {
        let started = Instant::now();
        let from = way.saved();
        // A VM that is brought back has the size that it had.
        let size = from.map_or(plan.size, |from| from.saved.manifest.pod.size);
        let cgroup = plan.cgroup.clone();
        let (run, scratch) = self.make_directories(Plan { size, ..plan }, network.clone())?;
        let restored = match from {
            Some(from) => Some((from, self.prepare(from).map_err(not_brought_back)?)),
            None => None,
        };
        let saved_scratch = from.map(|from| from.saved.scratch.try_clone());
        let saved_scratch = saved_scratch.transpose().map_err(|source| {
            not_brought_back(CheckpointError::File {
                path: scratch.clone(),
                source,
            })
        })?;
        let shared = Arc::clone(&self.shared);
        let attaching = shared.host.network.attach(network, None);
        let attachment = self
            .attach_and_make_scratch(attaching, &scratch, saved_scratch)
            .await?;
        let prepared = started.elapsed();
        if caller.is_closed() {
            return Err(BootError::Abandoned);
        }
        let vm = Vm {
            files: Files::new(run),
            attachment,
            scratch,
            cgroup,
            size,
            user: self.take_user()?,
        };
        let (guest, template, containers) = match restored {
            Some((from, mut containers)) => {
                let layers = std::mem::take(&mut containers.layers);
                let saved = from.saved.for_vmm(from.is_warmed);
                let saved = saved.map_err(not_brought_back)?;
                let saved = Origin::Saved(saved, layers);
                let guest = self.start_vm(&vm, saved, turn, caller).await?;
                (guest, None, Some(containers))
            }
            None => {
                let (guest, template) = self.fork_or_boot(&vm, way, turn, caller).await?;
                (guest, template, None)
            }
        };
        Ok(Made {
            vm,
            guest,
            template,
            containers,
            old_cgroup: None,
            prepared,
        })
    }

    /// Makes the directories of a pod, and records what is planned for it. Returns the run directory and the path of the
    /// scratch disk.
    pub(super) fn make_directories(
        &mut self,
        plan: Plan,
        network: NetworkRecord,
    ) -> Result<(PathBuf, PathBuf), BootError> {
        let host = &self.shared.host;
        let id = &self.ledger.pod().id;
        let name = id.get(..RUN_NAME_DIGITS).unwrap_or(id);
        let run = host.run_pods.join(name);
        let state = host.state_pods.join(id);
        self.ledger.change_pod(|pod| {
            pod.size = plan.size;
            pod.allowance = plan.allowance;
            pod.held.push(Held::RunDirectory(run.clone()));
            pod.held.push(Held::StateDirectory(state.clone()));
            pod.held.push(Held::Network(Box::new(network)));
        })?;
        for path in [&run, &state] {
            let made = faults::within(Step::MakeDirectory, || launch::make_directory(path));
            made.map_err(|source| BootError::Directory {
                path: path.clone(),
                source,
            })?;
        }
        let scratch = scratch_file(&state);
        Ok((run, scratch))
    }

    /// Attaches the network and makes the scratch disk, an empty one or a copy of `saved`, both at the same time: neither
    /// depends on the other.
    pub(super) async fn attach_and_make_scratch(
        &mut self,
        attaching: impl Future<Output = Result<Attachment, NetworkError>>,
        scratch: &Path,
        saved: Option<File>,
    ) -> Result<Attachment, BootError> {
        let shared = Arc::clone(&self.shared);
        let path = scratch.to_owned();
        let bytes = self.ledger.pod().size.scratch_bytes;
        let making = tokio::task::spawn_blocking(move || {
            let scratch = &shared.host.scratch;
            faults::within(Step::MakeScratch, || match saved {
                Some(saved) => scratch
                    .bring_back(&saved, &path)
                    .map_err(|e| not_brought_back(CheckpointError::Scratch(e))),
                None => scratch
                    .make(Purpose::Scratch, &path, bytes)
                    .map_err(BootError::from),
            })
        });
        let (attached, made) = tokio::join!(attaching, making);
        let attachment = self.hold_attached(attached)?;
        made.map_err(|_| BootError::Panicked)??;
        Ok(attachment)
    }

    /// Records what became of an attempt to attach the pod to its network.
    pub(super) fn hold_attached(
        &mut self,
        attached: Result<Attachment, NetworkError>,
    ) -> Result<Attachment, BootError> {
        let attachment = match attached {
            Ok(attachment) => attachment,
            Err(error) => {
                // The network has undone what it made, or remembers it and tries again later. So the pod holds none.
                self.ledger.change_pod(PodRecord::release_network)?;
                return Err(error.into());
            }
        };
        let record = attachment.record.clone();
        let addresses = attachment.addresses.clone();
        self.ledger.change_pod(|pod| {
            pod.hold_network(record);
            pod.addresses = addresses;
        })?;
        Ok(attachment)
    }

    /// Makes the guest the pod's. The caller may drop the future at any time; then, and after an error, it must kill the VMM.
    async fn configure(
        &self,
        guest: &Guest,
        vm: &Vm,
        template: Option<&Arc<Template>>,
        from: Option<&BringBack>,
    ) -> Result<(), BootError> {
        let PodRecord { id, spec, .. } = self.ledger.pod();
        let configuration = configuration(id, spec, vm);
        if let Some(from) = from {
            let request = protocol::RestoreSandboxRequest {
                configuration: Some(configuration),
                containers: from.renamed(),
            };
            guest.agent.restore(request).await?;
            return self.limit_guest(guest).await;
        }
        guest.agent.configure(configuration).await?;
        // What a pod needs to grow, others do not use.
        if self.is_to_grow(&vm.size) {
            template::learn(template, guest).await;
        }
        self.size_fork(guest, &vm.size).await?;
        self.limit_guest(guest).await?;
        template::learn(template, guest).await;
        Ok(())
    }
}

fn not_brought_back(error: impl Into<PodError>) -> BootError {
    BootError::BringBack(Box::new(error.into()))
}

/// The first message to a guest: the pod's settings, the time, and entropy that no other guest gets.
fn configuration(id: &str, spec: &PodSpec, vm: &Vm) -> protocol::ConfigureSandboxRequest {
    let host = std::fs::read_to_string(RESOLV_CONF).unwrap_or_default();
    protocol::ConfigureSandboxRequest {
        clock_unix_nanoseconds: now(),
        entropy: random::<64>().to_vec().into(),
        machine_id: hex(&random::<16>()),
        scratch_sectors: vm.size.scratch_bytes / SECTOR_BYTES,
        ..wire::configuration(id, spec, &vm.attachment, &host)
    }
}
