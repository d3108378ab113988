// SPDX-License-Identifier: Apache-2.0
//! What a pod takes on the host, in order, and how it gives it back.
//!
//! ```text
//! run directory, state directory, network, cgroup, VMM, file server      each on the Held stack before the next
//! ```
//! A stop gives back all but the directories, a removal everything, both from the top of the stack. A boot whose caller
//! has gone is given up between two steps; while the guest boots, at once.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_guest::protocol;
use bulkhead_host::cgroup::CgroupError;
use bulkhead_host::launch::{self, LaunchError, Machine, Net, Starting};
use bulkhead_host::process::{Identity, VmmProcess};
use bulkhead_host::{Files, Guest, control};
use bulkhead_network::Attachment;
use bulkhead_text::hex;

use super::admission::Turn;
use super::logging::LogTask;
use super::owner::{Answer, Owner};
use super::record::Held;
use super::spec::{Dns, PidMode, PodSpec};
use super::state::{ContainerEvent, KILLED_EXIT_CODE, PodEvent, PodState};
use super::{BootError, NoticeKind, PodError, signal, wire};
use crate::clock::now;
use crate::random::random;
use crate::scratch::Purpose;
use crate::store::Kind;

/// How long a VMM may take to end at each step: shut down, stop.
const END_STEP: Duration = Duration::from_secs(3);
/// How long a killed process may take.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// Digits of the id in the run directory's name: a unix socket's path has at most 107 bytes.
const RUN_NAME_DIGITS: usize = 16;
const RESOLV_CONF: &str = "/etc/resolv.conf";

