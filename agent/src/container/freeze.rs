// SPDX-License-Identifier: Apache-2.0
//! `FreezeContainers` and `ThawContainers`: all containers stand still while the pod is being checkpointed.
//!
//! What starts or runs something holds an [`Admission`], of which there can be many at a time. A freeze waits until
//! there is none, and while the pod is frozen nothing is admitted. Whoever freezes has a lease: a task thaws the pod when
//! that ends, so that a host that has gone does not leave the pod frozen. [`super::restore`] ends a lease, too.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_proto::agent::RestoredContainer;
use bulkhead_text::chain;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use super::state::State;
use super::{Container, ContainerError, Containers};
use crate::cgroup::CgroupError;

/// How long all of the freezing may take, with the wait for what is being started.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);
const FREEZE_PAUSE: Duration = Duration::from_millis(5);
/// How long the host gets to store what the containers have written.
const LOGS_TIMEOUT: Duration = Duration::from_secs(2);
const MAX_LEASE: Duration = Duration::from_secs(3600);

/// An error about freezing the pod, or about restoring it.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("the pod is being checkpointed")]
    Frozen,
    #[error("the pod is not frozen: its lease may have ended")]
    NotFrozen,
    #[error("a lease of {0:?} is not in the range of 1 ms to {MAX_LEASE:?}")]
    Lease(Duration),
    #[error("containers were being created or started for {FREEZE_TIMEOUT:?}; try again")]
    Busy,
    #[error("container {0} does not exist")]
    NotFound(String),
    #[error("container {0} does not run")]
    NotRunning(String),
    #[error("container {0} runs and is not in the list")]
    NotListed(String),
    #[error("container {0} is in the list twice")]
    Twice(String),
    #[error("container {id} did not freeze within {FREEZE_TIMEOUT:?}")]
    NotStill { id: String },
    #[error("container {id}")]
    Cgroup { id: String, source: CgroupError },
}

/// Whether the pod is frozen.
#[derive(Debug, Default)]
pub(super) struct Phase {
    pub frozen: Option<Frozen>,
    /// What the last restore was asked for, to know a repetition of it.
    pub restored: Option<Vec<RestoredContainer>>,
}

/// The containers that were running when the pod was frozen.
#[derive(Debug)]
pub(super) struct Frozen {
    pub containers: Vec<Arc<Container>>,
    /// `None` once a restore has begun to change the guest. Then only the host thaws.
    pub lease: Option<Lease>,
}

/// Ends when it is dropped, and then nothing happens.
#[derive(Debug)]
pub(super) struct Lease(AbortHandle);

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// As long as it is held, the pod is not frozen.
#[derive(Debug)]
pub struct Admission {
    _phase: OwnedRwLockReadGuard<Phase>,
}

impl Containers {
    /// Asks to start or run something. Waits if the pod is just being frozen or thawed.
    pub async fn admit(&self) -> Result<Admission, CheckpointError> {
        let phase = Arc::clone(&self.shared.phase).read_owned().await;
        if phase.frozen.is_some() {
            return Err(CheckpointError::Frozen);
        }
        Ok(Admission { _phase: phase })
    }

    /// Freezes all running containers, which are `ids`, and gives the host some time to store their output. A failure
    /// leaves nothing frozen, also if the pod was frozen before.
    pub async fn freeze(&self, ids: &[String], lease: Duration) -> Result<(), ContainerError> {
        if lease.is_zero() || lease > MAX_LEASE {
            return Err(CheckpointError::Lease(lease).into());
        }
        let deadline = Instant::now() + FREEZE_TIMEOUT;
        let phase = timeout_at(deadline, self.phase()).await;
        let mut phase = phase.map_err(|_| CheckpointError::Busy)?;
        // This ends an earlier lease, too.
        let before = phase.frozen.take().map(|frozen| frozen.containers);
        let containers = match self.stop_all(ids, deadline).await {
            Ok(containers) => containers,
            Err(error) => {
                if let Some(before) = before {
                    thaw_all(&before)?;
                }
                return Err(error.into());
            }
        };
        let logs: Vec<_> = containers.iter().map(|one| Arc::clone(&one.log)).collect();
        phase.frozen = Some(Frozen {
            containers,
            lease: Some(self.lend(lease)),
        });
        drop(phase);
        // A copy of the pod would send once more what the host has not stored. If the host does not store it in time, that
        // is better than no checkpoint.
        let stored = async {
            for log in logs {
                log.stored().await;
            }
        };
        let _ = timeout(LOGS_TIMEOUT, stored).await;
        Ok(())
    }

