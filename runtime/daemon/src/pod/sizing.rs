// SPDX-License-Identifier: Apache-2.0
//! How large a pod's VM is, and whether it fits. Pure.
//!
//! A VM has the memory that the pod's containers may use together, and what its own kernel and agent take of it,
//! which grows with the memory (docs/design.md has the measurement). The host gives memory as the guest touches it,
//! so what counts against it at a boot is what a boot touches: limits may be promised that the host has not free,
//! as Kubernetes overcommits them, but never more to one pod than the host has at all. A pod under a cgroup with a
//! limit (kubelet's, where the RuntimeClass has an overhead or not) is made to fit below it: then the guest runs out of
//! memory and kills one process, not the host the whole VM.

use bulkhead_vmm::config::{MAX_MEMORY_MIB, MAX_VCPUS};
use serde::{Deserialize, Serialize};

const MIB: u64 = 1 << 20;
/// What a guest's kernel and agent take whatever its memory: 34 MiB, and what the kernel keeps free for itself, 70 MiB.
const GUEST_FIXED_MIB: u64 = 96;
/// One part in so many of the memory describes it: 2 per cent were seen, 64 bytes a page of 4096 among them.
const GUEST_PARTS: u64 = 40;
/// What a guest has touched once its agent is ready.
const GUEST_START_MIB: u64 = 48;
/// What a VMM takes beside the guest's memory.
const VMM_FIXED_MIB: u64 = 16;
/// One part in so many of the guest's memory: the host's page tables of it.
const VMM_PARTS: u64 = 256;
/// Below this no guest starts.
const LEAST_MIB: u64 = 64;
/// Free disk without which no pod is begun: the file system's own structures and a little to write.
const LEAST_DISK_BYTES: u64 = 64 * MIB;

/// What a VM was booted with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSize {
    pub vcpus: u8,
    pub memory_mib: u32,
    pub scratch_bytes: u64,
}

/// What a pod wants; 0: not said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// All containers together, without huge pages.
    pub memory_limit_bytes: u64,
    pub hugepage_bytes: u64,
    pub cpu_limit_millis: u64,
    pub cpu_request_millis: u64,
    /// The pod's ephemeral storage.
    pub scratch_bytes: Option<u64>,
}

/// The VM of a pod that wants nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Defaults {
    pub vcpus: u8,
    pub memory_mib: u32,
    /// Memory beyond the limit that a VM is booted with, for the limit to grow into.
    pub headroom_mib: u32,
    pub scratch_bytes: u64,
}

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    pub cpus: usize,
    pub memory_bytes: u64,
    pub available_bytes: u64,
    /// The tightest limit of the cgroups that the VM will be in.
    pub cgroup_bytes: Option<u64>,
    /// Free where scratch disks are.
    pub disk_bytes: u64,
}

/// Why a pod cannot be here, in MiB.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unfit {
    #[error(
        "the pod needs {needed} MiB of memory ({limit} MiB for its containers, the rest for its VM), the host has {total} MiB"
    )]
    Host { needed: u64, limit: u64, total: u64 },
    #[error("a VM takes {needed} MiB of memory to start, the host has {available} MiB available")]
    Available { needed: u64, available: u64 },
    #[error(
        "a VM needs {needed} MiB of memory at least, the cgroup that the pod is to be in allows {allowed} MiB: raise the \
         pod's limit, or give the RuntimeClass an overhead"
    )]
    Cgroup { needed: u64, allowed: u64 },
    #[error("the pod needs {needed} MiB of disk, {free} MiB are free")]
    Disk { needed: u64, free: u64 },
    #[error(
        "the pod's containers would need a VM of {needed} MiB, this one was started with {memory} MiB: make the pod anew, or \
         start VMs with sandbox.memory_headroom_mib"
    )]
    Memory { needed: u64, memory: u64 },
    #[error("the pod would need {needed} CPUs, its VM was started with {vcpus}: make the pod anew")]
    Cpus { needed: u64, vcpus: u64 },
}

impl Wanted {
    /// Memory of the VM in which the containers can use all that they may.
    pub fn memory_mib(&self) -> u64 {
        let for_containers =
            mib(self.memory_limit_bytes) + mib(self.hugepage_bytes) + GUEST_FIXED_MIB;
        // With x of the whole describing it: whole = part / (1 - 1/x).
        (for_containers.saturating_mul(GUEST_PARTS)).div_ceil(GUEST_PARTS - 1)
    }

    fn cpus(&self) -> u64 {
        let millis = match self.cpu_limit_millis {
            0 => self.cpu_request_millis,
            limit => limit,
        };
        millis.div_ceil(1000)
    }
}

