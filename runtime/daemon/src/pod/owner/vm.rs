// SPDX-License-Identifier: Apache-2.0
//! The VM of a pod: its VMM process is started, recorded and limited, then it is forked from a template or boots, until its
//! agent answers.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_faults::{self as faults, Step};
use bulkhead_host::control::Extent;
use bulkhead_host::launch::{Beginning, LaunchError, Machine, Net, Starting};
use bulkhead_host::process::Identity;
use bulkhead_host::template::Template;
use bulkhead_host::{Files, Guest, saved as host};
use bulkhead_network::Attachment;
use bulkhead_text::chain;

use super::restore::Way;
use super::{Owner, template};
use crate::pod::admission::Turn;
use crate::pod::errors::BootError;
use crate::pod::life::record::{Held, VmSize};
use crate::pod::request::Answer;

/// What a pod's VM begins with.
pub(super) enum Origin {
    Boot,
    Template(Arc<Template>),
    /// With what goes on its image disk before it runs.
    Saved(host::Saved, Vec<(File, Extent)>),
}

/// What the pod's VM is made of, whether it is forked or boots.
pub(super) struct Vm {
    pub files: Files,
    pub attachment: Attachment,
    pub scratch: PathBuf,
    pub cgroup: Option<PathBuf>,
    /// What it has when it is the pod's.
    pub size: VmSize,
    pub user: u32,
}

impl Owner {
    /// Starts the VM and waits for its agent: forked from a template if there is one, and booted if not, or if that fails. Also
    /// returns the template that it was forked from.
    pub(super) async fn fork_or_boot(
        &mut self,
        vm: &Vm,
        way: &Way,
        turn: &Turn,
        caller: &mut Answer<()>,
    ) -> Result<(Guest, Option<Arc<Template>>), BootError> {
        let may_fork = matches!(way, Way::Any);
        let shared = Arc::clone(&self.shared);
        let templates = &shared.host.templates;
        // Half of the time is left for a boot.
        let all = turn.patience.boot_until(shared.host.launcher.longest());
        let now = tokio::time::Instant::now();
        let until = now + all.saturating_duration_since(now) / 2;
        let namespace = self.ledger.pod().spec.name.namespace.clone();
        let find = async {
            match may_fork {
                true => template::get(&shared, &vm.size, &namespace, until).await,
                false => None,
            }
        };
        let template = tokio::select! {
            template = find => template,
            () = caller.closed() => return Err(BootError::Abandoned),
        };
        let Some(template) = template else {
            let guest = self.start_vm(vm, Origin::Boot, turn, caller).await?;
            templates.count(false, !may_fork);
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
    pub(super) async fn start_vm(
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
    pub(super) fn take_user(&mut self) -> Result<u32, BootError> {
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

/// Whether a boot may succeed where this fork failed. Not if there is no time left for it.
fn is_of_fork(error: &BootError) -> bool {
    match error {
        BootError::Launch { source, .. } => !matches!(**source, LaunchError::Timeout { .. }),
        _ => false,
    }
}

pub(super) fn launch_failed(waited: Duration, error: LaunchError) -> BootError {
    BootError::Launch {
        waited,
        source: Box::new(error),
    }
}
