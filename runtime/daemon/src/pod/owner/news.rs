// SPDX-License-Identifier: Apache-2.0
//! What happened to a pod unasked: containers that started or exited, a VM that died.

use std::path::PathBuf;
use std::sync::Arc;

use bulkhead_guest::exit::Exit;
use bulkhead_guest::news::{News, Told};
use bulkhead_host::{Guest, cgroup};
use bulkhead_text::chain;

use super::Owner;
use super::logs::LogTask;
use crate::clock::now;
use crate::pod::life::signal;
use crate::pod::life::state::{ContainerEvent, PodEvent};
use crate::pod::volumes::{environment, termination};

impl Owner {
    /// Takes news from the guest. News of an exit waits until the log, the termination message and the environment
    /// files are on the host, so that a client that sees the exit finds them complete.
    pub(super) fn take_news(&mut self, news: News) {
        if !matches!(news.state, Told::Exited(_)) {
            return self.apply_news(news);
        }
        let id = &news.id;
        if self.settling.contains(id) {
            return;
        }
        let log = self.logs.get(id).filter(|log| !log.is_done());
        let rest = log.map(|log| LogTask::rest_of([log]));
        let last_words = self.last_words(id);
        let environment = self.environment_files(id);
        if rest.is_none() && last_words.is_none() && environment.is_none() {
            return self.apply_news(news);
        }
        self.settling.insert(id.clone());
        let settled = self.settled_sender.clone();
        tokio::spawn(async move {
            if let Some((guest, id, path)) = last_words {
                termination::copy_back(&guest, &id, &path).await;
            }
            if let Some(environment) = environment {
                environment.await;
            }
            if let Some(rest) = rest {
                rest.await;
            }
            let _ = settled.send(news).await;
        });
    }

    /// The guest, the id with which it made the container, and the file on the host for a termination message that has not been copied yet.
    fn last_words(&self, id: &str) -> Option<(Guest, String, PathBuf)> {
        let container = self.ledger.containers().get(id)?;
        let path = container.termination_log.clone()?;
        let guest = self.ledger.guest().cloned()?;
        let id = container.first_id().to_owned();
        (!container.state.is_exited()).then_some((guest, id, path))
    }

    /// Copies the environment files of a container's emptyDirs to the host; `None` if it has no emptyDirs or has exited
    /// already. Errors go only to the log, because kubelet reports a file that is missing.
    fn environment_files(&self, id: &str) -> Option<impl Future<Output = ()> + Send + 'static> {
        let container = self.ledger.containers().get(id)?;
        // `disks` is `None` in a VM of an earlier version, and its agent has no such call.
        self.ledger.pod().disks.as_ref()?;
        let guest = self.ledger.guest().cloned()?;
        let volumes = container.empty_dirs.clone();
        if volumes.is_empty() || container.state.is_exited() {
            return None;
        }
        // If two containers exit at once, the one that reads the files last must also write them last.
        let turn = Arc::clone(&self.environment);
        Some(async move {
            let _turn = turn.lock().await;
            for (name, directory) in volumes {
                environment::copy_back(&guest, &name, &directory).await;
            }
        })
    }

    pub(super) fn apply_news(&mut self, news: News) {
        let event = match news.state {
            Told::Created => return,
            Told::Running { pid, started_at } => ContainerEvent::Started {
                pid,
                at: started_at,
            },
            Told::Exited(exit) => ContainerEvent::Ended(exit),
        };
        let known = self.ledger.containers().get(&news.id);
        if known.is_none() && matches!(event, ContainerEvent::Started { .. }) {
            return self.end_unknown(&news.id);
        }
        // The daemon may know of an exit before older news from the guest arrives, which must not revive the container.
        if matches!(event, ContainerEvent::Started { .. })
            && known.is_some_and(|one| one.state.is_exited())
        {
            return;
        }
        self.ledger.happened(&news.id, &event, news.user);
    }

    /// Ends a container that runs in the guest and has no record, because that was damaged: nobody could stop it.
    fn end_unknown(&mut self, id: &str) {
        let Some(guest) = self.ledger.guest().cloned() else {
            return;
        };
        // One at a time, however many a guest invents. The others come again with the next stream of news.
        let Ok(turn) = Arc::clone(&self.ending).try_lock_owned() else {
            return;
        };
        guest.remarks.warn(format_args!(
            "the container {id} runs, but has no record; ending it"
        ));
        let id = id.to_owned();
        tokio::spawn(async move {
            let _turn = turn;
            let ended = guest.agent.signal(&id, signal::SIGKILL).await;
            let removed = guest.agent.remove(&id).await;
            if let Err(error) = ended.and(removed) {
                guest
                    .remarks
                    .warn(format_args!("end the container {id}: {}", chain(&error)));
            }
        });
    }

    /// Handles a VM that ended unasked.
    pub(super) async fn vm_ended(&mut self) {
        let guest = self.ledger.guest();
        let mut cause = guest.map_or_else(|| "the VM ended".to_owned(), Guest::obituary);
        if self
            .ledger
            .pod()
            .cgroup()
            .is_some_and(cgroup::was_oom_killed)
        {
            cause.push_str(": its host cgroup ran out of memory");
        }
        tracing::warn!(pod = self.ledger.pod().id, "{cause}");
        self.lose(&cause);
        if let Err(error) = self.release_vm().await {
            self.ledger.complain("release the VM's resources", &error);
        }
    }

    /// Records that the VM is gone: the pod is not ready any more, and its containers have exited.
    pub(super) fn lose(&mut self, cause: &str) {
        self.ledger.set_guest(None);
        self.mirrors.clear();
        let event = PodEvent::Lost {
            cause: cause.to_owned(),
        };
        if let Err(error) = self.ledger.move_pod(&event) {
            self.ledger.complain("store that the VM is gone", &error);
        }
        let ids: Vec<String> = self.ledger.containers().keys().cloned().collect();
        for id in ids {
            let event = ContainerEvent::Ended(Exit::lost(cause, now()));
            self.ledger.happened(&id, &event, None);
        }
        for log in self.logs.values() {
            log.finish();
        }
    }
}
