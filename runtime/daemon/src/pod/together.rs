// SPDX-License-Identifier: Apache-2.0
//! What the containers of a pod have of their guest together, though CRI says it of each, or not at all.
//!
//! **Huge pages**: kubelet tells no pod of them, only containers, naming every page size of the *host* with 0 where it
//! wants none. The guest keeps as many as its live containers may use together, or as the pod itself asks for, if that is
//! more. They are reserved before a container is made and given back after it was removed; those of one that has exited
//! go to the next one that is made.
//! **Processes**: `podPidsLimit` is only in the cgroup that kubelet made for the pod; it is read at the pod's start and
//! for each new container, and counts all of the guest's containers together.

use std::collections::BTreeMap;

use bulkhead_guest::agent::AgentError;
use bulkhead_guest::protocol;
use bulkhead_host::Guest;
use bulkhead_host::cgroup::pids::PidsLimit;

use super::PodError;
use super::owner::Owner;
use super::spec::Resources;

/// As the agent takes it: less than zero lifts a limit.
const NO_LIMIT: i64 = -1;

impl Owner {
    /// Has the guest count the pod's processes as kubelet's cgroup says, if that has changed.
    pub(super) async fn limit_pids(&mut self, guest: &Guest) -> Result<(), AgentError> {
        let parent = &self.pod.spec.limits.cgroup_parent;
        let Some(limit) = self.shared.host.cgroups.pids_limit(parent) else {
            return Ok(());
        };
        // A fresh guest has none; an adopted one has what an earlier daemon told it.
        if self.pids_limit == Some(limit) {
            return Ok(());
        }
        let limits = protocol::Resources {
            pids_limit: match limit {
                PidsLimit::None => NO_LIMIT,
                PidsLimit::AtMost(number) => number,
            },
            ..Default::default()
        };
        guest.agent.limit(limits).await?;
        self.pids_limit = Some(limit);
        Ok(())
    }

    /// Makes room for the container `id`, which is to have `resources`.
    pub(super) async fn limit_together(
        &mut self,
        guest: &Guest,
        id: &str,
        resources: &Resources,
    ) -> Result<(), PodError> {
        let limited = self.limit_pids(guest).await;
        limited.map_err(|source| PodError::Guest {
            id: self.pod.id.clone(),
            source,
        })?;
        self.reserve_hugepages(guest, id, resources).await
    }

    /// Has the guest keep the huge pages of its live containers and of `id`, which is to have `resources`.
    pub(super) async fn reserve_hugepages(
        &self,
        guest: &Guest,
        id: &str,
        resources: &Resources,
    ) -> Result<(), PodError> {
        let reserved = self.keep_hugepages(guest, id, resources, true).await;
        reserved.map_err(|source| PodError::Guest {
            id: self.pod.id.clone(),
            source,
        })
    }

    /// Gives back the huge pages of `id`, which had `resources` and is gone, or was never made.
    pub(super) async fn give_back_hugepages(&self, guest: &Guest, id: &str, resources: &Resources) {
        if let Err(error) = self.keep_hugepages(guest, id, resources, false).await {
            self.complain("keep and give back huge pages", &error);
        }
    }

    /// Of the containers as they are known, after a change that was refused or that was of something else.
    pub(super) async fn keep_known_hugepages(&self, guest: &Guest) {
        self.give_back_hugepages(guest, "", &Resources::default())
            .await;
    }

    async fn keep_hugepages(
        &self,
        guest: &Guest,
        id: &str,
        resources: &Resources,
        lives: bool,
    ) -> Result<(), AgentError> {
        let others = self.containers.values().filter(|one| one.id != id);
        let live = others.clone().filter(|one| !one.state.is_exited());
        let hugepage_limits = together(
            &self.pod.spec.limits.resources,
            others.map(|one| &one.spec.resources).chain([resources]),
            live.map(|one| &one.spec.resources)
                .chain(lives.then_some(resources)),
        );
        if hugepage_limits.is_empty() {
            return Ok(());
        }
        let limits = protocol::Resources {
            hugepage_limits,
            ..Default::default()
        };
        guest.agent.limit(limits).await
    }
}

