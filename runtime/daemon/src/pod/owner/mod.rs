// SPDX-License-Identifier: Apache-2.0
//! The task that owns one pod.
//!
//! Every change to a pod and its containers goes through a [`Request`] handled here one at a time, or is news of the
//! guest's, so nothing else needs a lock on pod state. [`super::state`] says what is allowed, [`super::boot`]
//! takes and gives back what a pod has on the host, [`super::containers`] does the work on containers, [`super::news`]
//! takes note of what happened without being asked for.
//! The order of each change: check, store, memory, publish.

mod adopt;
mod blocks;
mod boot;
mod containers;
mod create;
mod disks;
mod hugepages;
mod limits;
mod logs;
mod mounts;
mod news;
mod node;
mod pids;
mod resize;
mod shares;
mod teardown;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bulkhead_guest::watch::{self as guest_watch, News};
use bulkhead_host::Guest;
use bulkhead_host::cgroup::pids::PidsLimit;
use bulkhead_host::process::VmmProcess;
use bulkhead_text::chain;
use tokio::sync::{mpsc, watch};

pub use self::adopt::adopt;
use self::logs::LogTask;
use super::admission::Turn;
use super::errors::PodError;
use super::host::Shared;
use super::life::record::{ContainerRecord, PodRecord};
use super::life::state::{PodEvent, PodState};
use super::notices::{Notice, NoticeKind};
use super::registry::Handle;
use super::request::{Answer, Request};
use super::view::View;
use super::volumes::mirror::Mirror;
use crate::clock::now;
use crate::store::{Kind, StoreError};

/// Requests that wait for a pod.
const INBOX: usize = 64;

/// Whether the task goes on after a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    GoOn,
    End,
}

#[derive(Debug)]
pub struct Owner {
    shared: Arc<Shared>,
    pod: PodRecord,
    containers: BTreeMap<String, ContainerRecord>,
    guest: Option<Guest>,
    logs: HashMap<String, LogTask>,
    /// By the volume's name in the guest.
    mirrors: HashMap<String, Mirror>,
    /// What this daemon last told the guest.
    pids_limit: Option<PidsLimit>,
    /// Whose turn it is to bring files for the environment to the host.
    environment: Arc<tokio::sync::Mutex<()>>,
    news: mpsc::Receiver<News>,
    news_sender: mpsc::Sender<News>,
    /// Exits whose log is whole now, or late.
    settled: mpsc::Receiver<News>,
    settled_sender: mpsc::Sender<News>,
    inbox: mpsc::Receiver<Request>,
    view: watch::Sender<Arc<View>>,
    /// Listeners have heard of the pod.
    announced: bool,
}

/// Starts the task of a new pod, whose name is reserved and whose turn it is. `answer` hears how its boot went.
pub fn start_new(shared: Arc<Shared>, record: PodRecord, turn: Turn, mut answer: Answer<()>) {
    let mut owner = Owner::new(shared, record, BTreeMap::new());
    tokio::spawn(async move {
        let booted = owner.boot(&turn, &mut answer).await;
        // What is to be undone waits for nobody's boot, and the next boot not for it.
        drop(turn);
        let abandoned = match booted {
            Ok(()) => answer.send(Ok(())).is_err(),
            Err(error) => {
                let undone = owner.remove_pod().await;
                if answer.send(Err(error.into())).is_err() {
                    tracing::info!(pod = owner.pod.id, "nobody waits for the failed boot");
                }
                match undone {
                    Ok(()) => return,
                    Err(error) => owner.complain("undo the boot", &error),
                }
                false
            }
        };
        if abandoned {
            tracing::info!(
                pod = owner.pod.id,
                "who asked for the pod has gone; removing it"
            );
            match owner.remove_pod().await {
                Ok(()) => return,
                Err(error) => owner.complain("remove an abandoned pod", &error),
            }
        }
        owner.run().await;
    });
}

impl Owner {
    /// Makes the owner and makes it known; its task is not started yet.
    fn new(
        shared: Arc<Shared>,
        pod: PodRecord,
        containers: BTreeMap<String, ContainerRecord>,
    ) -> Self {
        let (inbox_sender, inbox) = mpsc::channel(INBOX);
        let (news_sender, news) = mpsc::channel(INBOX);
        let (settled_sender, settled) = mpsc::channel(INBOX);
        let (view, reader) = watch::channel(Arc::new(View {
            pod: pod.clone(),
            containers: containers.clone(),
            guest: None,
        }));
        shared.registry.register(Handle {
            id: pod.id.clone(),
            inbox: inbox_sender,
            view: reader,
        });
        Self {
            announced: pod.state != PodState::Creating,
            shared,
            pod,
            containers,
            guest: None,
            logs: HashMap::new(),
            mirrors: HashMap::new(),
            pids_limit: None,
            environment: Arc::default(),
            news,
            news_sender,
            settled,
            settled_sender,
            inbox,
            view,
        }
    }