impl Owner {
    /// Takes the pod from its record to a guest that is configured. After an error the caller removes the pod.
    pub(super) async fn boot(
        &mut self,
        turn: &Turn,
        caller: &mut Answer<()>,
    ) -> Result<(), BootError> {
        let started = Instant::now();
        let plan = self.plan()?;
        let host = &self.shared.host;
        let name = self.pod.id.get(..RUN_NAME_DIGITS).unwrap_or(&self.pod.id);
        let run = host.run_pods.join(name);
        let state = host.state_pods.join(&self.pod.id);
        self.change_pod(|pod| {
            pod.size = plan.size;
            pod.allowance = plan.allowance;
            pod.held.push(Held::RunDirectory(run.clone()));
            pod.held.push(Held::StateDirectory(state.clone()));
        })?;
        for path in [&run, &state] {
            launch::make_directory(path).map_err(|source| BootError::Directory {
                path: path.clone(),
                source,
            })?;
        }
        let scratch = state.join("scratch.ext4");
        let attachment = self.attach_and_make_scratch(&scratch).await?;
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
        self.move_pod(&PodEvent::Booted)
            .map_err(|error| match error {
                PodError::Store(error) => BootError::Store(error),
                // Nothing else moves a pod that is being created.
                _ => BootError::Panicked,
            })?;
        tracing::info!(
            pod = self.pod.id,
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

    /// Network and scratch disk have nothing to do with each other and are made at once.
    async fn attach_and_make_scratch(&mut self, scratch: &Path) -> Result<Attachment, BootError> {
        let shared = Arc::clone(&self.shared);
        let path = scratch.to_owned();
        let bytes = self.pod.size.scratch_bytes;
        let making = tokio::task::spawn_blocking(move || {
            let scratch = &shared.host.scratch;
            scratch.make(Purpose::Scratch, &path, bytes)
        });
        let request = wire::attach_request(&self.pod.id, &self.pod.spec);
        let attaching = self.shared.host.network.attach(request);
        let (attached, made) = tokio::join!(attaching, making);
        let attachment = attached?;
        let record = attachment.record.clone();
        let addresses = attachment.addresses.clone();
        self.change_pod(|pod| {
            pod.held.push(Held::Network(Box::new(record)));
            pod.addresses = addresses;
        })?;
        made.map_err(|_| BootError::Panicked)??;
        Ok(attachment)
    }

    /// Starts the VMM, which is not a VM yet.
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
                tap: tap.try_clone().map_err(|source| BootError::Directory {
                    path: "the TAP".into(),
                    source,
                })?,
                mac: attachment.mac,
                mtu: attachment.mtu,
            }),
            None => None,
        };
        let size = self.pod.size;
        let machine = Machine {
            vcpus: size.vcpus,
            boot_vcpus: size.boot_vcpus,
            memory_mib: size.memory_mib,
            memory_max_mib: size.memory_max_mib,
            scratch,
            net,
        };
        let starting = self.shared.host.launcher.spawn(files, machine);
        let starting = starting.map_err(|error| launch_failed(waited, error))?;
        if let Err(error) = self.hold_vmm(starting.process().identity(), cgroup).await {
            starting.process().kill();
            starting.process().ended().await;
            return Err(error);
        }
        Ok(starting)
    }

    /// From a VMM to a guest that is this pod's, and how long the configuration took. It may be dropped at any time; then,
    /// and after an error, the VMM is to be killed.
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
        let request = configuration(&self.pod.id, &self.pod.spec, attachment);
        guest.agent.configure(request).await?;
        self.limit_guest(&guest).await?;
        Ok((guest, started.elapsed()))
    }

    /// Writes down whose process it is, and bounds it, before it becomes a VM.
    async fn hold_vmm(
        &mut self,
        identity: Identity,
        cgroup: Option<PathBuf>,
    ) -> Result<(), BootError> {
        self.change_pod(|pod| {
            pod.held.extend(cgroup.clone().map(Held::Cgroup));
            pod.held.push(Held::Vmm(identity));
        })?;
        if let Some(path) = cgroup {
            let limits = self.host_limits();
            let cgroups = &self.shared.host.cgroups;
            match cgroups.make(&path, &limits, identity.pid).await {
                Ok(()) => {}
                Err(error @ CgroupError::Files { .. }) => self.complain("bound the VM", &error),
                // systemd is asked only where it makes cgroups, and can be asked again.
                Err(CgroupError::Scope(error)) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Ends the VM and gives back all but the directories. Asking again is fine.
    pub(super) async fn stop_pod(&mut self) -> Result<(), PodError> {
        self.move_pod(&PodEvent::StopRequested)?;
        if let Some(guest) = self.guest.take() {
            self.kill_containers(&guest).await;
            end_vm(&guest, self.shutdown_limit()).await;
        }
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            self.happened(&id, &killed());
        }
        self.logs.clear();
        self.mirrors.clear();
        let kept = |held: &Held| matches!(held, Held::RunDirectory(_) | Held::StateDirectory(_));
        self.release_while(|held| !kept(held)).await?;
        if self.pod.state == PodState::Stopping {
            self.move_pod(&PodEvent::Stopped)?;
        } else {
            self.publish();
        }
        Ok(())
    }

    /// Removes the pod and everything that it has. After success its task ends.
    pub(super) async fn remove_pod(&mut self) -> Result<(), PodError> {
        self.stop_pod().await?;
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            self.forget_container(&id)?;
        }
        self.release_while(|_| true).await?;
        tokio::task::block_in_place(|| self.shared.host.store.remove(Kind::Pod, &self.pod.id))?;
        self.shared.forget(&self.pod);
        if self.announced {
            self.notify(NoticeKind::Deleted, &self.pod.id);
        }
        Ok(())
    }

    /// Kills what runs and lets the logs come to their end.
    async fn kill_containers(&mut self, guest: &Guest) {
        let running = self
            .containers
            .values()
            .filter(|one| one.state.is_running());
        let ids: Vec<String> = running.map(|one| one.id.clone()).collect();
        for id in &ids {
            if let Err(error) = guest.agent.signal(id, signal::SIGKILL).await {
                // The VM ends anyway.
                return self.complain("kill a container", &error);
            }
        }
        LogTask::rest_of(self.logs.values()).await;
    }

    /// Gives back what belonged to a VM that has ended.
    pub(super) async fn release_vm(&mut self) -> Result<(), BootError> {
        let of_vm =
            |held: &Held| matches!(held, Held::FileServer(_) | Held::Vmm(_) | Held::Cgroup(_));
        self.release_while(of_vm).await
    }

    async fn release_while(&mut self, wanted: impl Fn(&Held) -> bool) -> Result<(), BootError> {
        while let Some(held) = self.pod.held.last().filter(|held| wanted(held)).cloned() {
            self.give_back(&held).await?;
            self.change_pod(|pod| {
                pod.held.pop();
            })?;
        }
        Ok(())
    }

    async fn give_back(&self, held: &Held) -> Result<(), BootError> {
        match held {
            Held::Vmm(identity) | Held::FileServer(identity) => kill(*identity).await,
            Held::Cgroup(path) => {
                let removed = self.shared.host.cgroups.remove(path).await;
                removed.map_err(|_| BootError::Panicked)
            }
            Held::Network(record) => {
                let _lane = self.shared.host.admission.teardown().await;
                Ok(self.shared.host.network.detach(record).await?)
            }
            Held::RunDirectory(path) | Held::StateDirectory(path) => remove_directory(path)
                .map_err(|source| BootError::Directory {
                    path: path.clone(),
                    source,
                }),
        }
    }
}

