// SPDX-License-Identifier: Apache-2.0
//! Makes the VMs that [`crate::pod::spares`] keeps, and hands them to pods.
//!
//! A spare is made like the VM of a pod whose settings are all empty. Its record says that it is being created; so whatever
//! happens to the daemon, what the spare has is given back like that of a boot that was not finished. A pod that takes it
//! over first writes all of it into its own record, and then removes the spare's: a daemon that dies in between leaves two
//! pods that are being created, and both are undone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_host::{Files, Guest};
use bulkhead_network::{AttachRequest, NetworkRecord};
use bulkhead_text::chain;
use tokio::sync::oneshot;
use tokio::time::sleep;

use super::boot::Made;
use super::limits::Plan;
use super::vm::{Origin, Vm};
use super::{Owner, Then, template};
use crate::clock::now;
use crate::pod::admission::{Patience, Turn};
use crate::pod::errors::BootError;
use crate::pod::host::Shared;
use crate::pod::life::record::{Allowance, Held, PodRecord};
use crate::pod::life::spec::{Labels, PidMode, PodLimits, PodName, PodSpec};
use crate::pod::request::Answer;
use crate::pod::spares::{Kind, Spare};
use crate::random::new_id;
use crate::store::{self, StoreError};

/// How long no pod may have been made before a spare is: the containers of a pod start right after it.
const PAUSE: Duration = Duration::from_secs(1);
/// After a failure, how long no spare is made.
const RETRY: Duration = Duration::from_secs(60);

/// Keeps the spares: makes those that are missing, one at a time and only when no pod is being made, and ends those that are
/// of no use any more. It never returns.
pub async fn keep(shared: Arc<Shared>) {
    while shared.host.probe.ready().await.is_err() {
        sleep(RETRY).await;
    }
    // A pod that asks for nothing is what a node is most likely to see. If namespaces share nothing, none is known yet.
    let first = Plan::of(&shared, "", &PodLimits::default());
    if shared.host.templates.are_the_nodes()
        && let Some(kind) = first.ok().and_then(|plan| kind_of(&shared, &plan, ""))
    {
        shared.spares.expect(&kind);
    }
    loop {
        loop {
            shared.host.admission.quiet().await;
            sleep(PAUSE).await;
            if shared.host.admission.is_quiet() {
                break;
            }
        }
        end_useless(&shared).await;
        let Some(kind) = shared.spares.missing() else {
            shared.spares.changed().await;
            continue;
        };
        let making = shared.spares.making.lock().await;
        let made = make(&shared, kind).await;
        drop(making);
        if let Err(error) = made {
            tracing::warn!("no VM could be made ready for a pod: {}", chain(&error));
            sleep(RETRY).await;
        }
    }
}

/// Ends all spares. From now on none is made.
pub async fn end_all(shared: &Arc<Shared>) {
    for spare in shared.spares.close() {
        end(shared, spare).await;
    }
    // The one that is being made ends itself now.
    drop(shared.spares.making.lock().await);
}

async fn add(shared: &Arc<Shared>, spare: Spare) {
    let process = Arc::clone(&spare.guest.process);
    let id = spare.record.id.clone();
    if let Err(late) = shared.spares.add(spare) {
        return end(shared, *late).await;
    }
    tracing::info!(spare = id, "a VM is ready for a pod");
    // If it ends by itself, another one takes its place.
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        process.ended().await;
        shared.spares.look_again();
    });
}

/// Ends the spares that no pod could have: their VM has ended, or is of other files or for another network than a new one
/// would be.
async fn end_useless(shared: &Arc<Shared>) {
    let host = &shared.host;
    let sources = template::sources(&host.launcher).unwrap_or_default();
    let Ok(planned) = host.network.plan(AttachRequest::default()).await else {
        return;
    };
    for spare in shared
        .spares
        .remove_useless(|spare| spare.fits(&planned, &sources))
    {
        tracing::info!(
            spare = spare.record.id,
            "the VM for a pod is of no use any more; ending it"
        );
        end(shared, spare).await;
    }
}

/// Gives back all that a spare has.
async fn end(shared: &Arc<Shared>, spare: Spare) {
    let owner = Owner::new(Arc::clone(shared), spare.record, BTreeMap::new());
    drop((spare.attachment, spare.guest));
    undo(owner, "end a VM that was ready for a pod").await;
}

