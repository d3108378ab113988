// SPDX-License-Identifier: Apache-2.0
//! How large a pod's VM is, and whether it fits. Pure.
//!
//! A VM boots with the memory that the pod's containers may use together, and in addition what its own kernel and agent
//! need. The latter grows with the VM's memory (docs/measurements.md has figures). The VM can get more memory while it
//! runs: when the limit is raised and, if the pod has no limit, whenever it needs more.
//!
//! The host allocates memory only when the guest first touches it. So at a boot only what a boot touches must be free
//! on the host: Kubernetes overcommits limits, and so limits may add up to more than the host has. But one pod alone
//! never gets a limit that exceeds the host's whole memory.

use bulkhead_proto::agent::{GUEST_FIXED_BYTES, GUEST_PARTS};
use bulkhead_vmm::config::{MAX_MEMORY_MIB, MAX_VCPUS};

use crate::pod::life::record::{Allowance, VmSize};

const MIB: u64 = 1 << 20;
const GUEST_FIXED_MIB: u64 = GUEST_FIXED_BYTES / MIB;
/// How much memory a guest has touched when its agent is ready.
const GUEST_START_MIB: u64 = 48;
/// What a VMM needs in addition to the guest's memory.
const VMM_FIXED_MIB: u64 = 16;
/// The host's page tables for the guest's memory take 1/256 of it.
const VMM_PARTS: u64 = 256;
/// A guest does not boot with less.
const LEAST_MIB: u64 = 64;
/// Memory is added in blocks of 128 MiB. This is what the guest needs to manage the unused rest of the last block.
const BLOCK_SLACK_MIB: u64 = 4;
/// A pod does not start with less free disk: room for the file system's own structures, and a little to write.
const LEAST_DISK_BYTES: u64 = 64 * MIB;
/// While the VM runs, a CPU limit can be raised to this many CPUs or to twice what it was, whichever is more.
const SPARE_VCPUS: u8 = 4;

/// What a pod asks for; 0 means "not set".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub allowance: Allowance,
    pub hugepage_bytes: u64,
    pub cpu_request_millis: u64,
    /// The size of the scratch disk that the pod asks for.
    pub scratch_bytes: Option<u64>,
}

/// The administrator's settings for VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// The least number of CPUs that a VM boots with.
    pub vcpus: u8,
    /// The boot memory of a VM whose pod has no memory limit.
    pub memory_mib: u32,
    /// The most memory that a VM can have.
    pub memory_max_mib: u32,
    pub scratch_bytes: u64,
    /// The largest scratch disk that a pod may ask for.
    pub scratch_max_bytes: u64,
}

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    pub cpus: usize,
    pub memory_bytes: u64,
    pub available_bytes: u64,
    /// The tightest limit of the cgroups that the VM will be in.
    pub cgroup_bytes: Option<u64>,
    /// Free bytes on the file system of the scratch disks.
    pub disk_bytes: u64,
    /// How much of them is promised to pods that asked for it and have not written it yet.
    pub promised_bytes: u64,
}

/// Why a pod does not fit on this host. Amounts are in MiB.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    #[error(
        "the pod needs {needed} MiB of memory ({limit} MiB for its containers, the rest for its VM), but the host has {total} \
         MiB"
    )]
    Host { needed: u64, limit: u64, total: u64 },
    #[error(
        "the VM needs {needed} MiB of memory to boot, but the host has only {available} MiB available"
    )]
    Available { needed: u64, available: u64 },
    #[error(
        "the pod's VM needs at least {needed} MiB of memory, but the cgroup for it allows only {allowed} MiB: raise that \
         cgroup's limit, or lower the pod's"
    )]
    Cgroup { needed: u64, allowed: u64 },
    #[error(
        "the pod needs {needed} MiB of disk, but of the {free} MiB that are free, {promised} MiB are promised to other pods"
    )]
    Disk {
        needed: u64,
        free: u64,
        promised: u64,
    },
    #[error(
        "the pod asks for {needed} MiB of disk, but a pod may have at most {most} MiB (sandbox.scratch_disk_max_gib)"
    )]
    DiskMost { needed: u64, most: u64 },
    #[error(
        "the pod's containers would need a VM of {needed} MiB, but this one can have at most {most} MiB: create the pod again \
         on a larger node, or raise sandbox.memory_max_mib"
    )]
    Memory { needed: u64, most: u64 },
    #[error(
        "the pod's VM would need {needed} MiB in addition to its containers, but the RuntimeClass's overhead is {overhead} \
         MiB: raise the overhead and create the pod again"
    )]
    Overhead { needed: u64, overhead: u64 },
    #[error(
        "the pod would need {needed} CPUs, but its VM can have at most {vcpus}: create the pod again"
    )]
    Cpus { needed: u64, vcpus: u64 },
    #[error(
        "the pod's VM uses {held} MiB of the host's memory, but the new limit allows only {most} MiB, and the guest gives back \
         no more: first stop what uses the memory"
    )]
    Held { held: u64, most: u64 },
}

