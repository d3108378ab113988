// SPDX-License-Identifier: Apache-2.0
//! The task that owns one pod.
//!
//! Every change to a pod and its containers is either a [`Request`] or news from the guest. This task handles them one
//! at a time, so pod state needs no lock. All state is in the pod's [`ledger`], and only the ledger changes it. The
//! other files do the work: [`boot`] takes resources of the host and [`teardown`] releases them, [`mod@adopt`] takes over
//! the pod of an earlier daemon, [`vm`] starts VMs and [`spare`] keeps some ready, [`restore`] brings a saved pod back and
//! [`warm`] hands out its containers, [`create`] makes containers, [`containers`] starts, changes and removes them, and
//! [`news`] records what happened unasked. [`mounts`], [`shares`], [`blocks`] and [`disks`] bring volumes into the guest,
//! and [`kept`] compares those of a saved pod. [`limits`], [`resize`] and [`together`] set what the guest may use, and
//! [`node`] reads what the host has.

mod adopt;
mod blocks;
mod boot;
mod checkpoint;
mod containers;
mod create;
mod disks;
mod kept;
mod ledger;
mod limits;
mod logs;
mod mounts;
mod news;
mod node;
mod resize;
mod restore;
mod shares;
mod spare;
mod teardown;
mod template;
mod together;
mod vm;
mod warm;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_guest::news::News;
use bulkhead_guest::watch as guest_watch;
use bulkhead_host::Guest;
use bulkhead_host::cgroup::pids::PidsLimit;
use bulkhead_host::process::VmmProcess;
use bulkhead_host::pulse;
use tokio::sync::mpsc;

pub use self::adopt::adopt;
pub use self::boot::RUN_NAME_DIGITS;
use self::ledger::{Ledger, Others};
use self::logs::LogTask;
pub use self::restore::{BringBack, Way};
pub use self::spare::{end_all as end_spares, keep as keep_spares};
pub use self::teardown::kill;
pub use self::template::left_cgroup;
use super::admission::Turn;
use super::clocks;
use super::errors::PodError;
use super::host::Shared;
use super::life::record::{ContainerRecord, PodRecord};
use super::registry::Handle;
use super::request::{Answer, Request};
use super::volumes::mirror::Mirror;
use crate::clock::now;

/// How many digits the id of a pod has.
pub const ID_DIGITS: usize = 64;
/// How many requests may wait for one pod. News has a queue of the same length.
const INBOX: usize = 64;
/// The pause before a pod that could not be discarded is removed again.
const DISCARD_AGAIN: Duration = Duration::from_secs(15);

/// Whether the task continues after a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    GoOn,
    End,
}

#[derive(Debug)]
pub struct Owner {
    shared: Arc<Shared>,
    ledger: Ledger,
    /// By container id, for containers that were started.
    logs: HashMap<String, LogTask>,
    /// Containers that have had their stop signal.
    signalled: HashSet<String>,
    /// By the volume's name in the guest.
    mirrors: HashMap<String, Mirror>,
    /// The limit that this daemon last sent to the guest.
    pids_limit: Option<PidsLimit>,
    /// Held while environment files are copied to the host, so that only one copy runs at a time.
    environment: Arc<tokio::sync::Mutex<()>>,
    news: mpsc::Receiver<News>,
    news_sender: mpsc::Sender<News>,
    /// Exits whose log is complete now, or did not become complete in time.
    settled: mpsc::Receiver<News>,
    settled_sender: mpsc::Sender<News>,
    /// Containers whose exit is being settled. What a guest repeats meanwhile is not settled again.
    settling: HashSet<String>,
    /// Held while a container without a record is ended.
    ending: Arc<tokio::sync::Mutex<()>>,
    inbox: mpsc::Receiver<Request>,
    /// Set if no client knows the pod, and it could not be removed yet.
    is_discarded: bool,
}

/// Starts the task of a new pod. Its name must be reserved, and it must have its turn. `answer` gets the result of the boot.
pub fn start_new(
    shared: Arc<Shared>,
    record: PodRecord,
    way: Way,
    turn: Turn,
    mut answer: Answer<()>,
) {
    let mut owner = Owner::new(shared, record, BTreeMap::new());
    tokio::spawn(async move {
        let booted = owner.boot(&way, &turn, &mut answer).await;
        drop(way);
        // Undoing a failed boot needs no turn, and the next boot must not wait for it.
        drop(turn);
        let then = match booted {
            Ok(()) => match answer.send(Ok(())) {
                Ok(()) => Then::GoOn,
                Err(_) => {
                    tracing::info!(
                        pod = owner.ledger.pod().id,
                        "the pod is ready, but its caller has gone away; removing it"
                    );
                    owner.discard("remove an abandoned pod").await
                }
            },
            Err(error) => {
                let then = owner.discard("undo the boot").await;
                if answer.send(Err(error.into())).is_err() {
                    tracing::info!(
                        pod = owner.ledger.pod().id,
                        "the boot failed, and its caller has gone away"
                    );
                }
                then
            }
        };
        if then == Then::GoOn {
            owner.run().await;
        }
    });
}

