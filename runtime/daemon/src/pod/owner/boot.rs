// SPDX-License-Identifier: Apache-2.0
//! How a pod boots: it takes resources of the host, one after the other, until its guest is configured.
//!
//! ```text
//! run directory, state directory, network, cgroup, VMM, file server
//! ```
//! [`super::teardown`] releases them in reverse order. If the caller goes away, the boot is given up: while the guest
//! boots at once, otherwise after the current step.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_faults::{self as faults, Step};
use bulkhead_guest::protocol;
use bulkhead_host::control::Extent;
use bulkhead_host::launch::{self, Beginning, LaunchError, Machine, Net, Starting};
use bulkhead_host::process::Identity;
use bulkhead_host::template::Template;
use bulkhead_host::{Files, Guest, saved as host};
use bulkhead_network::{Attachment, NetworkRecord};
use bulkhead_text::{chain, hex};
use bulkhead_vmm::extent::SECTOR_BYTES;

use super::restore::BringBack;
use super::{Owner, template};
use crate::clock::now;
use crate::pod::admission::Turn;
use crate::pod::checkpoint::CheckpointError;
use crate::pod::errors::{BootError, PodError};
use crate::pod::life::record::{Held, PodRecord, VmSize, scratch_file};
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

impl Owner {
    /// Boots the pod until its guest is configured, or brings it back from a checkpoint. After an error the caller of this
    /// function removes the pod.
    pub(super) async fn boot(
        &mut self,
        from: Option<&BringBack>,
        turn: &Turn,
        caller: &mut Answer<()>,
    ) -> Result<(), BootError> {
        let booted = self.boot_from(from, turn, caller).await;
        if let (Err(_), Some(from)) = (&booted, from) {
            self.give_up(from);
        }
        booted
    }

