// SPDX-License-Identifier: Apache-2.0
//! What a running pod's VM gets more of, and what it has to give back.
//!
//! `UpdatePodSandboxResources` is checked as far as something grows. What grows is given by the host first, then by the
//! guest; what shrinks is taken in the guest first. Then the guest's free memory and page cache go back to the host, through
//! the balloon, before the answer: kubelet lowers the limit of the pod's cgroup next, and where that holds more, the kernel
//! would kill the VM.

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_guest::agent::AgentError;
use bulkhead_guest::protocol;
use bulkhead_host::{Guest, cgroup, control};
use bulkhead_vmm::config::memory_ranges;
use tokio::time::Instant;

use super::Owner;
use super::node::{self, check_placement};
use crate::pod::errors::PodError;
use crate::pod::life::record::Allowance;
use crate::pod::life::spec::{PodLimits, Resources};
use crate::pod::plan::limits::{guest_limits, positive};
use crate::pod::plan::program;
use crate::pod::plan::sizing::{self, Unfit, Wanted};

const MIB: u64 = 1 << 20;
const PAGE_BYTES: u64 = 4096;
/// How long the guest may take to give back more.
const BALLOON_PATIENCE: Duration = Duration::from_secs(3);
const BALLOON_PAUSE: Duration = Duration::from_millis(50);
/// Asked for beyond what is needed: the guest goes on meanwhile.
const BALLOON_SLACK_BYTES: u64 = 4 * MIB;
/// kubelet's scores for pods that have a memory request and no limit; one that is out of range says nothing.
const SCORES_OF_REQUESTS: std::ops::Range<i64> = 3..999;

impl Owner {
    /// `UpdatePodSandboxResources`. After an error all is as it was.
    pub(super) async fn resize(
        &mut self,
        resources: &Resources,
        overhead: &Resources,
    ) -> Result<(), PodError> {
        let guest = self.ledger.ready_guest("a resize")?;
        program::resources(resources)?;
        check_placement(resources)?;
        let old = self.ledger.wanted();
        let mut changed = self.ledger.pod().spec.limits.clone();
        changed.resources.update(resources);
        changed.overhead.update(overhead);
        let allowance = resized(old.allowance, resources);
        let live = self.ledger.live().map(|one| &one.spec.resources);
        let new = self.ledger.wanted_with(&changed, allowance, live);
        let inside = self.kubelets_cgroup();
        let room = inside
            .is_some()
            .then(|| positive(changed.overhead.memory_limit_bytes).unwrap_or(0));
        sizing::resize(&old, &new, &self.ledger.pod().size, node::cpus(), room)?;

        let grows = sizing::grows(old.allowance.memory_bytes, allowance.memory_bytes);
        if let Some(path) = self.ledger.pod().cgroup().filter(|_| grows) {
            let limits = self.ledger.host_limits_for(&new);
            self.shared.host.cgroups.limit(path, &limits);
        }
        let done = self.resize_guest(&guest, &changed, &new, grows).await;
        let done = match (done, allowance.memory_bytes) {
            (Ok(()), Some(_)) if !grows => self.take_back(&guest, &new, &changed, inside).await,
            (done, _) => done,
        };
        if let Err(error) = done {
            self.undo_resize(&guest).await;
            return Err(error);
        }
        self.ledger.change_pod(|pod| {
            pod.spec.limits = changed;
            pod.allowance = allowance;
        })?;
        // The pod's own huge pages, which came along, may be fewer than its containers have.
        self.keep_known_hugepages(&guest).await;
        self.ledger.place();
        Ok(())
    }

    async fn resize_guest(
        &self,
        guest: &Guest,
        limits: &PodLimits,
        wanted: &Wanted,
        grows: bool,
    ) -> Result<(), PodError> {
        if grows || wanted.allowance != self.ledger.pod().allowance {
            let live = self.ledger.live().map(|one| &one.spec.resources);
            let asked = asked_together(live, node::Memory::read().total_bytes);
            self.size_guest(guest, wanted, asked).await?;
        }
        let limits = lifting(guest_limits(
            limits,
            wanted.allowance,
            self.ledger.pod().cgroup(),
        ));
        guest
            .agent
            .limit(limits)
            .await
            .map_err(|source| self.guest_error(source))
    }

    /// Puts back what the pod still has by its record.
    async fn undo_resize(&self, guest: &Guest) {
        let wanted = self.ledger.wanted();
        let limits = &self.ledger.pod().spec.limits;
        if let Err(error) = self.resize_guest(guest, limits, &wanted, true).await {
            self.ledger.complain("undo a resize", &error);
        }
        self.ledger.place();
    }