impl Owner {
    /// Makes the owner and registers it. Its task is not started yet.
    fn new(
        shared: Arc<Shared>,
        pod: PodRecord,
        containers: BTreeMap<String, ContainerRecord>,
    ) -> Self {
        let (inbox_sender, inbox) = mpsc::channel(INBOX);
        let (news_sender, news) = mpsc::channel(INBOX);
        let (settled_sender, settled) = mpsc::channel(INBOX);
        let others = Others {
            store: Arc::clone(&shared.host.store),
            cgroups: shared.host.cgroups.clone(),
            registry: Arc::clone(&shared.registry),
            notices: Arc::clone(&shared.notices),
        };
        let (ledger, view) = Ledger::open(others, pod, containers);
        shared.registry.register(Handle {
            id: ledger.pod().id.clone(),
            inbox: inbox_sender,
            view,
        });
        Self {
            shared,
            ledger,
            logs: HashMap::new(),
            signalled: HashSet::new(),
            mirrors: HashMap::new(),
            pids_limit: None,
            environment: Arc::default(),
            news,
            news_sender,
            settled,
            settled_sender,
            settling: HashSet::new(),
            ending: Arc::default(),
            inbox,
            is_discarded: false,
        }
    }

    /// Serves the pod until it is removed.
    async fn run(mut self) {
        loop {
            let guest = self.ledger.guest();
            let process = guest.map(|guest| Arc::clone(&guest.process));
            tokio::select! {
                biased;
                () = end_of(process) => self.vm_ended().await,
                Some(news) = self.settled.recv() => {
                    self.settling.remove(&news.id);
                    self.apply_news(news);
                }
                Some(news) = self.news.recv() => self.take_news(news),
                request = self.inbox.recv() => match request {
                    Some(request) => if self.serve(request).await == Then::End {
                        return;
                    },
                    None => return,
                },
                () = tokio::time::sleep(DISCARD_AGAIN), if self.is_discarded => {
                    if self.discard("remove a pod that no client knows").await == Then::End {
                        return;
                    }
                }
            }
        }
    }

    async fn serve(&mut self, request: Request) -> Then {
        match request {
            Request::StopPod(answer) => reply(answer, self.stop_pod().await),
            Request::RemovePod(answer) => {
                let removed = self.remove_pod().await;
                let then = if removed.is_ok() {
                    Then::End
                } else {
                    Then::GoOn
                };
                reply(answer, removed);
                return then;
            }
            Request::Create { spec, answer } => {
                let created = self.create(*spec).await;
                let id = created.as_ref().ok().cloned();
                if let (Err(_), Some(id)) = (answer.send(created), id) {
                    // The caller has gone away. Nobody else knows the id, so nobody else could remove the container.
                    if let Err(error) = self.remove(&id).await {
                        self.ledger
                            .complain("remove an abandoned container", &error);
                    }
                }
            }
            Request::Start { id, answer } => reply(answer, self.start(&id).await),
            Request::SignalStop { id, answer } => reply(answer, self.signal_stop(&id).await),
            Request::Signal { id, signal, answer } => {
                reply(answer, self.signal(&id, signal).await);
            }
            Request::Remove { id, answer } => reply(answer, self.remove(&id).await),
            Request::Update { id, change, answer } => {
                reply(answer, self.update(&id, &change).await);
            }
            Request::Resize { change, answer } => {
                reply(answer, self.resize(&change.0, &change.1).await);
            }
            Request::Checkpoint { wanted, answer } => {
                reply(answer, self.checkpoint(&wanted).await);
            }
            Request::ReopenLog { id, answer } => self.reopen_log(&id, answer),
        }
        Then::GoOn
    }

    /// Makes the guest the pod's guest, watches its news and its pulse from now on, and keeps its clock right.
    fn serve_guest(&mut self, guest: Guest) {
        let process = Arc::clone(&guest.process);
        let ended = async move { process.ended().await };
        let news = self.news_sender.clone();
        let (agent, remarks) = (guest.agent.clone(), guest.remarks.clone());
        tokio::spawn(guest_watch::watch(agent, remarks, ended, now, news));
        tokio::spawn(end_silent(guest.clone()));
        let changes = self.shared.host.clock.changes();
        tokio::spawn(clocks::keep(guest.clone(), changes));
        self.ledger.set_guest(Some(guest));
    }
}

/// Ends a guest that is found dead. All that waits for it is then told that the VM has ended.
async fn end_silent(guest: Guest) {
    tokio::select! {
        () = guest.process.ended() => {}
        how = pulse::until_dead(&guest.agent, &guest.pulse, guest.process.identity().pid) => {
            guest.give_up(how);
        }
    }
}

async fn end_of(process: Option<Arc<VmmProcess>>) {
    match process {
        Some(process) => process.ended().await,
        None => std::future::pending().await,
    }
}

/// Sends the answer. It is no error if the caller has gone away.
fn reply<T>(answer: Answer<T>, result: Result<T, PodError>) {
    let _ = answer.send(result);
}