/// Of all sizes together, for live containers or, if that is more, for the pod itself.
pub(super) fn hugepage_bytes<'a>(
    pod: &'a Resources,
    live: impl Iterator<Item = &'a Resources>,
) -> u64 {
    let sums = together(pod, [pod].into_iter(), live);
    let bytes = sums.iter().map(|limit| limit.limit_bytes);
    bytes.fold(0, u64::saturating_add)
}

/// By page size, the bytes that are wanted: of all sizes that anybody known ever wanted some of.
fn together<'a>(
    pod: &Resources,
    known: impl Iterator<Item = &'a Resources>,
    live: impl Iterator<Item = &'a Resources>,
) -> Vec<protocol::HugepageLimit> {
    let mut wanted: BTreeMap<&str, u64> = BTreeMap::new();
    for (size, bytes) in known.flat_map(|one| &one.hugepage_limits) {
        if *bytes > 0 {
            wanted.insert(size, 0);
        }
    }
    for (size, bytes) in live.flat_map(|one| &one.hugepage_limits) {
        if *bytes > 0 {
            let sum = wanted.entry(size).or_default();
            *sum = sum.saturating_add(*bytes);
        }
    }
    if wanted.is_empty() {
        return Vec::new();
    }
    for (size, bytes) in &pod.hugepage_limits {
        let sum = wanted.entry(size).or_default();
        *sum = (*sum).max(*bytes);
    }
    let limit = |(page_size, limit_bytes): (&str, u64)| protocol::HugepageLimit {
        page_size: page_size.to_owned(),
        limit_bytes,
    };
    wanted.into_iter().map(limit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants(sizes: &[(&str, u64)]) -> Resources {
        Resources {
            hugepage_limits: sizes
                .iter()
                .map(|(size, bytes)| ((*size).to_owned(), *bytes))
                .collect(),
            ..Default::default()
        }
    }

    fn sums(pod: &Resources, known: &[Resources], live: &[Resources]) -> Vec<(String, u64)> {
        let limits = together(pod, known.iter(), live.iter());
        let pair = |limit: protocol::HugepageLimit| (limit.page_size, limit.limit_bytes);
        limits.into_iter().map(pair).collect()
    }

    #[test]
    fn live_containers_are_summed_up_and_what_only_the_dead_had_is_none() {
        let none = Resources::default();
        let (small, large) = (wants(&[("2MB", 4), ("1GB", 0)]), wants(&[("2MB", 8)]));
        let dead = wants(&[("2MB", 100), ("64KB", 7)]);
        let known = [small.clone(), large.clone(), dead];
        let expected = [("2MB".to_owned(), 12), ("64KB".to_owned(), 0)];
        assert_eq!(sums(&none, &known, &[small, large]), expected);
        let idle = wants(&[("2MB", 0), ("1GB", 0)]);
        let idle = [idle];
        assert_eq!(sums(&none, &idle, &idle), []);
        let greedy = wants(&[("2MB", u64::MAX)]);
        let both = [greedy.clone(), greedy];
        assert_eq!(sums(&none, &both, &both), [("2MB".to_owned(), u64::MAX)]);
    }

    #[test]
    fn what_the_pod_itself_asked_for_is_not_given_back() {
        let pod = wants(&[("2MB", 16)]);
        let container = wants(&[("2MB", 4)]);
        let known = [container.clone()];
        for live in [&[] as &[_], &known] {
            assert_eq!(sums(&pod, &known, live), [("2MB".to_owned(), 16)]);
            assert_eq!(hugepage_bytes(&pod, live.iter()), 16);
        }
        let none = Resources::default();
        assert_eq!(hugepage_bytes(&none, known.iter()), 4);
        assert_eq!(hugepage_bytes(&none, std::iter::empty()), 0);
    }
}