/// Removes a pod that no client knows, and goes on trying if that fails.
async fn undo(mut owner: Owner, what: &str) {
    if owner.discard(what).await == Then::GoOn {
        tokio::spawn(owner.run());
    }
}

/// Makes and adds a spare. After an error, nothing is left of it.
async fn make(shared: &Arc<Shared>, kind: Kind) -> Result<(), BootError> {
    let turn = shared.host.admission.turn(Patience::new(None)).await?;
    let record = PodRecord::new(new_id(), now(), nobody(&kind.namespace));
    let mut owner = Owner::new(Arc::clone(shared), record, BTreeMap::new());
    // No client knows its id, and none is to reach it by a prefix.
    shared.registry.forget(owner.ledger.pod());
    let made = owner.make_spare(kind, &turn).await;
    drop(turn);
    match made {
        Ok(spare) => {
            add(shared, spare).await;
            Ok(())
        }
        Err(error) => {
            undo(owner, "undo a VM that was to be ready for a pod").await;
            Err(error)
        }
    }
}

/// Which spares a pod with this plan can have. `None` if it can have none.
fn kind_of(shared: &Shared, plan: &Plan, namespace: &str) -> Option<Kind> {
    let key = shared.host.templates.key(&plan.size, namespace)?;
    Some(Kind {
        size: plan.size,
        namespace: key.namespace,
    })
}

impl Owner {
    /// Makes the VM of a spare: forked, because one that boots would take five times as much memory.
    async fn make_spare(&mut self, kind: Kind, turn: &Turn) -> Result<Spare, BootError> {
        let shared = Arc::clone(&self.shared);
        let id = self.ledger.pod().id.clone();
        let plan = Plan {
            size: kind.size,
            allowance: Allowance::default(),
            cgroup: shared.host.cgroups.place(&id, None, None),
        };
        let cgroup = plan.cgroup.clone();
        let ahead = shared.host.network.plan_ahead(&id).await?;
        let (run, scratch) = self.make_directories(plan, ahead.record.clone())?;
        let making = shared.host.network.make_ahead(ahead);
        let attachment = self.attach_and_make_scratch(making, &scratch, None).await?;
        let vm = Vm {
            files: Files::new(run),
            attachment,
            scratch,
            cgroup,
            size: kind.size,
            user: self.take_user()?,
        };
        let until = turn.patience.boot_until(shared.host.launcher.longest());
        let template = template::get(&shared, &kind.size, &kind.namespace, until).await;
        let template = template.ok_or(BootError::NoTemplate)?;
        let origin = Origin::Template(Arc::clone(&template));
        let (answer, _caller) = oneshot::channel();
        let mut nobody: Answer<()> = answer;
        let guest = self.start_vm(&vm, origin, turn, &mut nobody).await?;
        Ok(Spare {
            kind,
            record: self.ledger.pod().clone(),
            attachment: vm.attachment,
            guest,
            template,
        })
    }

    /// Finds a spare for this pod.
    pub(super) fn find_spare(&self, plan: &Plan, network: &NetworkRecord) -> Option<Spare> {
        let shared = &self.shared;
        if shared.spares.is_off() {
            return None;
        }
        let kind = kind_of(shared, plan, &self.ledger.pod().spec.name.namespace)?;
        let sources = template::sources(&shared.host.launcher)?;
        let fits = |spare: &Spare| spare.fits(network, &sources);
        shared.spares.take(&kind, fits)
    }

