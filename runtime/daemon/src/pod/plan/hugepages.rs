// SPDX-License-Identifier: Apache-2.0
//! How many huge pages a guest reserves: the sum of its live containers' limits or, if that is more, what the pod
//! itself asks for.
//!
//! kubelet sets huge pages only for containers, not for the pod. For each container it names every page size of the
//! *host*, with 0 bytes for those that the container does not use.

use std::collections::BTreeMap;

use bulkhead_guest::protocol;

use crate::pod::life::spec::Resources;

/// The bytes in huge pages of all sizes together, for live containers or, if that is more, for the pod itself.
pub fn bytes<'a>(pod: &'a Resources, live: impl Iterator<Item = &'a Resources>) -> u64 {
    let sums = together(pod, [pod].into_iter(), live);
    let bytes = sums.iter().map(|limit| limit.limit_bytes);
    bytes.fold(0, u64::saturating_add)
}

/// The bytes to reserve for each page size. Sizes that only exited containers (in `known`) used are listed with 0, so
/// that the guest releases those pages.
pub fn together<'a>(
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
            assert_eq!(bytes(&pod, live.iter()), 16);
        }
        let none = Resources::default();
        assert_eq!(bytes(&none, known.iter()), 4);
        assert_eq!(bytes(&none, std::iter::empty()), 0);
    }
}
