// SPDX-License-Identifier: Apache-2.0
//! The containers' part of `RestoreSandbox`: the frozen containers of a pod that was brought back become created ones
//! with new ids, and all others are removed. Each stays frozen until it is started.
//!
//! Directories and cgroups keep their names, which are the ids that the containers were created with.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bulkhead_proto::agent::RestoredContainer;
use tokio::sync::OwnedRwLockWriteGuard;

use super::freeze::{CheckpointError, Phase};
use super::state::{Event, State};
use super::{Container, ContainerError, Containers, check_id};

/// A restore that was checked and has changed nothing so far. While it exists, nothing else freezes, thaws or starts.
#[derive(Debug)]
pub struct Restore {
    phase: OwnedRwLockWriteGuard<Phase>,
    containers: Containers,
    /// Each with its new id.
    frozen: Vec<(Arc<Container>, String)>,
    listed: Vec<RestoredContainer>,
}

impl Containers {
    /// Checks what becomes of the frozen containers. `None` if this has been done already.
    pub async fn begin_restore(
        &self,
        listed: Vec<RestoredContainer>,
    ) -> Result<Option<Restore>, ContainerError> {
        {
            let phase = self.shared.phase.read().await;
            let done = phase.restored.as_ref() == Some(&listed);
            if phase.frozen.is_none() && done {
                return Ok(None);
            }
        }
        let phase = self.phase().await;
        let frozen = phase.frozen.as_ref();
        let frozen = frozen.ok_or(CheckpointError::NotFrozen)?;
        let ids: BTreeSet<String> = frozen.containers.iter().map(|one| one.id()).collect();
        let new_ids = new_ids(&ids, &listed)?;
        check_running(frozen.containers.iter())?;
        let with_new_id = |one: &Arc<Container>| {
            let new_id = new_ids.get(&one.id())?;
            Some((Arc::clone(one), new_id.clone()))
        };
        let frozen = frozen.containers.iter().filter_map(with_new_id).collect();
        Ok(Some(Restore {
            phase,
            containers: self.clone(),
            frozen,
            listed,
        }))
    }

    /// Puts the containers under their new ids, as created ones.
    fn rename(&self, renamed: &[(Arc<Container>, String)]) -> Result<(), ContainerError> {
        let mut known = self.known();
        check_running(renamed.iter().map(|(container, _)| container))?;
        // All old ids first, because a new id may be the old one of another container.
        for (container, _) in renamed {
            known.containers.remove(&container.id());
        }
        for (container, new_id) in renamed {
            container.set_id(new_id);
            known
                .containers
                .insert(new_id.clone(), Arc::clone(container));
        }
        drop(known);
        for (container, _) in renamed {
            self.advance(container, Event::Restored)?;
        }
        Ok(())
    }

    /// Thaws a restored container, which runs from now on.
    pub(super) fn start_restored(
        &self,
        container: &Container,
        pid: i32,
    ) -> Result<State, ContainerError> {
        let at = std::time::Instant::now();
        container.cgroup.thaw()?;
        // There was no await since the thaw, so the container's end cannot have been noticed yet.
        Ok(self.advance(container, Event::Started { pid, at })?)
    }
}

impl Restore {
    /// From now on the pod is no longer what it was, so it must not go on by itself.
    pub fn end_lease(&mut self) {
        if let Some(frozen) = &mut self.phase.frozen {
            frozen.lease = None;
        }
    }

    /// The processes of all frozen containers.
    pub fn pids(&self) -> Vec<i32> {
        let containers = self.frozen.iter();
        containers
            .flat_map(|(container, _)| container.cgroup.pids())
            .collect()
    }

    /// Removes what was not frozen, and makes created containers of what was.
    pub async fn finish(mut self) -> Result<(), ContainerError> {
        let frozen: BTreeSet<_> = self.frozen.iter().map(|(one, _)| one.id()).collect();
        let known: Vec<_> = self.containers.known().containers.keys().cloned().collect();
        for id in known.iter().filter(|id| !frozen.contains(*id)) {
            self.containers.remove(id).await?;
        }
        self.containers.rename(&self.frozen)?;
        self.phase.frozen = None;
        self.phase.restored = Some(self.listed);
        Ok(())
    }
}

fn check_running<'a>(
    containers: impl Iterator<Item = &'a Arc<Container>>,
) -> Result<(), CheckpointError> {
    for container in containers {
        if !matches!(container.snapshot().0, State::Running { .. }) {
            return Err(CheckpointError::NotRunning(container.id()));
        }
    }
    Ok(())
}