    /// Thaws the pod if it is frozen. If that fails, it can be tried again.
    pub async fn thaw(&self) -> Result<(), ContainerError> {
        // What is being started may take long, and then nothing is frozen.
        if self.shared.phase.read().await.frozen.is_none() {
            return Ok(());
        }
        let mut phase = self.phase().await;
        if let Some(frozen) = &phase.frozen {
            thaw_all(&frozen.containers)?;
        }
        phase.frozen = None;
        Ok(())
    }

    /// Waits until nothing is being started or run, and keeps it so.
    pub(super) async fn phase(&self) -> OwnedRwLockWriteGuard<Phase> {
        Arc::clone(&self.shared.phase).write_owned().await
    }

    /// Freezes the containers `ids` and waits until they stand still. On an error, thaws them.
    async fn stop_all(
        &self,
        ids: &[String],
        deadline: Instant,
    ) -> Result<Vec<Arc<Container>>, CheckpointError> {
        let containers = self.chosen(ids)?;
        let stopped = stop(&containers, deadline).await;
        // One that was killed meanwhile is not what the host wants to save.
        let stopped = stopped.and_then(|()| self.chosen(ids));
        if stopped.is_err() {
            // The error that came first says more.
            let _ = thaw_all(&containers);
        }
        stopped
    }

    fn chosen(&self, ids: &[String]) -> Result<Vec<Arc<Container>>, CheckpointError> {
        let known = self.known();
        let runs = |one: &Arc<Container>| matches!(one.snapshot().0, State::Running { .. });
        let states = known.containers.iter().map(|(id, one)| (id, runs(one)));
        check(ids, &states.collect())?;
        let chosen = ids.iter().filter_map(|id| known.containers.get(id));
        Ok(chosen.cloned().collect())
    }

    fn lend(&self, lease: Duration) -> Lease {
        let ends = Instant::now() + lease;
        let containers = self.clone();
        let task = tokio::spawn(async move {
            sleep_until(ends).await;
            eprintln!("bulkhead-agent: nobody thawed the pod within {lease:?}, so it goes on");
            if let Err(error) = containers.thaw().await {
                eprintln!("bulkhead-agent: thaw the pod: {}", chain(&error));
            }
        });
        Lease(task.abort_handle())
    }
}

/// Checks that `ids` are exactly those that run, of containers of which is known whether they run.
fn check(ids: &[String], running: &BTreeMap<&String, bool>) -> Result<(), CheckpointError> {
    let mut listed = BTreeSet::new();
    for id in ids {
        match running.get(id) {
            None => return Err(CheckpointError::NotFound(id.clone())),
            Some(false) => return Err(CheckpointError::NotRunning(id.clone())),
            Some(true) => {}
        }
        if !listed.insert(id) {
            return Err(CheckpointError::Twice(id.clone()));
        }
    }
    let mut missing = running
        .iter()
        .filter(|(id, runs)| **runs && !listed.contains(*id));
    match missing.next() {
        Some((id, _)) => Err(CheckpointError::NotListed((*id).clone())),
        None => Ok(()),
    }
}

async fn stop(containers: &[Arc<Container>], deadline: Instant) -> Result<(), CheckpointError> {
    for container in containers {
        container.cgroup.freeze().map_err(of(container))?;
    }
    for container in containers {
        while !container.cgroup.is_frozen().map_err(of(container))? {
            if Instant::now() >= deadline {
                return Err(CheckpointError::NotStill { id: container.id() });
            }
            sleep(FREEZE_PAUSE).await;
        }
    }
    Ok(())
}

