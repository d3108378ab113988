// SPDX-License-Identifier: Apache-2.0
//! Translates Kubernetes's limits into files of cgroup v2. Pure.

use bulkhead_proto::agent::Resources;

use super::CgroupError;

const DEFAULT_PERIOD_US: i64 = 100_000;
const MIN_SHARES: i64 = 2;
const MAX_SHARES: i64 = 262_144;

/// When limits are set. An update leaves a limit that it does not mention, and a negative number removes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Creation,
    Update,
}

/// A file and the value to write. [`super::absent`] handles a kernel without the file.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    pub file: String,
    pub value: String,
}

/// The files to write for `resources`, in order.
pub fn settings(resources: &Resources, when: When) -> Result<Vec<Setting>, CgroupError> {
    let mut settings = Vec::new();
    let mut set = |file: &str, value: String| {
        settings.push(Setting {
            file: file.to_owned(),
            value,
        });
    };
    if let Some(limit) = limit(resources.memory_limit_bytes, when) {
        // Without a swap limit there is no swap, as kubelet does it on nodes with cgroup v2.
        let swap = match resources.memory_swap_limit_bytes {
            0 if limit == "max" => "max".to_owned(),
            0 => "0".to_owned(),
            total if total < 0 => "max".to_owned(),
            total => total
                .saturating_sub(resources.memory_limit_bytes.max(0))
                .max(0)
                .to_string(),
        };
        set("memory.max", limit);
        set("memory.swap.max", swap);
    }
    let quota = limit(resources.cpu_quota_us, when);
    if quota.is_some() || (when == When::Update && resources.cpu_period_us > 0) {
        let period = match resources.cpu_period_us {
            period if period > 0 => period,
            _ => DEFAULT_PERIOD_US,
        };
        set(
            "cpu.max",
            format!("{} {period}", quota.as_deref().unwrap_or("max")),
        );
    }
    if resources.cpu_shares > 0 {
        set("cpu.weight", weight(resources.cpu_shares).to_string());
    }
    if let Some(limit) = limit(resources.pids_limit, when) {
        set("pids.max", limit);
    }
    if !resources.cpuset_cpus.is_empty() {
        set("cpuset.cpus", resources.cpuset_cpus.clone());
    }
    if !resources.cpuset_mems.is_empty() {
        set("cpuset.mems", resources.cpuset_mems.clone());
    }
    for huge in &resources.hugepage_limits {
        let file = checked_name(&format!("hugetlb.{}.max", huge.page_size))?;
        set(&file, huge.limit_bytes.to_string());
    }
    let mut unified: Vec<_> = resources.unified.iter().collect();
    unified.sort();
    for (file, value) in unified {
        set(&checked_name(file)?, value.clone());
    }
    Ok(settings)
}

/// The value to write for a number of CRI. 0 means "not given", a negative number "no limit".
fn limit(value: i64, when: When) -> Option<String> {
    match value {
        0 => None,
        value if value > 0 => Some(value.to_string()),
        _ => (when == When::Update).then(|| "max".to_owned()),
    }
}

/// Converts cgroup v1's shares [2, 262144] to cgroup v2's weight [1, 10000], as runc and kubelet do.
fn weight(shares: i64) -> i64 {
    1 + (shares.clamp(MIN_SHARES, MAX_SHARES) - MIN_SHARES) * 9999 / (MAX_SHARES - MIN_SHARES)
}

/// Checks that a name is a controller's file in this very cgroup: no path, and no file of the cgroup core.
fn checked_name(name: &str) -> Result<String, CgroupError> {
    let plain = name
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'_');
    let known = name.split_once('.').is_some_and(|(controller, file)| {
        !controller.is_empty() && !file.is_empty() && controller != "cgroup"
    });
    if plain && known && !name.contains("..") {
        return Ok(name.to_owned());
    }
    Err(CgroupError::BadName(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::{Setting, When, settings, weight};
    use bulkhead_proto::agent::{HugepageLimit, Resources};

    fn written(resources: &Resources, when: When) -> Vec<(String, String)> {
        settings(resources, when)
            .unwrap()
            .into_iter()
            .map(|Setting { file, value, .. }| (file, value))
            .collect()
    }

    fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
        expected
            .iter()
            .map(|(f, v)| ((*f).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn shares_become_weights_as_in_runc() {
        for (shares, expected) in [
            (0, 1),
            (2, 1),
            (1024, 39),
            (262_144, 10_000),
            (i64::MAX, 10_000),
        ] {
            assert_eq!(weight(shares), expected, "{shares}");
        }
    }

    #[test]
    fn limits_become_files() {
        let none = Resources::default();
        assert_eq!(written(&none, When::Creation), []);
        assert_eq!(written(&none, When::Update), []);
        let some = Resources {
            memory_limit_bytes: 1 << 20,
            cpu_quota_us: 50_000,
            cpu_shares: 1024,
            pids_limit: 7,
            cpuset_cpus: "0".into(),
            hugepage_limits: vec![HugepageLimit {
                page_size: "2MB".into(),
                limit_bytes: 0,
            }],
            unified: [("memory.high".to_owned(), "5".to_owned())].into(),
            ..Resources::default()
        };
        let expected = pairs(&[
            ("memory.max", "1048576"),
            ("memory.swap.max", "0"),
            ("cpu.max", "50000 100000"),
            ("cpu.weight", "39"),
            ("pids.max", "7"),
            ("cpuset.cpus", "0"),
            ("hugetlb.2MB.max", "0"),
            ("memory.high", "5"),
        ]);
        assert_eq!(written(&some, When::Creation), expected);
        let lifted = Resources {
            memory_limit_bytes: -1,
            cpu_quota_us: -1,
            pids_limit: -1,
            ..none
        };
        assert_eq!(written(&lifted, When::Creation), []);
        let expected = pairs(&[
            ("memory.max", "max"),
            ("memory.swap.max", "max"),
            ("cpu.max", "max 100000"),
            ("pids.max", "max"),
        ]);
        assert_eq!(written(&lifted, When::Update), expected);
    }

    #[test]
    fn only_files_of_controllers_may_be_named() {
        for name in [
            "../x.y",
            "a/b.c",
            "cgroup.procs",
            "memory",
            "",
            ".x",
            "memory.",
            "a..b",
            "io.max\n",
        ] {
            let resources = Resources {
                unified: [(name.to_owned(), String::new())].into(),
                ..Resources::default()
            };
            assert!(settings(&resources, When::Creation).is_err(), "{name:?}");
        }
    }
}