    /// Makes a spare this pod's VM. `network` is what was planned for the pod.
    pub(super) async fn take_over(
        &mut self,
        spare: Spare,
        plan: Plan,
        network: NetworkRecord,
    ) -> Result<Made, BootError> {
        let started = Instant::now();
        let shared = Arc::clone(&self.shared);
        let host = &shared.host;
        let made = &spare.attachment;
        let network = match made.is_blank() {
            true => network.moved_to(&host.network.namespace(&made.record)),
            false => made.record.clone(),
        };
        if let Err(error) = self.inherit(&spare, &plan, &network) {
            end(&shared, spare).await;
            return Err(error.into());
        }
        host.templates.count(true, false);
        let Spare {
            record,
            mut attachment,
            guest,
            template,
            ..
        } = spare;
        if attachment.is_blank() {
            let attached = host.network.attach(network, attachment.tap.take()).await;
            attachment = self.hold_attached(attached)?;
        }
        let pod = self.ledger.pod();
        let old_cgroup = record.cgroup().filter(|_| plan.cgroup.is_some());
        Ok(Made {
            old_cgroup: old_cgroup.map(ToOwned::to_owned),
            vm: Vm {
                files: guest.files.clone(),
                attachment,
                scratch: pod.scratch_file().unwrap_or_default(),
                cgroup: plan.cgroup,
                size: plan.size,
                user: pod.user().unwrap_or_default(),
            },
            guest,
            template: Some(template),
            containers: None,
            prepared: started.elapsed(),
        })
    }

    /// Writes what a spare has into this pod's record, and removes the spare's. After an error, the spare has all of it.
    fn inherit(
        &mut self,
        spare: &Spare,
        plan: &Plan,
        network: &NetworkRecord,
    ) -> Result<(), StoreError> {
        let Spare {
            record, attachment, ..
        } = spare;
        let held = with_own(&record.held, network, plan.cgroup.clone());
        self.ledger.change_pod(|pod| {
            pod.size = record.size;
            pod.made_from.clone_from(&record.made_from);
            pod.addresses.clone_from(&attachment.addresses);
            pod.allowance = plan.allowance;
            pod.held = held;
        })?;
        let store = &self.shared.host.store;
        let forgotten = tokio::task::block_in_place(|| store.remove(store::Kind::Pod, &record.id));
        if let Err(error) = forgotten {
            // The next daemon finds it, and that it has nothing any more.
            self.ledger
                .complain("forget the spare that became its VM", &error);
        }
        Ok(())
    }

    /// Moves a VM that is configured from the cgroup where it was made into the pod's. Not earlier, because kubelet gives some
    /// pods so little CPU that it would take long there.
    pub(super) async fn leave_cgroup(
        &mut self,
        guest: &Guest,
        old: &Path,
    ) -> Result<(), BootError> {
        let Some(own) = self.ledger.pod().cgroup().map(ToOwned::to_owned) else {
            return Ok(());
        };
        let shared = Arc::clone(&self.shared);
        let cgroups = &shared.host.cgroups;
        let limits = self.ledger.host_limits();
        let pid = guest.process.identity().pid;
        cgroups.make(&own, &limits, pid).await?;
        let is_gone = cgroups.empty(old, &own).await;
        // If it stays, it is removed with the pod.
        if is_gone.map_err(|_| BootError::Panicked)? {
            self.ledger.change_pod(|pod| {
                let is_old = |held: &Held| matches!(held, Held::Cgroup(path) if path == old);
                pod.held.retain(|held| !is_old(held));
            })?;
        }
        Ok(())
    }
}

/// What a pod holds that takes over what a spare held: with the pod's network and, before the spare's cgroup, its own.
fn with_own(held: &[Held], network: &NetworkRecord, cgroup: Option<PathBuf>) -> Vec<Held> {
    let mut own = Vec::new();
    let mut cgroup = cgroup.map(Held::Cgroup);
    for one in held {
        match one {
            Held::Network(_) => own.push(Held::Network(Box::new(network.clone()))),
            Held::Cgroup(_) => {
                own.extend(cgroup.take());
                own.push(one.clone());
            }
            _ => own.push(one.clone()),
        }
    }
    own
}

/// The settings of no pod, in a namespace.
fn nobody(namespace: &str) -> PodSpec {
    PodSpec {
        name: PodName {
            name: String::new(),
            namespace: namespace.to_owned(),
            uid: String::new(),
            attempt: 0,
        },
        hostname: String::new(),
        log_directory: String::new(),
        dns: None,
        port_mappings: Vec::new(),
        labels: Labels::new(),
        annotations: Labels::new(),
        runtime_handler: String::new(),
        pid: PidMode::Container,
        privileged: false,
        users: None,
        sysctls: BTreeMap::new(),
        limits: PodLimits::default(),
    }
}
