// SPDX-License-Identifier: Apache-2.0
//! The peak usage of huge pages, for which cgroup v2 has no file.
//!
//! A peak is the highest value of all readings. Peaks between two readings are missed.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

/// The peaks by container and page size.
#[derive(Debug, Default)]
pub struct Peaks(Mutex<HashMap<String, HashMap<String, u64>>>);

impl Peaks {
    /// Records that container `id` uses `current` bytes in pages of `page_size`. Returns the peak so far.
    pub fn observe(&self, id: &str, page_size: &str, current: u64) -> u64 {
        let mut peaks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_container = peaks.entry(id.to_owned()).or_default();
        let most = of_container.entry(page_size.to_owned()).or_default();
        *most = current.max(*most);
        *most
    }

    /// Forgets all except these.
    pub fn keep(&self, ids: &HashSet<&str>) {
        let mut peaks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        peaks.retain(|id, _| ids.contains(id.as_str()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_is_kept_for_each_container_and_page_size_and_forgotten_with_the_container() {
        let peaks = Peaks::default();
        for (id, page_size, current, most) in [
            ("a", "2MB", 4, 4),
            ("a", "2MB", 2, 4),
            ("a", "1GB", 1, 1),
            ("b", "2MB", 0, 0),
            ("a", "2MB", 6, 6),
        ] {
            assert_eq!(
                peaks.observe(id, page_size, current),
                most,
                "{id} {page_size}"
            );
        }
        peaks.keep(&HashSet::from(["b"]));
        assert_eq!(peaks.observe("a", "2MB", 1), 1);
    }
}
