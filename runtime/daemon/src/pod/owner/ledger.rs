// SPDX-License-Identifier: Apache-2.0
//! All that is known of one pod, in the places that must agree: the store, the owner's memory, the host's limits, the
//! view that everyone else reads, the registry's index of containers, and the events that listeners got.
//!
//! Every change is made by a method of [`Ledger`], always in the same order: check, store, memory, limits, publish,
//! tell listeners. If the store fails, nothing changes. The exception is what has already happened or must not be held up
//! (an exit, a pod that stops or is no longer ready, a resource that was given back): that is taken over into memory even
//! if it cannot be stored. The next daemon then finds an older record, and finds that what it names is gone.

use std::collections::BTreeMap;
use std::sync::Arc;

use bulkhead_guest::user::ProcessUser;
use bulkhead_host::Guest;
use bulkhead_host::cgroup::Cgroups;
use bulkhead_text::chain;
use tokio::sync::watch;

use crate::clock::now;
use crate::pod::errors::{MoveError, PodError};
use crate::pod::life::record::{ContainerRecord, PodRecord};
use crate::pod::life::state::{ContainerEvent, PodEvent, PodState};
use crate::pod::notices::{Notice, NoticeKind, Notices};
use crate::pod::registry::Registry;
use crate::pod::view::View;
use crate::store::{Kind, Room, Store, StoreError};

/// A pod, its containers and its guest.
#[derive(Debug)]
pub struct Ledger {
    known: View,
    /// Whether listeners have heard of the pod.
    announced: bool,
    published: watch::Sender<Arc<View>>,
    others: Others,
}

/// The other places that each change goes to.
#[derive(Debug)]
pub struct Others {
    pub store: Arc<Store>,
    pub cgroups: Cgroups,
    pub registry: Arc<Registry>,
    pub notices: Arc<Notices>,
}

impl Ledger {
    /// Opens the ledger of a pod; its view is published from now on.
    pub fn open(
        others: Others,
        pod: PodRecord,
        containers: BTreeMap<String, ContainerRecord>,
    ) -> (Self, watch::Receiver<Arc<View>>) {
        let known = View {
            pod,
            containers,
            guest: None,
        };
        let (published, view) = watch::channel(visible(&known));
        let ledger = Self {
            announced: known.pod.state != PodState::Creating,
            known,
            published,
            others,
        };
        (ledger, view)
    }

    pub fn pod(&self) -> &PodRecord {
        &self.known.pod
    }

    pub fn containers(&self) -> &BTreeMap<String, ContainerRecord> {
        &self.known.containers
    }

    pub fn container(&self, id: &str) -> Result<&ContainerRecord, PodError> {
        self.known.container(id)
    }

    /// `None` if the pod has no running VM.
    pub fn guest(&self) -> Option<&Guest> {
        self.known.guest.as_ref()
    }

    /// The guest, if the pod is ready. For any other pod, the error names `event`.
    pub fn ready_guest(&self, event: &'static str) -> Result<Guest, PodError> {
        self.known.ready_guest(event)
    }

    /// Sets the guest, or that there is none any more. Only memory changes: the store has the VMM's identity instead.
    pub fn set_guest(&mut self, guest: Option<Guest>) {
        self.known.guest = guest;
        self.publish();
    }

    /// Moves the pod to its state after `event`.
    pub fn move_pod(&mut self, event: &PodEvent) -> Result<(), MoveError> {
        let pod = &self.known.pod;
        let state = pod.state.after(event);
        let state = state.map_err(|source| MoveError::Illegal {
            id: pod.id.clone(),
            source,
        })?;
        let is_new = state != pod.state;
        let is_ready = state == PodState::Ready;
        let is_over = matches!(state, PodState::NotReady { .. });
        let is_fact = is_over || state == PodState::Stopping;
        let record = PodRecord {
            state,
            ..pod.clone()
        };
        if is_fact {
            self.put_fact(Kind::Pod, &record.id, &record);
        } else {
            self.put(Kind::Pod, &record.id, &record)?;
        }
        self.known.pod = record;
        self.publish();
        if is_new && is_ready {
            self.announced = true;
            self.tell(NoticeKind::Created, &self.known.pod.id);
            self.tell(NoticeKind::Started, &self.known.pod.id);
        } else if is_new && is_over && self.announced {
            self.tell(NoticeKind::Stopped, &self.known.pod.id);
        }
        Ok(())
    }