/// What containers can use of a VM of `memory_mib`: the other way round.
pub fn containers_mib(memory_mib: u64) -> u64 {
    let described = memory_mib.div_ceil(GUEST_PARTS);
    memory_mib.saturating_sub(described + GUEST_FIXED_MIB)
}

/// What the VMM takes beside a guest of `memory_mib`.
pub fn vmm_mib(memory_mib: u64) -> u64 {
    VMM_FIXED_MIB + memory_mib.div_ceil(VMM_PARTS)
}

/// How large the VM is to be, or why there can be none.
pub fn size(wanted: &Wanted, defaults: &Defaults, room: &Room) -> Result<VmSize, Unfit> {
    let scratch_bytes = scratch(wanted, defaults, room)?;
    let memory_mib = memory(wanted, defaults, room)?;
    let host = u8::try_from(room.cpus).unwrap_or(MAX_VCPUS);
    let vcpus = u8::try_from(wanted.cpus()).unwrap_or(u8::MAX);
    Ok(VmSize {
        vcpus: vcpus
            .min(host)
            .clamp(defaults.vcpus, MAX_VCPUS.max(defaults.vcpus)),
        memory_mib,
        scratch_bytes,
    })
}

fn memory(wanted: &Wanted, defaults: &Defaults, room: &Room) -> Result<u32, Unfit> {
    let mut whole = u64::from(defaults.memory_mib);
    if wanted.memory_limit_bytes > 0 || wanted.hugepage_bytes > 0 {
        whole = whole.max(wanted.memory_mib() + u64::from(defaults.headroom_mib));
    }
    let total = room.memory_bytes / MIB;
    let most = u64::from(MAX_MEMORY_MIB);
    if whole + vmm_mib(whole) > total || whole > most {
        return Err(Unfit::Host {
            needed: whole.saturating_add(vmm_mib(whole)),
            limit: mib(wanted.memory_limit_bytes),
            total: total.min(most),
        });
    }
    let start = GUEST_START_MIB + whole / GUEST_PARTS + vmm_mib(whole);
    let available = room.available_bytes / MIB;
    if start > available {
        return Err(Unfit::Available {
            needed: start,
            available,
        });
    }
    if let Some(allowed) = room.cgroup_bytes.map(|bytes| bytes / MIB) {
        let least = LEAST_MIB + vmm_mib(LEAST_MIB);
        if allowed < least {
            return Err(Unfit::Cgroup {
                needed: least,
                allowed,
            });
        }
        whole = whole.min(allowed - vmm_mib(whole.min(allowed)).min(allowed - LEAST_MIB));
    }
    Ok(u32::try_from(whole).unwrap_or(MAX_MEMORY_MIB))
}

/// The disk is sparse. What a pod asked for must be free; a default, which nobody asked for, need not be.
fn scratch(wanted: &Wanted, defaults: &Defaults, room: &Room) -> Result<u64, Unfit> {
    let needed = wanted.scratch_bytes.unwrap_or(LEAST_DISK_BYTES);
    if needed.max(LEAST_DISK_BYTES) > room.disk_bytes {
        return Err(Unfit::Disk {
            needed: mib(needed.max(LEAST_DISK_BYTES)),
            free: room.disk_bytes / MIB,
        });
    }
    Ok(wanted.scratch_bytes.unwrap_or(defaults.scratch_bytes))
}

