// SPDX-License-Identifier: Apache-2.0
//! What happened to a pod without being asked for: containers that started or ended, a VM that died.

use std::path::PathBuf;
use std::sync::Arc;

use bulkhead_guest::user::ProcessUser;
use bulkhead_guest::watch::News;
use bulkhead_host::{Guest, cgroup};

use super::Owner;
use super::logs::LogTask;
use crate::clock::now;
use crate::pod::life::state::{ContainerEvent, PodEvent};
use crate::pod::notices::NoticeKind;
use crate::pod::volumes::{environment, termination};
use crate::store::Kind;

impl Owner {
    /// News wait for the log's rest if they tell of an exit, so that who sees the exit finds the log whole.
    pub(super) fn take_news(&mut self, news: News) {
        let News::Exited { id, .. } = &news else {
            return self.apply_news(news);
        };
        let log = self.logs.get(id).filter(|log| !log.is_done());
        let rest = log.map(|log| LogTask::rest_of([log]));
        let last_words = self.last_words(id);
        let environment = self.environment_files(id);
        if rest.is_none() && last_words.is_none() && environment.is_none() {
            return self.apply_news(news);
        }
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

    /// What kubelet's file is still to get from a container that has run.
    fn last_words(&self, id: &str) -> Option<(Guest, String, PathBuf)> {
        let container = self.containers.get(id)?;
        let path = container.termination_log.clone()?;
        let guest = self.guest.clone()?;
        (!container.state.is_exited()).then(|| (guest, id.to_owned(), path))
    }

    /// Brings the files of a container's emptyDirs to the host, if it has run and has any. What goes wrong is said in
    /// the log: kubelet says what it misses.
    fn environment_files(&self, id: &str) -> Option<impl Future<Output = ()> + Send + 'static> {
        let container = self.containers.get(id)?;
        // An agent of an earlier version has no such call.
        self.pod.disks.as_ref()?;
        let guest = self.guest.clone()?;
        let volumes = container.empty_dirs.clone();
        if volumes.is_empty() || container.state.is_exited() {
            return None;
        }
        // Of two that exit at once, the one that looked last is to write last.
        let turn = Arc::clone(&self.environment);
        Some(async move {
            let _turn = turn.lock().await;
            for (name, directory) in volumes {
                environment::copy_back(&guest, &name, &directory).await;
            }
        })
    }

    pub(super) fn apply_news(&mut self, news: News) {
        let (id, user, event) = match news {
            News::Created | News::CaughtUp => return,
            News::Running {
                id,
                pid,
                started_at,
                user,
            } => (
                id,
                user,
                ContainerEvent::Started {
                    pid,
                    at: started_at,
                },
            ),
            News::Exited {
                id,
                code,
                start_failed: true,
                message,
                finished_at,
                user,
                ..
            } => (
                id,
                user,
                ContainerEvent::StartFailed {
                    code,
                    message,
                    at: finished_at,
                },
            ),
            News::Exited {
                id,
                code,
                oom_killed,
                message,
                finished_at,
                user,
                ..
            } => (
                id,
                user,
                ContainerEvent::Died {
                    code,
                    oom_killed,
                    message,
                    at: finished_at,
                },
            ),
        };
        // A container that was removed meanwhile has no news.
        if let Some(container) = self.containers.get(&id) {
            if matches!(event, ContainerEvent::Started { .. }) && container.state.is_exited() {
                return;
            }
            self.is_user(&id, user);
            self.happened(&id, &event);
        }
    }

    /// Takes note of who a container's process is; it is stored with what happened.
    pub(super) fn is_user(&mut self, id: &str, user: Option<ProcessUser>) {
        if let (Some(container), Some(user)) = (self.containers.get_mut(id), user) {
            container.user = Some(user);
        }
    }

    /// Takes note of what has happened to a container. It is true whether or not it can be stored.
    pub(super) fn happened(&mut self, id: &str, event: &ContainerEvent) {
        let Some(old) = self.containers.get(id) else {
            return;
        };
        let state = match old.state.after(event) {
            Ok(state) if state == old.state => return,
            Ok(state) => state,
            Err(error) => return self.complain("news of a container", &error),
        };
        let mut record = old.clone();
        let kind = if state.is_running() {
            NoticeKind::Started
        } else {
            NoticeKind::Stopped
        };
        record.state = state;
        if let Err(error) = self.store(Kind::Container, id, &record) {
            self.complain("remember what happened", &error);
        }
        let ended = record.state.is_exited();
        self.containers.insert(id.to_owned(), record);
        if ended {
            self.place();
        }
        self.publish();
        self.notify(kind, id);
    }

    /// The VM ended without being asked.
    pub(super) async fn vm_ended(&mut self) {
        let files = self.guest.take().map(|guest| guest.files);
        let mut cause = files.map_or_else(|| "the VM ended".to_owned(), |files| files.obituary());
        if self.pod.cgroup().is_some_and(cgroup::was_oom_killed) {
            cause.push_str(": its host cgroup ran out of memory");
        }
        tracing::warn!(pod = self.pod.id, "{cause}");
        self.lose(&cause);
        if let Err(error) = self.release_vm().await {
            self.complain("give back what the VM had", &error);
        }
    }

    /// Takes note that the VM is gone: the pod is not ready, its containers have ended.
    pub(super) fn lose(&mut self, cause: &str) {
        self.guest = None;
        self.mirrors.clear();
        let event = PodEvent::Lost {
            cause: cause.to_owned(),
        };
        if let Err(error) = self.move_pod(&event) {
            self.complain("remember that the VM is gone", &error);
        }
        let ids: Vec<String> = self.containers.keys().cloned().collect();
        for id in ids {
            let event = ContainerEvent::Lost {
                cause: cause.to_owned(),
                at: now(),
            };
            self.happened(&id, &event);
        }
        for log in self.logs.values() {
            log.finish();
        }
    }
}
