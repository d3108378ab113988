// SPDX-License-Identifier: Apache-2.0
//! Resizes a running pod: its VM gets more memory and CPUs, or gives memory back.
//!
//! `UpdatePodSandboxResources` is checked only where something grows. If the limit grows, the host's limit is raised
//! first, then the guest's. If it shrinks, the guest's limit is lowered first. Then, before the call is answered, the
//! guest gives its free memory and page cache back to the host, through the balloon. This is necessary because kubelet
//! lowers the limit of the pod's cgroup next: if the VM held more than that, the kernel would kill it.

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_guest::agent::AgentError;
use bulkhead_guest::protocol;
use bulkhead_host::{Guest, cgroup, control};
use bulkhead_vmm::config::memory_ranges;
use tokio::time::Instant;

use super::Owner;
use super::node::{self, check_placement};
use crate::pod::errors::{BootError, PodError};
use crate::pod::life::record::{Allowance, VmSize};
use crate::pod::life::spec::{PodLimits, Resources};
use crate::pod::plan::limits::{guest_limits, positive};
use crate::pod::plan::program;
use crate::pod::plan::sizing::{self, Unfit, Wanted};

const MIB: u64 = 1 << 20;
const PAGE_BYTES: u64 = 4096;
/// How long the guest may take to give back some more memory.
const BALLOON_PATIENCE: Duration = Duration::from_secs(3);
const BALLOON_PAUSE: Duration = Duration::from_millis(50);
/// Asked for in addition to what is needed, because the guest may allocate more meanwhile.
const BALLOON_SLACK_BYTES: u64 = 4 * MIB;
/// The OOM scores by which kubelet tells a memory request (burstable pods). Scores outside of this range tell nothing.
const SCORES_OF_REQUESTS: std::ops::Range<i64> = 3..999;

impl Owner {
    /// Does `UpdatePodSandboxResources`. After an error, the old limits are restored.
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
        // `resize_guest` set the pod's own huge page limits, which may be lower than those of its containers.
        self.keep_known_hugepages(&guest).await;
        self.ledger.place();
        Ok(())
    }

    /// Applies limits in the guest: memory and CPUs first, then the pod's cgroup.
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

    /// Restores the limits that are in the pod's record.
    async fn undo_resize(&self, guest: &Guest) {
        let wanted = self.ledger.wanted();
        let limits = &self.ledger.pod().spec.limits;
        if let Err(error) = self.resize_guest(guest, limits, &wanted, true).await {
            self.ledger.complain("undo a resize", &error);
        }
        self.ledger.place();
    }

    /// Hot-adds the memory that the pod is sure to get: its limit or, if it has none, the `asked_mib` of its
    /// containers. Also sets how many CPUs are online.
    async fn size_guest(
        &self,
        guest: &Guest,
        wanted: &Wanted,
        asked_mib: u64,
    ) -> Result<(), PodError> {
        let size = self.ledger.pod().size;
        if size.memory_max_mib == 0 {
            // A VM of an earlier version has all its memory from the start.
            return Ok(());
        }
        let least = wanted
            .memory_mib()
            .unwrap_or_else(|| wanted.with_containers(asked_mib));
        let cpus = match wanted.allowance.cpu_millis {
            Some(millis) => millis.div_ceil(1000).min(size.vcpus.into()),
            None => size.vcpus.into(),
        };
        let sized = guest
            .agent
            .size(size_request(&size, least, cpus, wanted))
            .await;
        sized.map_err(|source| self.guest_error(source))
    }

    /// Whether the VM is a fork whose template has fewer memory or CPUs than planned.
    pub(super) fn is_to_grow(&self, planned: &VmSize) -> bool {
        let size = self.ledger.pod().size;
        let has_all = size.memory_mib >= planned.memory_mib && planned.boot_vcpus <= 1;
        size.is_forked && !has_all
    }

    /// Gives a fork the memory and the CPUs that it would have booted with. Its template may have fewer of both.
    pub(super) async fn size_fork(&self, guest: &Guest, planned: &VmSize) -> Result<(), BootError> {
        if !self.is_to_grow(planned) {
            return Ok(());
        }
        let size = self.ledger.pod().size;
        let (least, cpus) = (planned.memory_mib.into(), planned.boot_vcpus.into());
        let request = size_request(&size, least, cpus, &self.ledger.wanted());
        Ok(guest.agent.size(request).await?)
    }

    /// Gives the guest memory and CPUs for the container `id`, before it is made with these resources or changed to
    /// them. Does nothing if the VM already has all that the pod's limits allow.
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
            // Requests may add up to more memory than the VM can have. Huge pages may not: each must be there.
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

    /// Makes the guest give memory back until the VM uses no more than its new limit.
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
        // kubelet's cgroup will be limited to the containers' limit and the overhead.
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
            // The guest may first give pages that it never touched, which frees nothing on the host. So ask for more
            // and more until enough is free.
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

/// The request for at least so much memory and so many CPUs, in a VM that started with `size`.
fn size_request(
    size: &VmSize,
    least_mib: u64,
    cpus: u64,
    wanted: &Wanted,
) -> protocol::SizeSandboxRequest {
    let most = u64::from(size.memory_max_mib);
    let ranges = memory_ranges(most * MIB);
    protocol::SizeSandboxRequest {
        memory: ranges
            .into_iter()
            .map(|(start, bytes)| protocol::MemoryRange { start, bytes })
            .collect(),
        boot_bytes: u64::from(size.memory_mib) * MIB,
        least_bytes: least_mib.min(most) * MIB,
        grows: wanted.allowance.memory_bytes.is_none(),
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
    }
}

/// The allowance after a change. In kubelet's numbers, 0 means "unchanged" and less than 0 means "no limit".
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

/// Replaces "unchanged" (0) by "no limit" (-1), so that a limit that the pod no longer has is lifted in the guest.
fn lifting(limits: protocol::Resources) -> protocol::Resources {
    let none_lifts = |limit: i64| if limit == 0 { -1 } else { limit };
    protocol::Resources {
        memory_limit_bytes: none_lifts(limits.memory_limit_bytes),
        cpu_quota_us: none_lifts(limits.cpu_quota_us),
        ..limits
    }
}

/// How much memory the containers ask for together, in MiB: the limit of each, or its request if it has no limit.
/// `host_bytes` is the host's memory.
fn asked_together<'a>(containers: impl Iterator<Item = &'a Resources>, host_bytes: u64) -> u64 {
    let asked = containers.map(|one| asked_mib_of(one, host_bytes));
    asked.fold(0, u64::saturating_add)
}

/// How much memory one container asks for. kubelet tells a memory request only through the OOM score: 1000 minus the
/// thousandths of the host's memory that are requested.
fn asked_mib_of(resources: &Resources, host_bytes: u64) -> u64 {
    if let Some(limit) = positive(resources.memory_limit_bytes) {
        return sizing::mib(limit);
    }
    let score = resources.oom_score_adj;
    let thousandths = 1000 - score;
    match u64::try_from(thousandths) {
        // Rounded up, so that the container gets at least its request.
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
        // A request of 1 GiB of 6 GiB: kubelet's score is 1000 - 166.
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
