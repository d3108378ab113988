// SPDX-License-Identifier: Apache-2.0
//! Files of cgroup v2 that this guest's kernel does not have, and the values for them that are true without them. Pure.
//!
//! kubelet and users name the files of their node. A guest has no swap, no RDMA, and only some sizes of huge pages. A
//! limit on something that does not exist holds by itself; any other value is refused with an explanation.

/// Whether a kernel without `file` fulfils `value` by itself.
pub fn is_kept_without(file: &str, value: &str) -> bool {
    let value = value.trim();
    match file {
        // Nothing can be swapped out, so every limit holds.
        "memory.swap.max" | "memory.swap.high" | "memory.zswap.max" => is_limit(value),
        "memory.zswap.writeback" => matches!(value, "0" | "1"),
        "rdma.max" | "misc.max" | "dmem.max" => has_only(value, &["0", "max"]),
        "dmem.min" | "dmem.low" => has_only(value, &["0"]),
        // The values of a cgroup that nobody has changed.
        "io.weight" | "io.bfq.weight" => matches!(value, "100" | "default 100"),
        "cpu.uclamp.min" => matches!(value, "0" | "0.0" | "0.00"),
        "cpu.uclamp.max" => matches!(value, "max" | "100" | "100.0" | "100.00"),
        // A limit above 0 is a wish for huge pages, which would not be fulfilled.
        _ => file.starts_with("hugetlb.") && file.ends_with(".max") && matches!(value, "0" | "max"),
    }
}

/// Advice for a user whose value for a missing file cannot be fulfilled.
pub fn advice(file: &str) -> &'static str {
    match file.split_once('.') {
        Some(("memory", rest)) if rest.starts_with("swap.") || rest.starts_with("zswap.") => {
            "a VM has no swap, so only a limit (a number of bytes, or \"max\") can be kept"
        }
        Some(("hugetlb", _)) => {
            "a VM has no huge pages of this size: ask for one that it has, or for \"0\""
        }
        Some(("rdma" | "misc" | "dmem", _)) => {
            "a VM has no such device: only \"0\" and \"max\" can be kept"
        }
        _ => "leave this key out of the container's `unified` resources",
    }
}

/// Whether `value` is a limit in the kernel's format: "max", or bytes with or without a unit.
fn is_limit(value: &str) -> bool {
    let digits = value.trim_end_matches(['K', 'M', 'G', 'T', 'k', 'm', 'g', 't']);
    let units = value.len() - digits.len();
    value == "max" || (units <= 1 && digits.parse::<u64>().is_ok())
}

/// Whether all limits in `value` are among `allowed`. There is one line per device: `mlx5_0 hca_handle=max
/// hca_object=0` has two limits, `sev 0` has one.
fn has_only(value: &str, allowed: &[&str]) -> bool {
    let line_is_kept = |line: &str| match line.split_whitespace().collect::<Vec<_>>().as_slice() {
        [limit] | [_, limit] if !limit.contains('=') => allowed.contains(limit),
        [_, limits @ ..] => limits.iter().all(|limit| {
            limit
                .split_once('=')
                .is_some_and(|(_, limit)| allowed.contains(&limit))
        }),
        [] => false,
    };
    !value.is_empty() && value.lines().all(line_is_kept)
}

#[cfg(test)]
mod tests {
    use super::{advice, is_kept_without};

    #[test]
    fn what_is_true_without_the_file_is_obeyed_by_doing_nothing() {
        for (file, value) in [
            // What kubelet sends on a node whose cgroups have swap: no swap, or the share of LimitedSwap.
            ("memory.swap.max", "0"),
            ("memory.swap.max", "104857600"),
            ("memory.swap.max", "max"),
            ("memory.swap.max", "64M\n"),
            ("memory.swap.high", "max"),
            ("memory.zswap.max", "0"),
            ("memory.zswap.writeback", "0"),
            ("hugetlb.1GB.max", "0"),
            ("hugetlb.1GB.rsvd.max", "max"),
            ("rdma.max", "mlx5_0 hca_handle=max hca_object=0"),
            ("rdma.max", "mlx5_0 hca_handle=0\nmlx5_1 hca_object=max"),
            ("misc.max", "sev 0"),
            ("dmem.max", "drm/0000:03:00.0/vram0 max"),
            ("dmem.low", "drm/0000:03:00.0/vram0 0"),
            ("io.weight", "default 100"),
            ("io.bfq.weight", "100"),
            ("cpu.uclamp.min", "0.00"),
            ("cpu.uclamp.max", "max"),
        ] {
            assert!(is_kept_without(file, value), "{file} {value:?}");
        }
    }

    #[test]
    fn what_would_have_an_effect_is_not() {
        for (file, value) in [
            ("memory.swap.max", ""),
            ("memory.swap.max", "much"),
            ("memory.swap.max", "-1"),
            ("memory.swap.max", "64MM"),
            ("memory.swap.max", "M"),
            ("memory.zswap.writeback", "2"),
            ("hugetlb.1GB.max", "1073741824"),
            ("hugetlb.1GB.events", "0"),
            ("rdma.max", "mlx5_0 hca_handle=2 hca_object=max"),
            ("rdma.max", "mlx5_0 hca_handle"),
            ("rdma.max", ""),
            ("rdma.max", "mlx5_0 hca_handle=0\n\nmlx5_1 hca_object=1"),
            ("misc.max", "sev 5"),
            ("dmem.low", "drm/0000:03:00.0/vram0 max"),
            ("io.weight", "200"),
            ("cpu.uclamp.min", "20"),
            ("memory.hihg", "max"),
            ("unknown.max", "max"),
        ] {
            assert!(!is_kept_without(file, value), "{file} {value:?}");
        }
    }

    #[test]
    fn advice_names_what_is_missing() {
        for (file, said) in [
            ("memory.swap.max", "no swap"),
            ("memory.zswap.max", "no swap"),
            ("hugetlb.1GB.max", "huge pages"),
            ("rdma.max", "no such device"),
            ("io.weight", "leave this key out"),
            ("memory", "leave this key out"),
        ] {
            assert!(advice(file).contains(said), "{file}");
        }
    }
}