    /// Changes the pod's record.
    pub fn change_pod(&mut self, change: impl FnOnce(&mut PodRecord)) -> Result<(), StoreError> {
        let mut record = self.known.pod.clone();
        change(&mut record);
        self.put(Kind::Pod, &record.id, &record)?;
        self.known.pod = record;
        self.publish();
        Ok(())
    }

    /// Takes a resource that was given back off the pod's stack.
    pub fn gave_back(&mut self) {
        let mut record = self.known.pod.clone();
        record.held.pop();
        self.put_fact(Kind::Pod, &record.id, &record);
        self.known.pod = record;
        self.publish();
    }

    /// Forgets the pod. Its containers must have been forgotten before.
    pub fn forget_pod(&mut self) -> Result<(), StoreError> {
        let pod = &self.known.pod;
        self.remove(Kind::Pod, &pod.id)?;
        self.others.registry.forget(pod);
        if self.announced {
            self.tell(NoticeKind::Deleted, &pod.id);
        }
        Ok(())
    }

    /// Stores a container before it is made. It is not visible until [`Ledger::add_container`].
    pub fn write_container(&self, record: &ContainerRecord) -> Result<(), StoreError> {
        self.put(Kind::Container, &record.id, record)
    }

    /// Makes a stored container visible, after it was made. One that waits for a client to ask for it stays invisible until
    /// then.
    pub fn add_container(&mut self, record: ContainerRecord) {
        let id = record.id.clone();
        let is_waiting = record.is_waiting;
        self.known.containers.insert(id.clone(), record);
        self.place();
        if is_waiting {
            return;
        }
        self.publish();
        self.others.registry.add_container(&id, &self.known.pod.id);
        self.tell(NoticeKind::Created, &id);
    }

    /// Replaces the record of a container.
    pub fn change_container(&mut self, record: ContainerRecord) -> Result<(), StoreError> {
        self.put(Kind::Container, &record.id, &record)?;
        self.known.containers.insert(record.id.clone(), record);
        self.place();
        self.publish();
        Ok(())
    }

    /// Records what has happened to a container, and as which user its process runs, if known. Memory changes even if
    /// the store fails, because it has happened already. Events of unknown containers are ignored.
    pub fn happened(&mut self, id: &str, event: &ContainerEvent, user: Option<ProcessUser>) {
        let Some(old) = self.known.containers.get(id) else {
            return;
        };
        let state = match old.state.after(event) {
            Ok(state) if state == old.state => return,
            Ok(state) => state,
            Err(error) => {
                // The guest says such things as often as it likes.
                let remarks = self.known.guest.as_ref().map(|guest| &guest.remarks);
                return match remarks {
                    Some(remarks) => {
                        remarks.warn(format_args!("unexpected event of container {id}: {error}"));
                    }
                    None => self.complain("unexpected event of a container", &error),
                };
            }
        };
        let record = ContainerRecord {
            state,
            user: user.or_else(|| old.user.clone()),
            ..old.clone()
        };
        self.put_fact(Kind::Container, id, &record);
        let has_ended = record.state.is_exited();
        let is_waiting = record.is_waiting;
        self.known.containers.insert(id.to_owned(), record);
        if has_ended {
            self.place();
        }
        if is_waiting {
            return;
        }
        self.publish();
        let kind = if has_ended {
            NoticeKind::Stopped
        } else {
            NoticeKind::Started
        };
        self.tell(kind, id);
    }

