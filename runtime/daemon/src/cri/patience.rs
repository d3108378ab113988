// SPDX-License-Identifier: Apache-2.0
//! How long a client waits for its answer, from gRPC's header. For `RunPodSandbox`, kubelet waits four minutes by
//! default.
//!
//! The header `grpc-timeout` (gRPC over HTTP/2) has at most eight digits and a unit. The server cancels the call when
//! the time is over. A boot that knows the time limit can give up earlier, and tell the client why.

use std::time::Duration;

use tonic::metadata::MetadataMap;

use crate::pod::admission::Patience;

const HEADER: &str = "grpc-timeout";
const MOST_DIGITS: usize = 8;

/// The caller's time limit, from now on.
pub fn of(metadata: &MetadataMap) -> Patience {
    Patience::new(caller_timeout(metadata))
}

/// How long the caller waits, if it says so.
pub fn caller_timeout(metadata: &MetadataMap) -> Option<Duration> {
    let value = metadata.get(HEADER).and_then(|value| value.to_str().ok());
    value.and_then(parse)
}

/// Parses the header. `None` if it is not valid.
fn parse(text: &str) -> Option<Duration> {
    let unit = text.chars().next_back()?;
    let digits = text.strip_suffix(unit)?;
    if digits.len() > MOST_DIGITS || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        'H' => Some(Duration::from_secs(number * 3600)),
        'M' => Some(Duration::from_secs(number * 60)),
        'S' => Some(Duration::from_secs(number)),
        'm' => Some(Duration::from_millis(number)),
        'u' => Some(Duration::from_micros(number)),
        'n' => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_deadline_is_read_in_every_unit_and_nonsense_is_none() {
        for (text, expected) in [
            ("239999913u", None),
            ("23999991u", Some(Duration::from_micros(23_999_991))),
            ("240S", Some(Duration::from_secs(240))),
            ("4M", Some(Duration::from_secs(240))),
            ("1H", Some(Duration::from_secs(3600))),
            ("5m", Some(Duration::from_millis(5))),
            ("7n", Some(Duration::from_nanos(7))),
            ("", None),
            ("S", None),
            ("-1S", None),
            ("1x", None),
            ("1\u{e9}", None),
        ] {
            assert_eq!(parse(text), expected, "{text:?}");
        }
    }
}
