// SPDX-License-Identifier: Apache-2.0
//! Sizes of VMs.

use super::*;

const DEFAULTS: Defaults = Defaults {
    vcpus: 1,
    memory_mib: 512,
    memory_max_mib: u32::MAX,
    scratch_bytes: 10 << 30,
    scratch_max_bytes: 100 << 30,
};
const ROOM: Room = Room {
    cpus: 8,
    memory_bytes: 16 << 30,
    available_bytes: 4 << 30,
    cgroup_bytes: None,
    disk_bytes: 2 << 30,
    promised_bytes: 0,
};

fn limit(mebibytes: u64) -> Wanted {
    Wanted {
        allowance: Allowance {
            memory_bytes: Some(mebibytes * MIB),
            ..Default::default()
        },
        ..Default::default()
    }
}

fn cpus_of(limit: Option<u64>, request: u64) -> Wanted {
    Wanted {
        allowance: Allowance {
            cpu_millis: limit,
            ..Default::default()
        },
        cpu_request_millis: request,
        ..Default::default()
    }
}

fn below(mebibytes: u64) -> Room {
    Room {
        cgroup_bytes: Some(mebibytes * MIB),
        ..ROOM
    }
}

#[test]
fn a_vm_holds_its_pods_limit_beside_its_own_needs_and_can_get_what_the_host_has() {
    for (wanted, expected) in [(0, 99), (64, 165), (512, 624), (8192, 8501)] {
        let size = size(&limit(wanted), &DEFAULTS, &ROOM).unwrap();
        assert_eq!(size.memory_mib, expected, "{wanted}");
        let own = GUEST_FIXED_MIB + u64::from(size.memory_mib) / GUEST_PARTS;
        assert!(u64::from(size.memory_mib) >= wanted + own, "{wanted}");
        assert_eq!(size.memory_max_mib, 16384 - 80, "{wanted}");
    }
    let huge = Wanted {
        hugepage_bytes: 512 * MIB,
        ..limit(0)
    };
    assert_eq!(size(&huge, &DEFAULTS, &ROOM).unwrap().memory_mib, 624);
}

#[test]
fn a_pod_without_a_limit_starts_small_and_can_get_what_the_host_or_its_cgroup_has() {
    let none = Wanted::default();
    let free = size(&none, &DEFAULTS, &ROOM).unwrap();
    assert_eq!((free.memory_mib, free.memory_max_mib), (512, 16304));
    assert_eq!(none.host_bytes(), None);
    let bounded = size(&none, &DEFAULTS, &below(2000)).unwrap();
    assert_eq!((bounded.memory_mib, bounded.memory_max_mib), (512, 1976));
    let tight = size(&none, &DEFAULTS, &below(300)).unwrap();
    assert_eq!((tight.memory_mib, tight.memory_max_mib), (282, 282));
    let error = size(&none, &DEFAULTS, &below(80)).unwrap_err();
    assert!(
        matches!(error, Unfit::Cgroup { allowed: 80, .. }),
        "{error}"
    );
    let administered = Defaults {
        memory_max_mib: 1000,
        ..DEFAULTS
    };
    assert_eq!(
        size(&none, &administered, &ROOM).unwrap().memory_max_mib,
        1000
    );
}

#[test]
fn cpus_are_the_limit_rounded_up_else_all_that_the_host_has() {
    for (limit, request, expected) in [
        (None, 0, (8, 1)),
        (None, 2500, (8, 3)),
        (None, 90_000, (8, 8)),
        (Some(500), 0, (4, 1)),
        (Some(1001), 0, (4, 2)),
        (Some(1000), 4000, (4, 1)),
        (Some(3000), 0, (6, 3)),
        (Some(100_000), 0, (8, 8)),
        (Some(u64::MAX), 0, (8, 8)),
    ] {
        let size = size(&cpus_of(limit, request), &DEFAULTS, &ROOM).unwrap();
        assert_eq!(
            (size.vcpus, size.boot_vcpus),
            expected,
            "{limit:?} {request}"
        );
    }
    let one = Room { cpus: 1, ..ROOM };
    let size = size(&cpus_of(Some(4000), 0), &DEFAULTS, &one).unwrap();
    assert_eq!((size.vcpus, size.boot_vcpus), (1, 1));
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
            free: 2048,
            promised: 0,
        })
    );
    let disk = Wanted {
        scratch_bytes: Some(1 << 30),
        ..Default::default()
    };
    assert!(size(&disk, &DEFAULTS, &ROOM).is_ok());
    let promised = Room {
        promised_bytes: 1500 * MIB,
        ..ROOM
    };
    let text = size(&disk, &DEFAULTS, &promised).unwrap_err().to_string();
    assert!(
        text.contains("needs 1024 MiB of disk") && text.contains("1500 MiB are promised"),
        "{text}"
    );
    let huge = Wanted {
        scratch_bytes: Some(101 << 30),
        ..Default::default()
    };
    let text = size(&huge, &DEFAULTS, &ROOM).unwrap_err().to_string();
    assert!(
        text.contains("at most 102400 MiB (sandbox.scratch_disk_max_gib)"),
        "{text}"
    );
    let error = size(&limit(512), &DEFAULTS, &below(600)).unwrap_err();
    assert!(
        matches!(error, Unfit::Cgroup { allowed: 600, .. }),
        "{error}"
    );
    assert!(size(&limit(512), &DEFAULTS, &below(700)).is_ok());
}

#[test]
fn a_vm_that_runs_is_only_asked_about_what_grows() {
    let booted = size(&limit(512), &DEFAULTS, &ROOM).unwrap();
    let resized = |old: u64, new: u64, overhead: Option<u64>| {
        resize(
            &limit(old),
            &limit(new),
            &booted,
            8,
            overhead.map(|mebibytes| mebibytes * MIB),
        )
    };
    assert_eq!(resized(512, 700, None), Ok(()));
    assert_eq!(resized(512, 700, Some(180)), Ok(()));
    assert!(matches!(
        resized(512, 17_000, None),
        Err(Unfit::Memory { .. })
    ));
    assert!(matches!(
        resized(512, 8000, Some(180)),
        Err(Unfit::Overhead { overhead: 180, .. })
    ));
    // Without any overhead. Nothing grows, so nothing is checked.
    assert_eq!(resized(512, 512, Some(0)), Ok(()));
    assert_eq!(resized(512, 100, Some(0)), Ok(()));
    assert_eq!(
        resize(&limit(512), &Wanted::default(), &booted, 8, Some(0)),
        Ok(())
    );
}

#[test]
fn cpus_grow_as_far_as_the_vm_has_some() {
    let booted = size(&cpus_of(Some(2000), 0), &DEFAULTS, &ROOM).unwrap();
    assert_eq!(booted.vcpus, 4);
    let resized = |old, new, host| {
        let (old, new) = (cpus_of(old, 0), cpus_of(new, 0));
        resize(&old, &new, &booted, host, None)
    };
    assert_eq!(resized(Some(2000), Some(4000), 8), Ok(()));
    assert_eq!(
        resized(Some(2000), Some(4001), 8),
        Err(Unfit::Cpus {
            needed: 5,
            vcpus: 4
        })
    );
    assert_eq!(
        resized(Some(2000), Some(9000), 4),
        Ok(()),
        "more than the host has is no limit"
    );
    assert_eq!(resized(None, Some(9000), 8), Ok(()), "less than before");
    assert_eq!(resized(Some(2000), None, 8), Ok(()));
}