    /// Forgets a container, also one that was stored and never made.
    pub fn forget_container(&mut self, id: &str) -> Result<(), StoreError> {
        self.remove(Kind::Container, id)?;
        self.others.registry.forget_container(id);
        if let Some(gone) = self.known.containers.remove(id) {
            self.place();
            if gone.is_waiting {
                return Ok(());
            }
            self.publish();
            self.tell(NoticeKind::Deleted, id);
        }
        Ok(())
    }

    /// Updates the VM's limits on the host. Call this after a container was added, removed or changed, or has ended.
    pub fn place(&self) {
        if let Some(path) = self.known.pod.cgroup() {
            self.others.cgroups.limit(path, &self.host_limits());
        }
        if let Some(guest) = &self.known.guest
            && let Err(e) = guest.process.set_oom_score_adj(self.oom_score_adj())
        {
            // Lowering the score needs CAP_SYS_RESOURCE, which a daemon in a container may not have.
            tracing::debug!(pod = self.known.pod.id, "oom_score_adj of the VMM: {e}");
        }
    }

    /// Logs an error that no caller can be told.
    pub fn complain(&self, what: &str, error: &dyn std::error::Error) {
        tracing::warn!(pod = self.known.pod.id, "{what}: {}", chain(error));
    }

    fn put<T: serde::Serialize>(&self, kind: Kind, id: &str, record: &T) -> Result<(), StoreError> {
        tokio::task::block_in_place(|| self.others.store.put(Room::Free, kind, id, record))
    }

    /// Stores what is true even if it cannot be stored.
    fn put_fact<T: serde::Serialize>(&self, kind: Kind, id: &str, record: &T) {
        let store = &self.others.store;
        let stored = tokio::task::block_in_place(|| store.put(Room::Reserve, kind, id, record));
        if let Err(error) = stored {
            self.complain("go on with a state that cannot be stored", &error);
        }
    }

    fn remove(&self, kind: Kind, id: &str) -> Result<(), StoreError> {
        tokio::task::block_in_place(|| self.others.store.remove(kind, id))
    }

    fn publish(&self) {
        self.published.send_replace(visible(&self.known));
    }

    /// Sends an event to listeners, with the view that was published last.
    fn tell(&self, kind: NoticeKind, container_id: &str) {
        self.others.notices.tell(&Notice {
            kind,
            container_id: container_id.to_owned(),
            at: now(),
            view: Arc::clone(&self.published.borrow()),
        });
    }
}