    /// Serves the pod until it is removed.
    async fn run(mut self) {
        loop {
            let process = self.guest.as_ref().map(|guest| Arc::clone(&guest.process));
            tokio::select! {
                biased;
                () = end_of(process) => self.vm_ended().await,
                Some(news) = self.settled.recv() => self.apply_news(news),
                Some(news) = self.news.recv() => self.take_news(news),
                request = self.inbox.recv() => match request {
                    Some(request) => if self.serve(request).await == Then::End {
                        return;
                    },
                    None => return,
                },
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
                    // Nobody knows the id: nobody could ever remove it.
                    if let Err(error) = self.remove(&id).await {
                        self.complain("remove an abandoned container", &error);
                    }
                }
            }
            Request::Start { id, answer } => reply(answer, self.start(&id).await),
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
            Request::ReopenLog { id, answer } => self.reopen_log(&id, answer),
        }
        Then::GoOn
    }

    /// Takes the guest into service: its news are heard from now on.
    fn serve_guest(&mut self, guest: Guest) {
        let process = Arc::clone(&guest.process);
        let ended = async move { process.ended().await };
        let news = self.news_sender.clone();
        tokio::spawn(guest_watch::watch(guest.agent.clone(), ended, now, news));
        self.guest = Some(guest);
        self.publish();
    }

    /// Moves the pod along an event: store, memory, publish.
    fn move_pod(&mut self, event: &PodEvent) -> Result<(), PodError> {
        let id = self.pod.id.clone();
        let state = self
            .pod
            .state
            .after(event)
            .map_err(|source| PodError::State { id, source })?;
        let is_new = state != self.pod.state;
        let ready = state == PodState::Ready;
        let facts = matches!(state, PodState::NotReady { .. });
        let record = PodRecord {
            state,
            ..self.pod.clone()
        };
        let stored = self.store_pod(&record);
        if stored.is_ok() || facts {
            self.pod = record;
            self.publish();
            if is_new && ready {
                self.announce();
            } else if is_new && facts && self.announced {
                self.notify(NoticeKind::Stopped, &self.pod.id);
            }
        }
        Ok(stored?)
    }

    /// Listeners hear of a pod once it is ready.
    fn announce(&mut self) {
        self.announced = true;
        self.notify(NoticeKind::Created, &self.pod.id);
        self.notify(NoticeKind::Started, &self.pod.id);
    }

    /// Changes the pod's record: store, memory, publish.
    fn change_pod(&mut self, change: impl FnOnce(&mut PodRecord)) -> Result<(), StoreError> {
        let mut record = self.pod.clone();
        change(&mut record);
        self.store_pod(&record)?;
        self.pod = record;
        self.publish();
        Ok(())
    }

    fn store_pod(&self, record: &PodRecord) -> Result<(), StoreError> {
        self.store(Kind::Pod, &record.id, record)
    }

    fn store<T: serde::Serialize>(
        &self,
        kind: Kind,
        id: &str,
        record: &T,
    ) -> Result<(), StoreError> {
        tokio::task::block_in_place(|| self.shared.host.store.put(kind, id, record))
    }

    fn publish(&self) {
        self.view.send_replace(Arc::new(View {
            pod: self.pod.clone(),
            containers: self.containers.clone(),
            guest: self.guest.clone(),
        }));
    }

    fn notify(&self, kind: NoticeKind, container_id: &str) {
        self.shared.notices.tell(&Notice {
            kind,
            container_id: container_id.to_owned(),
            at: now(),
            view: Arc::clone(&self.view.borrow()),
        });
    }

    /// For errors that no caller waits for.
    fn complain(&self, what: &str, error: &dyn std::error::Error) {
        tracing::warn!(pod = self.pod.id, "{what}: {}", chain(error));
    }
}

async fn end_of(process: Option<Arc<VmmProcess>>) {
    match process {
        Some(process) => process.ended().await,
        None => std::future::pending().await,
    }
}

/// Answers; a caller that went away does not hear it.
fn reply<T>(answer: Answer<T>, result: Result<T, PodError>) {
    let _ = answer.send(result);
}