impl Wanted {
    /// How much memory the VM needs, so that its containers can use all of their limit. `None` if they have no limit.
    pub fn memory_mib(&self) -> Option<u64> {
        Some(self.with_containers(mib(self.allowance.memory_bytes?)))
    }

    /// How much memory the VM needs, so that its containers can use `container_mib` and the pod's huge pages.
    pub fn with_containers(&self, container_mib: u64) -> u64 {
        let inside = container_mib
            .saturating_add(mib(self.hugepage_bytes))
            .saturating_add(GUEST_FIXED_MIB);
        // The guest needs 1/GUEST_PARTS of the whole to manage it, so: whole = inside / (1 - 1/GUEST_PARTS).
        inside.saturating_mul(GUEST_PARTS).div_ceil(GUEST_PARTS - 1)
    }

    /// The VM's memory limit on the host. `None` if the containers have no limit.
    pub fn host_bytes(&self) -> Option<u64> {
        let whole = self.memory_mib()?;
        let all = whole
            .saturating_add(vmm_mib(whole))
            .saturating_add(BLOCK_SLACK_MIB);
        Some(all.saturating_mul(MIB))
    }
}

/// What the VMM needs in addition to a guest's memory of `memory_mib`.
pub fn vmm_mib(memory_mib: u64) -> u64 {
    VMM_FIXED_MIB + memory_mib.div_ceil(VMM_PARTS)
}

/// How large the VM will be, or why it does not fit.
pub fn size(wanted: &Wanted, defaults: &Defaults, room: &Room) -> Result<VmSize, Unfit> {
    let scratch_bytes = scratch(wanted, defaults, room)?;
    let (memory_mib, memory_max_mib) = memory(wanted, defaults, room)?;
    let (vcpus, boot_vcpus) = cpus(wanted, defaults, room.cpus);
    Ok(VmSize {
        vcpus,
        boot_vcpus,
        memory_mib,
        memory_max_mib,
        scratch_bytes,
        is_forked: false,
    })
}

/// The most CPUs that the VM can have, and how many it boots with.
fn cpus(wanted: &Wanted, defaults: &Defaults, host_cpus: usize) -> (u8, u8) {
    let whole = |millis: u64| u8::try_from(millis.div_ceil(1000)).unwrap_or(u8::MAX);
    let host = u8::try_from(host_cpus)
        .unwrap_or(MAX_VCPUS)
        .clamp(1, MAX_VCPUS);
    let limit = wanted.allowance.cpu_millis.map(whole);
    let boot = limit
        .unwrap_or_else(|| whole(wanted.cpu_request_millis))
        .min(host)
        .max(defaults.vcpus);
    let most = match limit {
        None => host,
        Some(_) => host.min(boot.saturating_mul(2).max(SPARE_VCPUS)),
    };
    (most.max(boot), boot)
}

