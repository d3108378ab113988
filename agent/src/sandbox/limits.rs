// SPDX-License-Identifier: Apache-2.0
//! Limits of all containers together, and the huge pages that containers may use.

use std::fs;
use std::io;
use std::path::Path;

use bulkhead_proto::agent::{HugepageLimit, Resources};

use crate::cgroup::{Cgroup, CgroupError};

/// The kernel's pools of huge pages, one directory per size.
const POOLS: &str = "/sys/kernel/mm/hugepages";
const KIB: u64 = 1 << 10;

#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    #[error("set limits of the pod")]
    Cgroup(#[from] CgroupError),
    #[error("this guest has no huge pages of {0:?}")]
    PageSize(String),
    #[error("{wanted} huge pages of {page_size} were requested, the guest can have {found}")]
    Hugepages {
        page_size: String,
        wanted: u64,
        found: u64,
    },
}

/// Sets the limits. Blocks, because the kernel moves memory to reserve huge pages.
pub fn limit(resources: &Resources) -> Result<(), LimitError> {
    for wanted in &resources.hugepage_limits {
        reserve(Path::new(POOLS), wanted)?;
    }
    let rest = Resources {
        hugepage_limits: Vec::new(),
        ..resources.clone()
    };
    Ok(Cgroup::pod().update(&rest)?)
}

/// Reserves as many huge pages as the limit allows. If fewer are possible, reserves none and fails.
fn reserve(pools: &Path, limit: &HugepageLimit) -> Result<(), LimitError> {
    let bytes = page_bytes(&limit.page_size).filter(|bytes| *bytes >= KIB);
    let bytes = bytes.ok_or_else(|| LimitError::PageSize(limit.page_size.clone()))?;
    let wanted = limit.limit_bytes / bytes;
    let file = pools
        .join(format!("hugepages-{}kB", bytes / KIB))
        .join("nr_hugepages");
    let current = || -> io::Result<u64> {
        let text = fs::read_to_string(&file)?;
        text.trim().parse().map_err(io::Error::other)
    };
    let before = match current() {
        Ok(before) => before,
        // kubelet lists every page size of its node, even if the pod wants none of it.
        Err(_) if wanted == 0 => return Ok(()),
        Err(_) => return Err(LimitError::PageSize(limit.page_size.clone())),
    };
    let found = before.saturating_add(available() / bytes);
    if found < wanted {
        return Err(LimitError::Hugepages {
            page_size: limit.page_size.clone(),
            wanted,
            found,
        });
    }
    let set = |pages: u64| fs::write(&file, pages.to_string());
    // The write succeeds even if the kernel finds fewer pages, so check below.
    let _ = set(wanted);
    let found = current().unwrap_or(before);
    if found < wanted {
        let _ = set(before);
        return Err(LimitError::Hugepages {
            page_size: limit.page_size.clone(),
            wanted,
            found,
        });
    }
    Ok(())
}

/// How many bytes of memory the kernel could free. A request for more would drop all caches and then fail.
fn available() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    crate::statistics::files::meminfo(&text, "MemAvailable")
}

/// Parses sizes such as "2MB", "1GB" and "64KB", as cgroup files and kubelet write them.
fn page_bytes(page_size: &str) -> Option<u64> {
    let units = [("KB", 10), ("MB", 20), ("GB", 30)];
    units.iter().find_map(|(unit, shift)| {
        let number: u64 = page_size.strip_suffix(unit)?.parse().ok()?;
        number.checked_mul(1 << shift)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit_of(page_size: &str, limit_bytes: u64) -> HugepageLimit {
        HugepageLimit {
            page_size: page_size.into(),
            limit_bytes,
        }
    }

    #[test]
    fn page_sizes_are_read_as_kubelet_writes_them() {
        assert_eq!(page_bytes("2MB"), Some(2 << 20));
        assert_eq!(page_bytes("1GB"), Some(1 << 30));
        for bad in ["", "MB", "2", "-2MB", "2mb", "99999999999999GB"] {
            assert_eq!(page_bytes(bad), None, "{bad}");
        }
    }

    #[test]
    fn huge_pages_are_reserved_and_sizes_that_nobody_wants_do_not_matter() {
        let pools = tempfile::tempdir().unwrap();
        let pool = pools.path().join("hugepages-2048kB");
        fs::create_dir(&pool).unwrap();
        fs::write(pool.join("nr_hugepages"), "0\n").unwrap();
        reserve(pools.path(), &limit_of("2MB", 8 << 20)).unwrap();
        assert_eq!(fs::read_to_string(pool.join("nr_hugepages")).unwrap(), "4");
        reserve(pools.path(), &limit_of("1GB", 0)).unwrap();
        let error = reserve(pools.path(), &limit_of("1GB", 1 << 30)).unwrap_err();
        assert!(error.to_string().contains("1GB"), "{error}");
    }
}
