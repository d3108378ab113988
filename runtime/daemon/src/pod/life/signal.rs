// SPDX-License-Identifier: Apache-2.0
//! Converts signal names, as images and CRI have them, to Linux numbers.

use std::str::FromStr;

use nix::sys::signal::Signal;

pub const SIGTERM: i32 = libc::SIGTERM;
pub const SIGKILL: i32 = libc::SIGKILL;
const SIGRTMIN: i32 = 34;
const SIGRTMAX: i32 = 64;

/// Parses a signal's name or number: `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`, `RTMAX-1`.
pub fn parse(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return Some(number).filter(|number| (1..=SIGRTMAX).contains(number));
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let real_time = |rest: &str, base: i32| -> Option<i32> {
        let offset = if rest.is_empty() {
            0
        } else {
            rest.parse().ok()?
        };
        Some(base + offset).filter(|number| (SIGRTMIN..=SIGRTMAX).contains(number))
    };
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return real_time(rest, SIGRTMIN);
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return real_time(rest, SIGRTMAX);
    }
    let name = match name {
        "CLD" => "CHLD",
        "POLL" => "IO",
        "IOT" => "ABRT",
        name => name,
    };
    Signal::from_str(&format!("SIG{name}"))
        .ok()
        .map(|signal| signal as i32)
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn names_and_numbers_are_read() {
        for (text, expected) in [
            ("SIGTERM", Some(15)),
            ("quit", Some(3)),
            ("9", Some(9)),
            ("SIGRTMIN", Some(34)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-1", Some(63)),
            ("SIGIOT", Some(6)),
            ("SIGRTMIN+40", None),
            ("0", None),
            ("65", None),
            ("SIGFLY", None),
            ("", None),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }
}