    async fn boot_from(
        &mut self,
        from: Option<&BringBack>,
        turn: &Turn,
        caller: &mut Answer<()>,
    ) -> Result<(), BootError> {
        let started = Instant::now();
        let plan = self.plan()?;
        // A VM that is brought back has the size that it had.
        let size = from.map_or(plan.size, |from| from.saved.manifest.pod.size);
        let PodRecord { id, spec, .. } = self.ledger.pod();
        let request = wire::attach_request(id, spec);
        let network = self.shared.host.network.plan(request).await?;
        let host = &self.shared.host;
        let id = &self.ledger.pod().id;
        let name = id.get(..RUN_NAME_DIGITS).unwrap_or(id);
        let run = host.run_pods.join(name);
        let state = host.state_pods.join(id);
        self.ledger.change_pod(|pod| {
            pod.size = size;
            pod.allowance = plan.allowance;
            pod.held.push(Held::RunDirectory(run.clone()));
            pod.held.push(Held::StateDirectory(state.clone()));
            pod.held.push(Held::Network(Box::new(network.clone())));
        })?;
        for path in [&run, &state] {
            let made = faults::within(Step::MakeDirectory, || launch::make_directory(path));
            made.map_err(|source| BootError::Directory {
                path: path.clone(),
                source,
            })?;
        }
        let restored = match from {
            Some(from) => Some((from, self.prepare(from).map_err(not_brought_back)?)),
            None => None,
        };
        let scratch = scratch_file(&state);
        let saved_scratch = from.map(|from| from.saved.scratch.try_clone());
        let saved_scratch = saved_scratch.transpose().map_err(|source| {
            not_brought_back(CheckpointError::File {
                path: scratch.clone(),
                source,
            })
        })?;
        let attachment = self
            .attach_and_make_scratch(network, &scratch, saved_scratch)
            .await?;
        let prepared = started.elapsed();
        if caller.is_closed() {
            return Err(BootError::Abandoned);
        }
        let vm = Vm {
            files: Files::new(run),
            attachment,
            scratch,
            cgroup: plan.cgroup,
            size,
            user: self.take_user()?,
        };
        let (guest, template, containers) = match restored {
            Some((from, mut containers)) => {
                let layers = std::mem::take(&mut containers.layers);
                let saved = from.saved.for_vmm().map_err(not_brought_back)?;
                let saved = Origin::Saved(saved, layers);
                let guest = self.start_vm(&vm, saved, turn, caller).await?;
                (guest, None, Some(containers))
            }
            None => {
                let (guest, template) = self.fork_or_boot(&vm, turn, caller).await?;
                (guest, template, None)
            }
        };
        let configuring = Instant::now();
        let configured = tokio::select! {
            configured = self.configure(&guest, &vm, template.as_ref(), from) => configured,
            () = caller.closed() => Err(BootError::Abandoned),
        };
        if let Err(error) = configured {
            guest.process.kill();
            guest.process.ended().await;
            return Err(error);
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
            restored = from.is_some(),
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

    /// Starts the VM and waits for its agent: forked from a template if there is one, and booted if not, or if that fails. Also
    /// returns the template that it was forked from.
    async fn fork_or_boot(
        &mut self,
        vm: &Vm,
        turn: &Turn,
        caller: &mut Answer<()>,
    ) -> Result<(Guest, Option<Arc<Template>>), BootError> {
        let shared = Arc::clone(&self.shared);
        let templates = &shared.host.templates;
        // Half of the time is left for a boot.
        let all = turn.patience.boot_until(shared.host.launcher.longest());
        let now = tokio::time::Instant::now();
        let until = now + all.saturating_duration_since(now) / 2;
        let namespace = self.ledger.pod().spec.name.namespace.clone();
        let template = tokio::select! {
            template = template::get(&shared, &vm.size, &namespace, until) => template,
            () = caller.closed() => return Err(BootError::Abandoned),
        };
        let Some(template) = template else {
            let guest = self.start_vm(vm, Origin::Boot, turn, caller).await?;
            templates.count(false, false);
            return Ok((guest, None));
        };
        let fork = Origin::Template(Arc::clone(&template));
        let error = match self.start_vm(vm, fork, turn, caller).await {
            Ok(guest) => {
                templates.count(true, false);
                return Ok((guest, Some(template)));
            }
            Err(error) if is_of_fork(&error) => error,
            Err(error) => return Err(error),
        };
        tracing::warn!(
            pod = self.ledger.pod().id,
            "the pod's VM could not be forked, so it boots: {}",
            chain(&error)
        );
        templates.give_up(&template);
        self.forget_vmm(vm).await?;
        let guest = self.start_vm(vm, Origin::Boot, turn, caller).await?;
        templates.count(false, true);
        Ok((guest, None))
    }

    /// Starts the VM and waits for its agent. After an error the VMM has ended.
    async fn start_vm(
        &mut self,
        vm: &Vm,
        origin: Origin,
        turn: &Turn,
        caller: &mut Answer<()>,
    ) -> Result<Guest, BootError> {
        let (beginning, layers) = match origin {
            Origin::Boot => (Beginning::Boot, None),
            Origin::Template(template) => (Beginning::Fork(template), None),
            Origin::Saved(saved, layers) => (Beginning::Restore(saved), Some(layers)),
        };
        let starting = self.start_vmm(vm, beginning, turn.waited).await?;
        let process = Arc::clone(starting.process());
        let until = turn
            .patience
            .boot_until(self.shared.host.launcher.longest());
        let booting = async {
            match layers {
                Some(layers) => starting.restore(layers, until).await,
                None => starting.boot(until).await,
            }
        };
        let booted = tokio::select! {
            booted = booting => booted.map_err(|error| launch_failed(turn.waited, error)),
            () = caller.closed() => Err(BootError::Abandoned),
        };
        if booted.is_err() {
            process.kill();
            process.ended().await;
        }
        booted
    }

    /// Attaches the network and makes the scratch disk, an empty one or a copy of `saved`, both at the same time: neither
    /// depends on the other.
    async fn attach_and_make_scratch(
        &mut self,
        network: NetworkRecord,
        scratch: &Path,
        saved: Option<File>,
    ) -> Result<Attachment, BootError> {
        let shared = Arc::clone(&self.shared);
        let path = scratch.to_owned();
        let bytes = self.ledger.pod().size.scratch_bytes;
        let making = tokio::task::spawn_blocking(move || {
            let scratch = &shared.host.scratch;
            faults::within(Step::MakeScratch, || {
                let made = match saved {
                    Some(saved) => scratch.bring_back(&saved, &path),
                    None => scratch.make(Purpose::Scratch, &path, bytes),
                };
                made.map_err(BootError::from)
            })
        });
        let attaching = self.shared.host.network.attach(network);
        let (attached, made) = tokio::join!(attaching, making);
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
        made.map_err(|_| BootError::Panicked)??;
        Ok(attachment)
    }

    /// Starts the VMM process. The VM itself starts afterwards, when the process is recorded and limited.
    async fn start_vmm(
        &mut self,
        vm: &Vm,
        beginning: Beginning,
        waited: Duration,
    ) -> Result<Starting, BootError> {
        let net = match &vm.attachment.tap {
            Some(tap) => Some(Net {
                tap: tap.try_clone().map_err(BootError::Tap)?,
                mac: vm.attachment.mac,
                mtu: vm.attachment.mtu,
            }),
            None => None,
        };
        let size = match &beginning {
            Beginning::Fork(template) => vm.size.forked(template.memory_mib),
            _ => vm.size,
        };
        // As they are before they are opened.
        let made_from = template::sources(&self.shared.host.launcher).unwrap_or_default();
        self.ledger.change_pod(|pod| {
            pod.size = size;
            pod.made_from = made_from;
        })?;
        let machine = Machine {
            vcpus: size.vcpus,
            boot_vcpus: size.boot_vcpus,
            memory_mib: size.memory_mib,
            memory_max_mib: size.memory_max_mib,
            scratch: Some(vm.scratch.clone()),
            net,
            user: vm.user,
            beginning,
        };
        faults::before(Step::SpawnVmm)?;
        let launcher = &self.shared.host.launcher;
        let starting = launcher.spawn(vm.files.clone(), machine).await;
        let starting = starting.map_err(|error| launch_failed(waited, error))?;
        let identity = starting.process().identity();
        if let Err(error) = self.hold_vmm(identity, vm.cgroup.clone()).await {
            starting.process().kill();
            starting.process().ended().await;
            return Err(error);
        }
        Ok(starting)
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

    /// Gives back what a VMM took that has ended before its guest was the pod's.
    async fn forget_vmm(&mut self, vm: &Vm) -> Result<(), BootError> {
        if let Some(path) = &vm.cgroup {
            let removed = self.shared.host.cgroups.remove(path).await;
            removed.map_err(|_| BootError::Panicked)?;
        }
        let is_of_vmm = |held: &Held| matches!(held, Held::Vmm(_) | Held::Cgroup(_));
        Ok(self
            .ledger
            .change_pod(|pod| pod.held.retain(|held| !is_of_vmm(held)))?)
    }

    /// Takes a user for the VM.
    fn take_user(&mut self) -> Result<u32, BootError> {
        let users = &self.shared.host.users;
        let user = users.take().ok_or(BootError::NoUser)?;
        let held = self
            .ledger
            .change_pod(|pod| pod.held.push(Held::User(user)));
        match held {
            Ok(()) => Ok(user),
            Err(error) => {
                users.give_back(user);
                Err(error.into())
            }
        }
    }

    /// Stores the identity of the VMM process and moves the process into its cgroup, before it becomes a VM.
    async fn hold_vmm(
        &mut self,
        identity: Identity,
        cgroup: Option<PathBuf>,
    ) -> Result<(), BootError> {
        faults::after(Step::SpawnVmm)?;
        self.ledger.change_pod(|pod| {
            pod.held.extend(cgroup.clone().map(Held::Cgroup));
            pod.held.push(Held::Vmm(identity));
        })?;
        if let Some(path) = cgroup {
            let limits = self.ledger.host_limits();
            let cgroups = &self.shared.host.cgroups;
            cgroups.make(&path, &limits, identity.pid).await?;
        }
        Ok(())
    }
}

/// What a pod's VM begins with.
enum Origin {
    Boot,
    Template(Arc<Template>),
    /// With what goes on its image disk before it runs.
    Saved(host::Saved, Vec<(File, Extent)>),
}

fn not_brought_back(error: impl Into<PodError>) -> BootError {
    BootError::BringBack(Box::new(error.into()))
}

/// What the pod's VM is made of, whether it is forked or boots.
struct Vm {
    files: Files,
    attachment: Attachment,
    scratch: PathBuf,
    cgroup: Option<PathBuf>,
    /// What it has when it is the pod's.
    size: VmSize,
    user: u32,
}

/// Whether a boot may succeed where this fork failed. Not if there is no time left for it.
fn is_of_fork(error: &BootError) -> bool {
    match error {
        BootError::Launch { source, .. } => !matches!(**source, LaunchError::Timeout { .. }),
        _ => false,
    }
}

fn launch_failed(waited: Duration, error: LaunchError) -> BootError {
    BootError::Launch {
        waited,
        source: Box::new(error),
    }
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
