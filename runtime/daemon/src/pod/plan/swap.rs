// SPDX-License-Identifier: Apache-2.0
//! How much of a VM's memory its host may swap out. Pure.
//!
//! A guest has no swap, so there a limit of swap holds by itself. But the host may swap guest memory like any other. So
//! the limits of the containers together are that of the VM.

use super::limits::positive;
use crate::pod::life::spec::Resources;

/// The key in `unified`.
const KEY: &str = "memory.swap.max";

/// The limit of the VM in bytes: the pod's own, else the sum of its containers'. `None` if one of them has none.
pub fn together<'a>(
    pod: &Resources,
    containers: impl Iterator<Item = &'a Resources>,
) -> Option<u64> {
    if let Some(own) = of(pod) {
        return Some(own);
    }
    let mut containers = containers.map(of).peekable();
    containers.peek()?;
    containers.try_fold(0, |sum: u64, limit| Some(sum.saturating_add(limit?)))
}

/// The limit in some resources: cgroup v2's own, or CRI's, which is for memory and swap together.
fn of(resources: &Resources) -> Option<u64> {
    if let Some(text) = resources.unified.get(KEY) {
        return bytes(text.trim());
    }
    let both = positive(resources.memory_swap_limit_bytes)?;
    let memory = positive(resources.memory_limit_bytes)?;
    Some(both.saturating_sub(memory))
}

/// Bytes as the kernel takes them, with or without a unit. `None` for "max".
fn bytes(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..)? {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(value: &str) -> Resources {
        Resources {
            unified: [(KEY.to_owned(), value.to_owned())].into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_vm_may_be_swapped_out_as_far_as_all_its_containers_together() {
        let none = Resources::default();
        let sum = |all: &[Resources]| together(&none, all.iter());
        assert_eq!(sum(&[]), None);
        assert_eq!(
            sum(&[with("0"), with("0\n")]),
            Some(0),
            "kubelet without swap"
        );
        assert_eq!(sum(&[with("1M"), with("5")]), Some((1 << 20) + 5));
        for free in [none.clone(), with("max"), with("much")] {
            assert_eq!(sum(&[with("0"), free]), None);
        }
        assert_eq!(together(&with("7"), [none.clone()].iter()), Some(7));
    }

    #[test]
    fn cris_limit_is_for_memory_and_swap_together() {
        for (memory, both, expected) in [
            (5, 9, Some(4)),
            (5, 5, Some(0)),
            (0, 9, None),
            (5, -1, None),
        ] {
            let resources = Resources {
                memory_limit_bytes: memory,
                memory_swap_limit_bytes: both,
                ..Default::default()
            };
            assert_eq!(of(&resources), expected, "{memory} {both}");
        }
    }
}