fn launch_failed(waited: Duration, error: LaunchError) -> BootError {
    BootError::Launch {
        waited,
        source: Box::new(error),
    }
}

/// Ends a VM: by the guest, else by the VMM, else by force.
async fn end_vm(guest: &Guest, limit: Duration) {
    let process = &guest.process;
    tokio::select! {
        () = process.ended() => return,
        () = guest.agent.shutdown(limit) => {}
    }
    if within(process).await {
        return;
    }
    tracing::info!(
        pid = process.identity().pid,
        "the guest does not shut down; stopping its VMM"
    );
    // If it does not answer, it is killed.
    let _ = control::stop(&guest.files.control()).await;
    if !within(process).await {
        process.kill();
    }
}

async fn within(process: &VmmProcess) -> bool {
    tokio::time::timeout(END_STEP, process.ended())
        .await
        .is_ok()
}

/// Kills a VMM if it lives, and waits until it is gone.
async fn kill(identity: Identity) -> Result<(), BootError> {
    let Ok(Some(process)) = VmmProcess::adopt(identity) else {
        return Ok(());
    };
    process.kill();
    tokio::time::timeout(KILL_LIMIT, process.ended())
        .await
        .map_err(|_| BootError::Unkillable {
            pid: identity.pid,
            limit: KILL_LIMIT,
        })
}

pub(super) fn remove_directory(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

pub(super) fn killed() -> ContainerEvent {
    ContainerEvent::Died {
        code: KILLED_EXIT_CODE,
        oom_killed: false,
        message: "killed with its pod".to_owned(),
        at: now(),
    }
}

/// A pod without a name for its host gets the beginning of its id.
pub(super) fn hostname(id: &str, spec: &PodSpec) -> String {
    if spec.hostname.is_empty() {
        return id.get(..12).unwrap_or(id).to_owned();
    }
    spec.hostname.clone()
}

fn configuration(
    id: &str,
    spec: &PodSpec,
    attachment: &Attachment,
) -> protocol::ConfigureSandboxRequest {
    let hostname = hostname(id, spec);
    let dns = dns(spec, attachment);
    let address = attachment
        .addresses
        .first()
        .and_then(|cidr| cidr.split('/').next());
    protocol::ConfigureSandboxRequest {
        hosts: address
            .map(|address| protocol::HostEntry {
                address: address.to_owned(),
                names: vec![hostname.clone()],
            })
            .into_iter()
            .collect(),
        hostname,
        dns: Some(protocol::Dns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        interface: wire::interface(attachment),
        sysctls: spec.sysctls.clone().into_iter().collect(),
        clock_unix_nanoseconds: now(),
        entropy: random::<64>().to_vec().into(),
        shared_pid_namespace: spec.pid == PidMode::Pod,
        shm_bytes: 0,
        user_namespace: spec.users.map(wire::user_namespace),
        machine_id: hex(&random::<16>()),
    }
}

/// What the pod says, else the network, else the host.
fn dns(spec: &PodSpec, attachment: &Attachment) -> Dns {
    if let Some(dns) = &spec.dns {
        return dns.clone();
    }
    let found = &attachment.dns;
    if !found.servers.is_empty() {
        return Dns {
            servers: found.servers.clone(),
            searches: found.searches.clone(),
            options: found.options.clone(),
        };
    }
    if attachment.tap.is_none() {
        return Dns::default();
    }
    resolv_conf(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default())
}

/// Reads resolv.conf(5); a resolver on the host's loopback is of no use in a guest.
fn resolv_conf(text: &str) -> Dns {
    let mut dns = Dns::default();
    for line in text.lines() {
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => dns.servers.extend(
                words
                    .take(1)
                    .filter(|server| !server.starts_with("127.") && server != "::1"),
            ),
            Some("search") => dns.searches = words.collect(),
            Some("options") => dns.options.extend(words),
            _ => {}
        }
    }
    dns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_read_without_the_hosts_own_resolver() {
        let dns = resolv_conf(
            "# c\nnameserver 127.0.0.53\nnameserver 1.1.1.1\nsearch a b\noptions ndots:5\n",
        );
        assert_eq!(dns.servers, ["1.1.1.1"]);
        assert_eq!(dns.searches, ["a", "b"]);
        assert_eq!(dns.options, ["ndots:5"]);
    }

    #[test]
    fn a_pod_without_a_hostname_is_called_by_its_id() {
        let mut spec = crate::pod::fixtures::pod_spec();
        assert_eq!(hostname("0123456789abcdef", &spec), "host");
        spec.hostname.clear();
        assert_eq!(hostname("0123456789abcdef", &spec), "0123456789ab");
    }
}