/// What everyone else sees of a pod.
fn visible(known: &View) -> Arc<View> {
    let mut view = known.clone();
    view.containers.retain(|_, one| !one.is_waiting);
    Arc::new(view)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::path::PathBuf;

    use bulkhead_guest::exit::Exit;
    use bulkhead_host::cgroup::Unbounded;

    use super::*;
    use crate::pod::fixtures;
    use crate::pod::life::record::Held;
    use crate::pod::notices::Listener;
    use crate::pod::registry::Handle;

    struct Fixture {
        ledger: Ledger,
        view: watch::Receiver<Arc<View>>,
        registry: Arc<Registry>,
        listener: Listener,
        _directory: tempfile::TempDir,
    }

    /// The ledger of a ready pod with these containers.
    fn fixture(containers: &[ContainerRecord]) -> Fixture {
        let directory = tempfile::tempdir().unwrap();
        let registry = Arc::<Registry>::default();
        let notices = Arc::<Notices>::default();
        let listener = notices.listen().unwrap();
        let others = Others {
            store: Arc::new(Store::open(directory.path()).unwrap()),
            cgroups: Cgroups::new(None, None, Unbounded::Refuse),
            registry: Arc::clone(&registry),
            notices,
        };
        let containers = containers.iter().map(|one| (one.id.clone(), one.clone()));
        let (ledger, view) = Ledger::open(others, fixtures::pod_record(), containers.collect());
        registry.register(Handle {
            id: ledger.pod().id.clone(),
            inbox: tokio::sync::mpsc::channel(1).0,
            view: view.clone(),
        });
        Fixture {
            ledger,
            view,
            registry,
            listener,
            _directory: directory,
        }
    }

    /// A path that is not UTF-8, so that a record with it cannot be stored as JSON.
    fn not_text() -> PathBuf {
        PathBuf::from(OsStr::from_bytes(b"/\xff"))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_cannot_be_stored_has_not_been_done() {
        let mut fixture = fixture(&[fixtures::container_record()]);
        let held = Held::RunDirectory(not_text());
        let refused = fixture.ledger.change_pod(|pod| pod.held.push(held));
        assert!(refused.is_err());
        assert!(fixture.ledger.pod().held.is_empty());
        let mut record = fixtures::container_record();
        record.log_path = Some(not_text());
        assert!(fixture.ledger.change_container(record).is_err());
        let known = fixture.ledger.container("container").unwrap();
        assert_eq!(known.log_path, None);
        assert!(!fixture.view.has_changed().unwrap());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_exit_is_true_though_it_cannot_be_stored() {
        let record = ContainerRecord {
            log_path: Some(not_text()),
            ..fixtures::container_record()
        };
        let mut fixture = fixture(&[record]);
        let event = ContainerEvent::Ended(Exit::lost("x", 1));
        fixture.ledger.happened("container", &event, None);
        let notice = fixture.listener.next().await.unwrap();
        assert_eq!(notice.kind, NoticeKind::Stopped);
        for view in [&notice.view, &*fixture.view.borrow()] {
            assert!(view.container("container").unwrap().state.is_exited());
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_stop_goes_on_though_it_cannot_be_stored() {
        let mut fixture = fixture(&[]);
        fixture.ledger.known.pod.held = vec![
            Held::RunDirectory(not_text()),
            Held::StateDirectory(not_text()),
        ];
        fixture.ledger.move_pod(&PodEvent::StopRequested).unwrap();
        assert_eq!(fixture.ledger.pod().state, PodState::Stopping);
        fixture.ledger.gave_back();
        assert_eq!(fixture.view.borrow().pod.held.len(), 1);
        fixture.ledger.move_pod(&PodEvent::Stopped).unwrap();
        let notice = fixture.listener.next().await.unwrap();
        assert_eq!(notice.kind, NoticeKind::Stopped);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nobody_sees_a_container_that_waits_until_it_is_asked_for() {
        let mut waiting = fixtures::container_record();
        waiting.is_waiting = true;
        let mut fixture = fixture(std::slice::from_ref(&waiting));
        assert!(fixture.registry.container("container").is_err());
        assert!(fixture.ledger.container("container").is_ok());
        fixture.ledger.forget_container("container").unwrap();
        fixture.ledger.add_container(waiting.clone());
        let event = ContainerEvent::Ended(Exit::lost("x", 1));
        fixture.ledger.happened("container", &event, None);
        assert!(fixture.view.borrow().containers.is_empty());
        waiting.is_waiting = false;
        fixture.ledger.add_container(waiting);
        // The first that is heard of it.
        let notice = fixture.listener.next().await.unwrap();
        assert_eq!(notice.kind, NoticeKind::Created);
        assert!(fixture.registry.container("container").is_ok());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_hears_of_a_container_can_find_it_until_they_hear_that_it_is_gone() {
        let mut fixture = fixture(&[]);
        let record = fixtures::container_record();
        fixture.ledger.write_container(&record).unwrap();
        assert!(fixture.registry.container("container").is_err());
        fixture.ledger.add_container(record);
        let notice = fixture.listener.next().await.unwrap();
        assert_eq!(notice.kind, NoticeKind::Created);
        assert!(notice.view.container("container").is_ok());
        assert!(fixture.registry.container("container").is_ok());
        fixture.ledger.forget_container("container").unwrap();
        let notice = fixture.listener.next().await.unwrap();
        assert_eq!(notice.kind, NoticeKind::Deleted);
        assert!(notice.view.container("container").is_err());
        assert!(fixture.registry.container("container").is_err());
    }
}