/// Memory at the boot, and at most.
fn memory(wanted: &Wanted, defaults: &Defaults, room: &Room) -> Result<(u32, u32), Unfit> {
    let total = room.memory_bytes / MIB;
    let ceiling = total
        .saturating_sub(vmm_mib(total))
        .min(u64::from(MAX_MEMORY_MIB.min(defaults.memory_max_mib)));
    let allowed = room.cgroup_bytes.map(|bytes| bytes / MIB);
    let (boot, most) = match wanted.memory_mib() {
        Some(needed) => {
            if needed > ceiling {
                return Err(Unfit::Host {
                    needed: needed.saturating_add(vmm_mib(needed)),
                    limit: wanted.allowance.memory_bytes.map_or(0, mib),
                    total: total.min(ceiling.saturating_add(vmm_mib(ceiling))),
                });
            }
            let needed = needed.max(LEAST_MIB);
            check_cgroup(needed + vmm_mib(needed), allowed)?;
            (needed, ceiling.max(needed))
        }
        None => {
            // Without a limit the VM's size is adapted to its cgroup: the pod asked for no certain amount.
            let below = |allowed: u64| allowed.saturating_sub(vmm_mib(allowed));
            let most = allowed.map_or(ceiling, |allowed| below(allowed).min(ceiling));
            let needed = wanted.with_containers(0).max(LEAST_MIB);
            check_cgroup(needed + vmm_mib(needed), allowed)?;
            let boot = u64::from(defaults.memory_mib).max(needed).min(most);
            (boot, most)
        }
    };
    let start = GUEST_START_MIB + boot / GUEST_PARTS + vmm_mib(boot);
    let available = room.available_bytes / MIB;
    if start > available {
        return Err(Unfit::Available {
            needed: start,
            available,
        });
    }
    let bounded = |mebibytes| u32::try_from(mebibytes).unwrap_or(MAX_MEMORY_MIB);
    Ok((bounded(boot), bounded(most)))
}

fn check_cgroup(needed: u64, allowed: Option<u64>) -> Result<(), Unfit> {
    match allowed {
        Some(allowed) if allowed < needed => Err(Unfit::Cgroup { needed, allowed }),
        _ => Ok(()),
    }
}

/// The size of the scratch disk, which is a sparse file. A size that the pod asked for must be free, and not be promised
/// to others that asked for theirs. The default size need not be free, because nobody asked for it.
fn scratch(wanted: &Wanted, defaults: &Defaults, room: &Room) -> Result<u64, Unfit> {
    let asked = wanted.scratch_bytes.unwrap_or(LEAST_DISK_BYTES);
    if asked > defaults.scratch_max_bytes {
        return Err(Unfit::DiskMost {
            needed: mib(asked),
            most: defaults.scratch_max_bytes / MIB,
        });
    }
    let needed = asked.max(LEAST_DISK_BYTES);
    if needed.saturating_add(room.promised_bytes) > room.disk_bytes {
        return Err(Unfit::Disk {
            needed: mib(needed),
            free: room.disk_bytes / MIB,
            promised: room.promised_bytes / MIB,
        });
    }
    Ok(wanted.scratch_bytes.unwrap_or(defaults.scratch_bytes))
}

/// Whether a running VM has room for the pod's new limits. Only what grows is checked. `overhead_bytes` is the
/// RuntimeClass's overhead, if the VM lives in the cgroup that kubelet made for the pod; there it must suffice for the
/// VM.
pub fn resize(
    old: &Wanted,
    new: &Wanted,
    size: &VmSize,
    host_cpus: usize,
    overhead_bytes: Option<u64>,
) -> Result<(), Unfit> {
    if grows(old.allowance.memory_bytes, new.allowance.memory_bytes)
        && let Some(needed) = new.memory_mib()
    {
        let most = u64::from(size.memory_max_mib.max(size.memory_mib));
        if needed > most {
            return Err(Unfit::Memory { needed, most });
        }
        // GUEST_START_MIB instead of GUEST_FIXED_MIB: the memory that the guest keeps free is not touched.
        let beside = GUEST_START_MIB + needed / GUEST_PARTS + vmm_mib(needed);
        if let Some(overhead) = overhead_bytes.map(|bytes| bytes / MIB)
            && beside > overhead
        {
            return Err(Unfit::Overhead {
                needed: beside,
                overhead,
            });
        }
    }
    if grows(old.allowance.cpu_millis, new.allowance.cpu_millis)
        && let Some(millis) = new.allowance.cpu_millis
    {
        // A limit above the number of the host's CPUs limits nothing, so a VM with all CPUs is enough.
        let (needed, vcpus) = (millis.div_ceil(1000), u64::from(size.vcpus));
        if needed > vcpus && vcpus < host_cpus as u64 {
            return Err(Unfit::Cpus { needed, vcpus });
        }
    }
    Ok(())
}

/// Whether a limit grows; `None` means no limit.
pub fn grows(old: Option<u64>, new: Option<u64>) -> bool {
    match (old, new) {
        (Some(_), None) => true,
        (Some(old), Some(new)) => new > old,
        (None, _) => false,
    }
}

/// Converts bytes to MiB, rounded up.
pub fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(MIB)
}

#[cfg(test)]
#[path = "sizing_tests.rs"]
mod tests;