/// Whether a VM that runs can hold what its pod is now to have.
pub fn resize(wanted: &Wanted, size: &VmSize, host_cpus: usize) -> Result<(), Unfit> {
    let memory = u64::from(size.memory_mib);
    let limited = wanted.memory_limit_bytes > 0 || wanted.hugepage_bytes > 0;
    if limited && wanted.memory_mib() > memory {
        return Err(Unfit::Memory {
            needed: wanted.memory_mib(),
            memory,
        });
    }
    // A limit beyond the host's CPUs is none.
    let vcpus = u64::from(size.vcpus);
    let needed = wanted.cpu_limit_millis.div_ceil(1000);
    if needed > vcpus && vcpus < host_cpus as u64 {
        return Err(Unfit::Cpus { needed, vcpus });
    }
    Ok(())
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(MIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: Defaults = Defaults {
        vcpus: 1,
        memory_mib: 256,
        headroom_mib: 0,
        scratch_bytes: 10 << 30,
    };
    const ROOM: Room = Room {
        cpus: 8,
        memory_bytes: 16 << 30,
        available_bytes: 4 << 30,
        cgroup_bytes: None,
        disk_bytes: 2 << 30,
    };

    fn limit(mebibytes: u64) -> Wanted {
        Wanted {
            memory_limit_bytes: mebibytes * MIB,
            ..Default::default()
        }
    }

    #[test]
    fn a_vm_holds_its_pods_limits_beside_its_own_needs_and_is_never_smaller_than_the_default() {
        for (wanted, expected) in [(0, 256), (1, 256), (512, 624), (8192, 8501)] {
            let size = size(&limit(wanted), &DEFAULTS, &ROOM).unwrap();
            assert_eq!(size.memory_mib, expected, "{wanted}");
            let own = GUEST_FIXED_MIB + u64::from(size.memory_mib) / GUEST_PARTS;
            assert!(u64::from(size.memory_mib) >= wanted + own, "{wanted}");
        }
        let headroom = Defaults {
            headroom_mib: 1000,
            ..DEFAULTS
        };
        assert_eq!(
            size(&limit(512), &headroom, &ROOM).unwrap().memory_mib,
            1624
        );
        assert_eq!(size(&limit(0), &headroom, &ROOM).unwrap().memory_mib, 256);
        let huge = Wanted {
            hugepage_bytes: 512 * MIB,
            ..limit(0)
        };
        assert_eq!(size(&huge, &DEFAULTS, &ROOM).unwrap().memory_mib, 624);
    }

    #[test]
    fn cpus_are_the_limit_rounded_up_else_the_request_and_never_more_than_the_host_has() {
        for (limit, request, expected) in [
            (0, 0, 1),
            (1001, 0, 2),
            (0, 2500, 3),
            (1000, 4000, 1),
            (100_000, 0, 8),
            (u64::MAX, 0, 8),
        ] {
            let wanted = Wanted {
                cpu_limit_millis: limit,
                cpu_request_millis: request,
                ..Default::default()
            };
            let size = size(&wanted, &DEFAULTS, &ROOM).unwrap();
            assert_eq!(size.vcpus, expected, "{limit} {request}");
        }
    }

    #[test]
    fn what_cannot_fit_is_refused_with_the_numbers() {
        let too_much = size(&limit(20_000), &DEFAULTS, &ROOM).unwrap_err();
        let text = too_much.to_string();
        assert!(text.contains("20000") && text.contains("16384"), "{text}");
        assert!(size(&limit(u64::MAX / MIB), &DEFAULTS, &ROOM).is_err());
        let busy = Room {
            available_bytes: 50 * MIB,
            ..ROOM
        };
        let text = size(&limit(0), &DEFAULTS, &busy).unwrap_err().to_string();
        assert!(text.contains("50 MiB available"), "{text}");
        let disk = Wanted {
            scratch_bytes: Some(3 << 30),
            ..Default::default()
        };
        assert_eq!(
            size(&disk, &DEFAULTS, &ROOM),
            Err(Unfit::Disk {
                needed: 3072,
                free: 2048
            })
        );
        assert_eq!(
            size(&limit(0), &DEFAULTS, &ROOM).unwrap().scratch_bytes,
            10 << 30
        );
    }

    #[test]
    fn a_vm_is_made_to_fit_below_its_cgroups_limit() {
        let below = |mebibytes: u64| Room {
            cgroup_bytes: Some(mebibytes * MIB),
            ..ROOM
        };
        let wide = size(&limit(512), &DEFAULTS, &below(2000)).unwrap();
        assert_eq!(wide.memory_mib, 624);
        for allowed in [512, 300, 120] {
            let tight = size(&limit(512), &DEFAULTS, &below(allowed)).unwrap();
            let memory = u64::from(tight.memory_mib);
            assert!(memory + vmm_mib(memory) <= allowed, "{allowed}: {memory}");
            assert!(memory >= LEAST_MIB, "{allowed}: {memory}");
        }
        let error = size(&limit(64), &DEFAULTS, &below(64)).unwrap_err();
        assert!(
            matches!(error, Unfit::Cgroup { allowed: 64, .. }),
            "{error}"
        );
    }

    #[test]
    fn a_vm_that_runs_is_resized_within_what_it_was_started_with() {
        let booted = VmSize {
            vcpus: 2,
            memory_mib: 624,
            scratch_bytes: 0,
        };
        assert_eq!(resize(&limit(512), &booted, 8), Ok(()));
        assert_eq!(resize(&limit(0), &booted, 8), Ok(()));
        assert!(matches!(
            resize(&limit(700), &booted, 8),
            Err(Unfit::Memory { .. })
        ));
        let cpus = |millis| Wanted {
            cpu_limit_millis: millis,
            ..Default::default()
        };
        assert_eq!(resize(&cpus(2000), &booted, 8), Ok(()));
        assert_eq!(
            resize(&cpus(2001), &booted, 8),
            Err(Unfit::Cpus {
                needed: 3,
                vcpus: 2
            })
        );
        assert_eq!(
            resize(&cpus(9000), &booted, 2),
            Ok(()),
            "more than the host has is no limit"
        );
    }
}
