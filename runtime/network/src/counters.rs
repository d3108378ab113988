// SPDX-License-Identifier: Apache-2.0
//! Traffic counters of a pod's interface, as the host counts them. They are read from CNI's interface in the pod's
//! namespace, so the guest cannot falsify them. "Received" is what arrived for the pod.

use tokio::sync::Semaphore;

use crate::failure::{NetworkError, file_error};
use crate::link::INTERFACE;
use crate::netns;
use crate::network::Network;
use crate::record::NetworkRecord;

/// The counters of the reading thread's namespace.
const DEVICES: &str = "/proc/thread-self/net/dev";

/// Limits how many counters are read at a time, because each reader is a thread and a node may have hundreds of pods.
static READERS: Semaphore = Semaphore::const_new(8);

/// The counters of one interface since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub received: Direction,
    pub sent: Direction,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Direction {
    pub bytes: u64,
    pub packets: u64,
    pub errors: u64,
    pub dropped: u64,
}

impl Network {
    /// The name of the pod's interface, and its counters. `None` for a pod that has only loopback.
    pub async fn counters(
        record: &NetworkRecord,
    ) -> Result<Option<(&'static str, Counters)>, NetworkError> {
        let Some(attached) = &record.attached else {
            return Ok(None);
        };
        // It fails only if the semaphore is closed, which never happens.
        let _one = READERS.acquire().await.ok();
        let text = netns::inside_blocking(&attached.netns, || {
            std::fs::read_to_string(DEVICES).map_err(file_error("read", DEVICES.as_ref()))
        })
        .await?;
        Ok(parse(&text, INTERFACE).map(|counters| (INTERFACE, counters)))
    }
}

/// Parses /proc/net/dev. It has eight numbers for each direction, of which the first four are used.
fn parse(text: &str, interface: &str) -> Option<Counters> {
    let numbers = text.lines().find_map(|line| {
        let (name, numbers) = line.split_once(':')?;
        (name.trim() == interface).then_some(numbers)
    })?;
    let numbers: Vec<u64> = numbers
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    let direction = |first: usize| {
        let &[bytes, packets, errors, dropped] = numbers.get(first..first + 4)? else {
            return None;
        };
        Some(Direction {
            bytes,
            packets,
            errors,
            dropped,
        })
    };
    Some(Counters {
        received: direction(0)?,
        sent: direction(8)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0
  eth0:    1000      10    1    2    0     0          0         0     2000      20    3    4    0     0       0          0
";

    #[test]
    fn an_interface_is_found_by_its_name() {
        let counters = parse(TEXT, "eth0").unwrap();
        assert_eq!(
            counters.received,
            Direction {
                bytes: 1000,
                packets: 10,
                errors: 1,
                dropped: 2
            }
        );
        assert_eq!((counters.sent.bytes, counters.sent.dropped), (2000, 4));
        assert_eq!(parse(TEXT, "eth1"), None);
        assert_eq!(parse("eth0: 1 2", "eth0"), None);
    }
}
