// SPDX-License-Identifier: Apache-2.0
//! How a pod boots: it takes resources of the host, one after the other, until its guest is configured.
//!
//! ```text
//! run directory, state directory, network, cgroup, VMM, file server
//! ```
//! [`super::teardown`] releases them in reverse order. If the caller goes away, the boot is given up: while the guest
//! boots at once, otherwise after the current step.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_faults::{self as faults, Step};
use bulkhead_guest::protocol;
use bulkhead_host::launch::{self, LaunchError, Machine, Net, Starting};
use bulkhead_host::process::Identity;
use bulkhead_host::{Files, Guest};
use bulkhead_network::{Attachment, NetworkRecord};
use bulkhead_text::hex;

use super::Owner;
use crate::clock::now;
use crate::pod::admission::Turn;
use crate::pod::errors::BootError;
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

impl Owner {
    /// Boots the pod until its guest is configured. After an error the caller of this function removes the pod.
    pub(super) async fn boot(
        &mut self,
        turn: &Turn,
        caller: &mut Answer<()>,
    ) -> Result<(), BootError> {
        let started = Instant::now();
        let plan = self.plan()?;
        let PodRecord { id, spec, .. } = self.ledger.pod();
        let request = wire::attach_request(id, spec);
        let network = self.shared.host.network.plan(request).await?;
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
            pod.held.push(Held::Network(Box::new(network.clone())));
        })?;
        for path in [&run, &state] {
            let made = faults::within(Step::MakeDirectory, || launch::make_directory(path));
            made.map_err(|source| BootError::Directory {
                path: path.clone(),
                source,
            })?;
        }
        let scratch = scratch_file(&state);
        let attachment = self.attach_and_make_scratch(network, &scratch).await?;
        let prepared = started.elapsed();
        if caller.is_closed() {
            return Err(BootError::Abandoned);
        }
        let starting = self
            .start_vmm(
                Files::new(run),
                &attachment,
                scratch,
                plan.cgroup,
                turn.waited,
            )
            .await?;
        let process = Arc::clone(starting.process());
        let booted = tokio::select! {
            booted = self.boot_guest(starting, &attachment, turn) => booted,
            () = caller.closed() => Err(BootError::Abandoned),
        };
        let (guest, configuration) = match booted {
            Ok(booted) => booted,
            Err(error) => {
                process.kill();
                process.ended().await;
                return Err(error);
            }
        };
        let booted = started.elapsed();
        self.serve_guest(guest);
        self.ledger.move_pod(&PodEvent::Booted)?;
        tracing::info!(
            pod = self.ledger.pod().id,
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

    /// Attaches the network and makes the scratch disk, both at the same time: neither depends on the other.
    async fn attach_and_make_scratch(
        &mut self,
        network: NetworkRecord,
        scratch: &Path,
    ) -> Result<Attachment, BootError> {
        let shared = Arc::clone(&self.shared);
        let path = scratch.to_owned();
        let bytes = self.ledger.pod().size.scratch_bytes;
        let making = tokio::task::spawn_blocking(move || {
            let scratch = &shared.host.scratch;
            faults::within(Step::MakeScratch, || {
                let made = scratch.make(Purpose::Scratch, &path, bytes);
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

    /// Starts the VMM process. The VM itself starts in `boot_guest`, after the process is recorded and limited.
    async fn start_vmm(
        &mut self,
        files: Files,
        attachment: &Attachment,
        scratch: PathBuf,
        cgroup: Option<PathBuf>,
        waited: Duration,
    ) -> Result<Starting, BootError> {
        let net = match &attachment.tap {
            Some(tap) => Some(Net {
                tap: tap.try_clone().map_err(BootError::Tap)?,
                mac: attachment.mac,
                mtu: attachment.mtu,
            }),
            None => None,
        };
        let size = self.ledger.pod().size;
        let machine = Machine {
            vcpus: size.vcpus,
            boot_vcpus: size.boot_vcpus,
            memory_mib: size.memory_mib,
            memory_max_mib: size.memory_max_mib,
            scratch,
            net,
            user: self.take_user()?,
        };
        faults::before(Step::SpawnVmm)?;
        let starting = self.shared.host.launcher.spawn(files, machine).await;
        let starting = starting.map_err(|error| launch_failed(waited, error))?;
        if let Err(error) = self.hold_vmm(starting.process().identity(), cgroup).await {
            starting.process().kill();
            starting.process().ended().await;
            return Err(error);
        }
        Ok(starting)
    }

    /// Boots the VM and configures its guest. Also returns how long the configuration took. The caller may drop the
    /// future at any time; then, and after an error, it must kill the VMM.
    async fn boot_guest(
        &self,
        starting: Starting,
        attachment: &Attachment,
        turn: &Turn,
    ) -> Result<(Guest, Duration), BootError> {
        let waited = turn.waited;
        let longest = self.shared.host.launcher.longest();
        let guest = starting.boot(turn.patience.boot_until(longest)).await;
        let guest = guest.map_err(|error| launch_failed(waited, error))?;
        let started = Instant::now();
        let PodRecord { id, spec, .. } = self.ledger.pod();
        let request = configuration(id, spec, attachment);
        guest.agent.configure(request).await?;
        self.limit_guest(&guest).await?;
        Ok((guest, started.elapsed()))
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

fn launch_failed(waited: Duration, error: LaunchError) -> BootError {
    BootError::Launch {
        waited,
        source: Box::new(error),
    }
}

/// The first message to a guest: the pod's settings, the time, and entropy that no other guest gets.
fn configuration(
    id: &str,
    spec: &PodSpec,
    attachment: &Attachment,
) -> protocol::ConfigureSandboxRequest {
    let host = std::fs::read_to_string(RESOLV_CONF).unwrap_or_default();
    protocol::ConfigureSandboxRequest {
        clock_unix_nanoseconds: now(),
        entropy: random::<64>().to_vec().into(),
        machine_id: hex(&random::<16>()),
        ..wire::configuration(id, spec, attachment, &host)
    }
}
