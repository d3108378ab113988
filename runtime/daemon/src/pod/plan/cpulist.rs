// SPDX-License-Identifier: Apache-2.0
//! Lists of CPUs and NUMA nodes in the kernel's format, "0-3,8" (cpuset(7)). Pure.

use std::collections::BTreeSet;

/// Numbers in a list must be below this, which is the kernel's limit for CPUs.
const MAX_NUMBER: u32 = 8192;

/// Parses a list. `None` if it is not a valid list.
pub fn parse(text: &str) -> Option<BTreeSet<u32>> {
    let mut numbers = BTreeSet::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= MAX_NUMBER {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

pub fn format(numbers: &BTreeSet<u32>) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => ranges.push((*number, *number)),
        }
    }
    let range = |(first, last): &(u32, u32)| {
        if first == last {
            first.to_string()
        } else {
            format!("{first}-{last}")
        }
    };
    ranges.iter().map(range).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written_as_the_kernel_does() {
        for (text, expected) in [
            ("0", "0"),
            ("0-3,8\n", "0-3,8"),
            ("3,1,2", "1-3"),
            ("", ""),
            ("5,5-6", "5-6"),
        ] {
            assert_eq!(format(&parse(text).unwrap()), expected, "{text:?}");
        }
        for bad in ["x", "3-1", "-1", "1-", "0-99999", "1;2", "1:2"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