/// The new id of each frozen container. An error if the list does not have each of them once, or new ids cannot be used.
fn new_ids(
    frozen: &BTreeSet<String>,
    listed: &[RestoredContainer],
) -> Result<BTreeMap<String, String>, ContainerError> {
    let invalid = |id: &str, what| ContainerError::Invalid(format!("container {id} {what}"));
    let mut found = BTreeMap::new();
    let mut taken = BTreeSet::new();
    for RestoredContainer { id, new_id } in listed {
        if !frozen.contains(id) {
            return Err(invalid(id, "was not frozen"));
        }
        check_id(new_id)?;
        let again = !taken.insert(new_id) || found.insert(id.clone(), new_id.clone()).is_some();
        if again {
            return Err(invalid(id, "or its new id is in the list twice"));
        }
    }
    match frozen.iter().find(|id| !found.contains_key(*id)) {
        Some(id) => Err(invalid(id, "was frozen and is not in the list")),
        None => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fakes::Fakes;
    use super::*;
    use std::time::Duration;

    const LEASE: Duration = Duration::from_secs(60);

    fn list(pairs: &[(&str, &str)]) -> Vec<RestoredContainer> {
        let one = |(id, new_id): &(&str, &str)| RestoredContainer {
            id: (*id).to_owned(),
            new_id: (*new_id).to_owned(),
        };
        pairs.iter().map(one).collect()
    }

    async fn freeze(containers: &Containers, ids: &[&str]) {
        let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
        containers.freeze(&ids, LEASE).await.unwrap();
    }

    async fn restore(containers: &Containers, pairs: &[(&str, &str)]) {
        let begun = containers.begin_restore(list(pairs)).await.unwrap();
        begun.unwrap().finish().await.unwrap();
    }

    #[test]
    fn each_frozen_container_gets_one_new_id() {
        let frozen = ["a".to_owned(), "b".to_owned()].into();
        let table: [(&[(&str, &str)], &str); 7] = [
            (&[("a", "x"), ("b", "y")], ""),
            (&[("a", "b"), ("b", "a")], ""),
            (
                &[("a", "x")],
                "container b was frozen and is not in the list",
            ),
            (
                &[("a", "x"), ("b", "x")],
                "container b or its new id is in the list twice",
            ),
            (
                &[("a", "x"), ("a", "y")],
                "container a or its new id is in the list twice",
            ),
            (&[("a", "x"), ("c", "y")], "container c was not frozen"),
            (
                &[("a", "../x"), ("b", "y")],
                "\"../x\" is not a container id",
            ),
        ];
        for (pairs, expected) in table {
            let said = new_ids(&frozen, &list(pairs)).map_err(|e| e.to_string());
            assert_eq!(said.err().unwrap_or_default(), expected, "{pairs:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn frozen_containers_are_created_ones_under_their_new_ids_until_they_are_started() {
        let pod = Fakes::running(&["a", "b"]);
        pod.add_created("c");
        let containers = &pod.containers;
        let mut news = containers.changes();
        freeze(containers, &["a", "b"]).await;
        news.borrow_and_update();
        restore(containers, &[("a", "b"), ("b", "new")]).await;
        assert!(news.has_changed().unwrap());

        let (told, _) = containers.changed_since(0);
        let told: Vec<_> = told
            .into_iter()
            .map(|(one, state)| (one.id(), state))
            .collect();
        let created = |id: &str, pid| (id.to_owned(), State::Restored { pid });
        assert_eq!(told, [created("b", 1), created("new", 2)]);
        for gone in ["a", "c"] {
            assert!(containers.get(gone).is_err(), "{gone}");
        }
        assert_eq!([pod.frozen("a"), pod.frozen("b")], [true, true]);
        let refused = containers.signal("b", libc::SIGTERM, false).unwrap_err();
        assert!(refused.to_string().contains("signal is not possible"));

        let (started, state) = containers.start("b").await.unwrap();
        assert_eq!(started.id(), "b");
        assert!(matches!(state, State::Running { pid: 1, .. }), "{state:?}");
        assert_eq!([pod.frozen("a"), pod.frozen("b")], [false, true]);
        assert!(containers.start("b").await.is_err(), "it runs already");
        // A checkpoint of the restored pod has only what was started.
        freeze(containers, &["b"]).await;
        assert_eq!([pod.frozen("a"), pod.frozen("b")], [true, true]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_repetition_is_no_error_and_another_restore_is_one() {
        let pod = Fakes::running(&["a"]);
        let containers = &pod.containers;
        let begin = |pairs: &[(&str, &str)]| containers.begin_restore(list(pairs));
        assert!(begin(&[]).await.is_err(), "nothing is frozen");
        freeze(containers, &["a"]).await;
        assert!(begin(&[]).await.is_err(), "not all are listed");
        restore(containers, &[("a", "new")]).await;
        assert!(begin(&[("a", "new")]).await.unwrap().is_none());
        let again = begin(&[("a", "other")]).await.unwrap_err().to_string();
        assert_eq!(again, "the pod is not frozen: its lease may have ended");
        tokio::time::sleep(2 * LEASE).await;
        assert!(pod.frozen("a"), "no lease is left");
    }

    #[tokio::test(start_paused = true)]
    async fn a_restore_that_has_begun_ends_the_lease_and_can_be_repeated_or_given_up() {
        let pod = Fakes::running(&["a"]);
        let containers = &pod.containers;
        freeze(containers, &["a"]).await;
        let begun = containers.begin_restore(list(&[("a", "new")])).await;
        let mut begun = begun.unwrap().unwrap();
        begun.end_lease();
        drop(begun);
        tokio::time::sleep(2 * LEASE).await;
        assert!(pod.frozen("a"));
        restore(containers, &[("a", "new")]).await;
        containers.get("new").unwrap();
        // One that was checked and no more keeps its lease.
        let pod = Fakes::running(&["a"]);
        freeze(&pod.containers, &["a"]).await;
        let begun = pod.containers.begin_restore(list(&[("a", "new")])).await;
        drop(begun.unwrap());
        tokio::time::sleep(2 * LEASE).await;
        assert!(!pod.frozen("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn the_names_of_directories_stay_taken() {
        let pod = Fakes::running(&["a"]);
        freeze(&pod.containers, &["a"]).await;
        restore(&pod.containers, &[("a", "new")]).await;
        for taken in ["a", "new"] {
            let refused = pod.containers.reserve(taken).err();
            let refused = refused.map(|e| e.to_string()).unwrap_or_default();
            assert_eq!(refused, format!("container {taken} exists already"));
        }
        assert!(pod.containers.reserve("other").is_ok());
    }
}