    /// Gives the guest what the pod is to have for certain: its limit or, without one, the `asked_mib` of its containers.
    async fn size_guest(
        &self,
        guest: &Guest,
        wanted: &Wanted,
        asked_mib: u64,
    ) -> Result<(), PodError> {
        let size = self.ledger.pod().size;
        if size.memory_max_mib == 0 {
            // Of an earlier version: it has all that it can have.
            return Ok(());
        }
        let least = wanted
            .memory_mib()
            .unwrap_or_else(|| wanted.with_containers(asked_mib));
        let most = u64::from(size.memory_max_mib);
        let cpus = match wanted.allowance.cpu_millis {
            Some(millis) => millis.div_ceil(1000).min(size.vcpus.into()),
            None => size.vcpus.into(),
        };
        let ranges = memory_ranges(most * MIB);
        let request = protocol::SizeSandboxRequest {
            memory: ranges
                .into_iter()
                .map(|(start, bytes)| protocol::MemoryRange { start, bytes })
                .collect(),
            boot_bytes: u64::from(size.memory_mib) * MIB,
            least_bytes: least.min(most) * MIB,
            grows: wanted.allowance.memory_bytes.is_none(),
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        };
        let sized = guest.agent.size(request).await;
        sized.map_err(|source| self.guest_error(source))
    }

    /// Before the container `id` is made with these resources, or changed to them: memory for it, as far as the pod's limit
    /// does not cover it, and CPUs.
    pub(super) async fn make_room(
        &self,
        guest: &Guest,
        id: &str,
        resources: &Resources,
    ) -> Result<(), PodError> {
        let others = self.ledger.live().filter(|one| one.id != id);
        let live: Vec<&Resources> = others
            .map(|one| &one.spec.resources)
            .chain([resources])
            .collect();
        let pod = &self.ledger.pod();
        let wanted = self
            .ledger
            .wanted_with(&pod.spec.limits, pod.allowance, live.iter().copied());
        let more_pages = wanted.hugepage_bytes > self.ledger.wanted().hugepage_bytes;
        let all_cpus = pod.allowance.cpu_millis.is_some() || pod.size.vcpus == pod.size.boot_vcpus;
        if pod.allowance.memory_bytes.is_some() && all_cpus && !more_pages {
            return Ok(());
        }
        let asked = asked_together(live.into_iter(), node::Memory::read().total_bytes);
        if more_pages {
            // A request may be more than there is; pages must all be there.
            let needed = wanted
                .memory_mib()
                .unwrap_or_else(|| wanted.with_containers(0));
            let most = u64::from(pod.size.memory_max_mib.max(pod.size.memory_mib));
            if needed > most {
                return Err(Unfit::Memory { needed, most }.into());
            }
            if let Some(path) = pod.cgroup() {
                let limits = self.ledger.host_limits_for(&wanted);
                self.shared.host.cgroups.limit(path, &limits);
            }
        }
        self.size_guest(guest, &wanted, asked).await
    }

    /// kubelet's cgroup of the pod, if the VM lives in it.
    fn kubelets_cgroup(&self) -> Option<PathBuf> {
        let parent = cgroup::around(self.ledger.pod().cgroup()?)?;
        let cgroups = &self.shared.host.cgroups;
        let given = cgroups.of_pod(&self.ledger.pod().spec.limits.cgroup_parent)?;
        (given.path == parent).then_some(given.path)
    }

    /// Has the guest give memory back until the VM holds no more than it may from now on.
    async fn take_back(
        &self,
        guest: &Guest,
        wanted: &Wanted,
        limits: &PodLimits,
        inside: Option<PathBuf>,
    ) -> Result<(), PodError> {
        let Some(own) = self.ledger.pod().cgroup() else {
            return Ok(());
        };
        // kubelet's cgroup is to hold the limit and the overhead.
        let (path, most) = match inside {
            Some(path) => {
                let containers = wanted.allowance.memory_bytes.unwrap_or(u64::MAX);
                let overhead = positive(limits.overhead.memory_limit_bytes).unwrap_or(0);
                (path, containers.saturating_add(overhead))
            }
            None => (own.to_owned(), wanted.host_bytes().unwrap_or(u64::MAX)),
        };
        let held = || cgroup::held_bytes(&path).unwrap_or(0);
        if held() <= most {
            return Ok(());
        }
        let socket = guest.files.control();
        let mut asked = 0_u64;
        let mut least = held();
        let mut deadline = Instant::now() + BALLOON_PATIENCE;
        let mut result = Ok(());
        while least > most && Instant::now() < deadline && result.is_ok() {
            // Pages that the guest never touched are given for nothing: so more is asked for as long as it takes.
            let excess = least - most + BALLOON_SLACK_BYTES;
            asked = asked.max(excess).saturating_add(excess / 8);
            result = control::balloon(&socket, asked / PAGE_BYTES).await;
            tokio::time::sleep(BALLOON_PAUSE).await;
            let now = held();
            if now < least {
                least = now;
                deadline = Instant::now() + BALLOON_PATIENCE;
            }
        }
        let emptied = control::balloon(&socket, 0).await;
        result.and(emptied)?;
        if held() > most {
            return Err(Unfit::Held {
                held: sizing::mib(held()),
                most: most / MIB,
            }
            .into());
        }
        Ok(())
    }