/// Thaws as many as possible. The error is the first one. A container that was removed meanwhile needs nothing.
fn thaw_all(containers: &[Arc<Container>]) -> Result<(), CheckpointError> {
    let mut first = Ok(());
    for container in containers {
        match container.cgroup.thaw() {
            Err(CgroupError::Freeze { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            thawed => first = first.and(thawed.map_err(of(container))),
        }
    }
    first
}

fn of(container: &Container) -> impl FnOnce(CgroupError) -> CheckpointError {
    let id = container.id();
    move |source| CheckpointError::Cgroup { id, source }
}

#[cfg(test)]
mod tests {
    use super::super::fakes::Fakes;
    use super::*;

    const LEASE: Duration = Duration::from_secs(60);

    fn ids(ids: &[&str]) -> Vec<String> {
        ids.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_list_is_exactly_what_runs() {
        let (a, b, c) = ("a".to_owned(), "b".to_owned(), "c".to_owned());
        let known: BTreeMap<_, _> = [(&a, true), (&b, false), (&c, true)].into();
        let table: [(&[&str], &str); 6] = [
            (&["a", "c"], ""),
            (&["c", "a"], ""),
            (&["a"], "container c runs and is not in the list"),
            (&["a", "c", "x"], "container x does not exist"),
            (&["a", "b", "c"], "container b does not run"),
            (&["a", "a", "c"], "container a is in the list twice"),
        ];
        for (listed, expected) in table {
            let said = check(&ids(listed), &known).map_err(|e| e.to_string());
            assert_eq!(said.err().unwrap_or_default(), expected, "{listed:?}");
        }
        assert!(check(&[], &BTreeMap::new()).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_frozen_pod_admits_nothing_until_it_is_thawed() {
        let pod = Fakes::running(&["a", "b"]);
        let containers = &pod.containers;
        containers.thaw().await.unwrap();
        containers.freeze(&ids(&["a", "b"]), LEASE).await.unwrap();
        assert_eq!([pod.frozen("a"), pod.frozen("b")], [true, true]);
        let refused = containers.admit().await.unwrap_err();
        assert_eq!(refused.to_string(), "the pod is being checkpointed");
        let refused = containers.start("a").await.unwrap_err();
        assert_eq!(refused.to_string(), "the pod is being checkpointed");
        assert_eq!(containers.changed_since(0).0.len(), 2, "reads go on");
        containers.thaw().await.unwrap();
        assert_eq!([pod.frozen("a"), pod.frozen("b")], [false, false]);
        containers.admit().await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_freeze_that_fails_leaves_nothing_frozen() {
        let pod = Fakes::running(&["a", "b"]);
        let containers = &pod.containers;
        containers.freeze(&ids(&["a"]), LEASE).await.unwrap_err();
        assert!(!pod.frozen("a"));
        pod.never_stands_still("b");
        let late = containers.freeze(&ids(&["a", "b"]), LEASE).await;
        let late = late.unwrap_err().to_string();
        assert_eq!(late, "container b did not freeze within 10s");
        assert_eq!([pod.frozen("a"), pod.frozen("b")], [false, false]);
        pod.stands_still("b");
        containers.freeze(&ids(&["a", "b"]), LEASE).await.unwrap();
        containers.freeze(&ids(&["b"]), LEASE).await.unwrap_err();
        assert_eq!([pod.frozen("a"), pod.frozen("b")], [false, false]);
        containers.admit().await.unwrap();
        for lease in [Duration::ZERO, MAX_LEASE + Duration::from_millis(1)] {
            let refused = containers.freeze(&ids(&["a", "b"]), lease).await;
            assert!(refused.is_err(), "{lease:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_being_started_ends_first_or_the_freeze_gives_up() {
        let pod = Fakes::running(&["a"]);
        let containers = pod.containers.clone();
        let admission = containers.admit().await.unwrap();
        let late = containers.freeze(&ids(&["a"]), LEASE).await.unwrap_err();
        assert!(late.to_string().ends_with("try again"), "{late}");
        let freezing = tokio::spawn(async move { containers.freeze(&ids(&["a"]), LEASE).await });
        sleep(Duration::from_secs(3)).await;
        assert!(!freezing.is_finished());
        drop(admission);
        freezing.await.unwrap().unwrap();
        assert!(pod.frozen("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_nobody_thaws_goes_on_at_the_end_of_its_last_lease() {
        let pod = Fakes::running(&["a"]);
        let containers = &pod.containers;
        containers.freeze(&ids(&["a"]), LEASE).await.unwrap();
        sleep(LEASE / 2).await;
        assert!(pod.frozen("a"));
        containers.freeze(&ids(&["a"]), LEASE).await.unwrap();
        sleep(LEASE * 9 / 10).await;
        assert!(
            pod.frozen("a"),
            "the first lease has ended, but was renewed"
        );
        sleep(LEASE).await;
        assert!(!pod.frozen("a"));
        containers.admit().await.unwrap();
        // A lease that was given back thaws nobody else's pod.
        containers.freeze(&ids(&["a"]), LEASE).await.unwrap();
        containers.thaw().await.unwrap();
        containers.freeze(&ids(&["a"]), 10 * LEASE).await.unwrap();
        sleep(2 * LEASE).await;
        assert!(pod.frozen("a"));
    }
}
