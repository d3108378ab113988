// SPDX-License-Identifier: Apache-2.0
//! Limits of the I/O to block devices of the host: the key `io.max` of `unified` resources. Pure.
//!
//! A guest has other devices than its host, and all its I/O to the host's devices is done by the VMM. So these limits
//! bound the VM on the host, and the guest does not get them.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::pod::life::spec::Resources;

/// The key in `unified`, and the file in the host's cgroup.
pub const KEY: &str = "io.max";
/// What can be limited, in the kernel's words: bytes and operations a second.
const RATES: [&str; 4] = ["rbps", "wbps", "riops", "wiops"];

/// Limits by device ("8:0"). `None` is no limit.
type Limits = BTreeMap<String, [Option<u64>; RATES.len()]>;

/// Whether `value` is in the kernel's format: lines like `8:0 rbps=1048576 wiops=max`.
pub fn is_valid(value: &str) -> bool {
    parse(value).is_some()
}

fn parse(value: &str) -> Option<Limits> {
    let mut all = Limits::new();
    for line in value.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (device, rates) = line.split_once(char::is_whitespace)?;
        let (major, minor) = device.split_once(':')?;
        let device = format!(
            "{}:{}",
            major.parse::<u32>().ok()?,
            minor.parse::<u32>().ok()?
        );
        let limits = all.entry(device).or_default();
        for rate in rates.split_whitespace() {
            let (name, number) = rate.split_once('=')?;
            let at = RATES.iter().position(|known| *known == name)?;
            *limits.get_mut(at)? = match number {
                "max" => None,
                number => Some(number.parse().ok().filter(|number| *number > 0)?),
            };
        }
    }
    Some(all)
}

/// The lines for the host, one for each device. A pod's own limits count; else the sum of its containers', for what all
/// of them limit.
pub fn together<'a>(
    pod: &Resources,
    mut containers: impl Iterator<Item = &'a Resources>,
) -> Vec<String> {
    let all = match pod.unified.contains_key(KEY) {
        true => of(pod),
        false => {
            let first = containers.next().map(of).unwrap_or_default();
            containers.map(of).fold(first, sum)
        }
    };
    let limited = all
        .iter()
        .filter(|(_, rates)| rates.iter().any(Option::is_some));
    limited.map(|(device, rates)| line(device, rates)).collect()
}

/// The limits in some resources. A value that is not valid limits nothing: it is refused where it comes in.
fn of(resources: &Resources) -> Limits {
    let value = resources.unified.get(KEY);
    value.and_then(|value| parse(value)).unwrap_or_default()
}

/// What both limit.
fn sum(mut sums: Limits, more: Limits) -> Limits {
    for (device, sums) in &mut sums {
        let more = more.get(device).copied().unwrap_or_default();
        for (sum, more) in sums.iter_mut().zip(more) {
            *sum = sum.zip(more).map(|(one, other)| one.saturating_add(other));
        }
    }
    sums
}

fn line(device: &str, limits: &[Option<u64>]) -> String {
    let mut line = device.to_owned();
    for (name, limit) in RATES.iter().zip(limits) {
        let limit = limit.map_or_else(|| "max".to_owned(), |limit| limit.to_string());
        // Writing to a string cannot fail.
        let _ = write!(line, " {name}={limit}");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_format_is_checked() {
        for good in [
            "8:0 rbps=5",
            "8:0 rbps=max wbps=7\n259:1 riops=1 wiops=2\n",
            "",
        ] {
            assert!(is_valid(good), "{good:?}");
        }
        for bad in [
            "8:0",
            "8 rbps=5",
            "sda rbps=5",
            "8:0 rbps",
            "8:0 rbps=0",
            "8:0 bps=5",
            "8:0 rbps=-1",
        ] {
            assert!(!is_valid(bad), "{bad:?}");
        }
    }

    #[test]
    fn a_pods_limits_count_else_the_sum_of_what_all_containers_limit() {
        let none = Resources::default();
        let with = |value: &str| Resources {
            unified: [(KEY.to_owned(), value.to_owned())].into(),
            ..Default::default()
        };
        let all = |containers: &[Resources]| together(&none, containers.iter());
        let (one, two) = (with("8:0 rbps=5 wbps=1\n8:16 riops=3"), with("8:0 rbps=7"));
        assert_eq!(all(&[]), [""; 0]);
        let alone = ["8:0 rbps=7 wbps=max riops=max wiops=max"];
        assert_eq!(all(std::slice::from_ref(&two)), alone);
        let both = ["8:0 rbps=12 wbps=max riops=max wiops=max"];
        assert_eq!(all(&[one.clone(), two]), both);
        assert_eq!(all(&[one.clone(), none.clone()]), [""; 0]);
        let own = ["259:0 rbps=max wbps=max riops=max wiops=9"];
        assert_eq!(together(&with("259:0 wiops=9"), [one].iter()), own);
    }
}