    pub(super) fn guest_error(&self, source: AgentError) -> PodError {
        PodError::Guest {
            id: self.ledger.pod().id.clone(),
            source,
        }
    }
}

/// What a change says, in kubelet's numbers: 0 is "as it was", less is "no limit".
fn resized(old: Allowance, change: &Resources) -> Allowance {
    Allowance {
        memory_bytes: match change.memory_limit_bytes {
            0 => old.memory_bytes,
            bytes => positive(bytes),
        },
        cpu_millis: match change.cpu_quota_us {
            0 => old.cpu_millis,
            _ => Some(change.cpu_limit_millis()).filter(|millis| *millis > 0),
        },
        ..old
    }
}

/// The same limits for a cgroup that may have other ones: those that are not there are lifted.
fn lifting(limits: protocol::Resources) -> protocol::Resources {
    let none_lifts = |limit: i64| if limit == 0 { -1 } else { limit };
    protocol::Resources {
        memory_limit_bytes: none_lifts(limits.memory_limit_bytes),
        cpu_quota_us: none_lifts(limits.cpu_quota_us),
        ..limits
    }
}

/// What containers ask for together: their limits, else their requests. The host has `host_bytes`.
fn asked_together<'a>(containers: impl Iterator<Item = &'a Resources>, host_bytes: u64) -> u64 {
    let asked = containers.map(|one| asked_mib_of(one, host_bytes));
    asked.fold(0, u64::saturating_add)
}

/// kubelet tells a request only by a score for the host's memory killer: 1000 less the thousandths of the host's memory.
fn asked_mib_of(resources: &Resources, host_bytes: u64) -> u64 {
    if let Some(limit) = positive(resources.memory_limit_bytes) {
        return sizing::mib(limit);
    }
    let score = resources.oom_score_adj;
    let thousandths = 1000 - score;
    match u64::try_from(thousandths) {
        // Rounded up: it is to have what it asks for.
        Ok(thousandths) if SCORES_OF_REQUESTS.contains(&score) => {
            sizing::mib(host_bytes / 1000 * (thousandths + 1))
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_below_zero_lift_a_limit_and_zero_leaves_it() {
        let old = Allowance {
            memory_bytes: Some(5),
            cpu_millis: Some(7),
            hugepage_bytes: 9,
        };
        let change = |memory_limit_bytes, cpu_quota_us| Resources {
            memory_limit_bytes,
            cpu_quota_us,
            cpu_period_us: 100_000,
            ..Default::default()
        };
        for (change, memory_bytes, cpu_millis) in [
            (change(0, 0), Some(5), Some(7)),
            (change(-1, -1), None, None),
            (change(-1 - (180 << 20), 50_000), None, Some(500)),
            (change(9, 0), Some(9), Some(7)),
        ] {
            let expected = Allowance {
                memory_bytes,
                cpu_millis,
                ..old
            };
            assert_eq!(resized(old, &change), expected, "{change:?}");
        }
    }

    #[test]
    fn a_request_is_read_from_kubelets_score() {
        let host = 6 << 30;
        let asked = |score, limit| {
            let resources = Resources {
                oom_score_adj: score,
                memory_limit_bytes: limit,
                ..Default::default()
            };
            asked_mib_of(&resources, host)
        };
        // 1 GiB of 6: kubelet makes 1000 - 166.
        assert!(asked(834, 0) >= 1024, "{}", asked(834, 0));
        assert!(asked(834, 0) < 1040, "{}", asked(834, 0));
        assert_eq!(asked(834, 64 << 20), 64, "the limit is known");
        for score in [1000, 999, 0, -997, 2] {
            assert_eq!(asked(score, 0), 0, "{score}");
        }
    }

    #[test]
    fn limits_that_are_not_there_are_lifted() {
        let lifted = lifting(protocol::Resources::default());
        assert_eq!((lifted.memory_limit_bytes, lifted.cpu_quota_us), (-1, -1));
        let kept = lifting(protocol::Resources {
            memory_limit_bytes: 5,
            ..Default::default()
        });
        assert_eq!(kept.memory_limit_bytes, 5);
    }
}
