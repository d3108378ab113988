// SPDX-License-Identifier: Apache-2.0
//! Tells the guest of a restored VM that its connections are gone: the event TRANSPORT_RESET (virtio 1.2, 5.10.6, device
//! events). Their other ends were sockets of the VM that was saved.
//!
//! Linux then resets all connections that it has, and keeps its listeners. It handles packets and events at once, and would
//! reset a connection too that it has just accepted. So no packet is given to the guest before it has handled the event,
//! which it says when it makes the event's buffer available again.

use crate::devices::budget::Budget;
use crate::devices::chain::Chain;
use crate::devices::ring::{Ring, RingError};
use crate::memory::Memory;
use crate::statistics::DeviceCounters;

/// `struct virtio_vsock_event` with VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
const EVENT: [u8; 4] = 0u32.to_le_bytes();
/// How many buffers are tried in a turn.
const BUDGET: Budget = Budget::of_chains(16);

/// How far the reset is.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum Reset {
    /// Nothing to tell, or the guest has handled it.
    #[default]
    Over,
    /// The guest has to be told, as soon as there is a buffer for it.
    Due,
    /// The guest was told when its event queue ended there.
    Told { end: u16 },
}

impl Reset {
    /// Goes on as far as the guest's event queue allows. True if the guest may be given packets.
    pub fn advance(
        &mut self,
        ring: &mut Ring,
        memory: &Memory,
        counters: &DeviceCounters,
    ) -> Result<bool, RingError> {
        let mut budget = BUDGET;
        while *self == Self::Due && budget.begin() {
            let Some(chain) = ring.pop(memory)? else {
                if ring.rearm(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let buffers = Chain::resolve(chain, memory, 1, &mut budget);
            let written = buffers.map_or(0, |buffers| buffers.writable.copy_from(&EVENT));
            let end = ring.end(memory)?;
            ring.push(memory, head, u32::try_from(written).unwrap_or(0))?;
            match written == EVENT.len() {
                true => *self = Self::Told { end },
                false => {
                    counters.fail();
                }
            }
        }
        ring.signal(memory)?;
        // First ask to be told of the buffer, then look whether it is there.
        if let Self::Told { end } = *self
            && ring.rearm_at_end(memory)? != end
        {
            *self = Self::Over;
        }
        Ok(*self == Self::Over)
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::Arc;
    use std::time::Instant;

    use super::super::muxer::Muxer;
    use super::super::{EVENT as EVENTS, RX, Vsock};
    use crate::devices::VirtioDevice;
    use crate::devices::driver::{Driver, WRITE};
    use crate::devices::saved::Purpose;
    use crate::statistics::Milestone;

    const AT: u64 = 0x10_0000;
    const PACKET: u64 = 0x20_0000;
    const HEADER: u32 = 44;

    /// A device that begins with a reset, and a caller who wants to reach port 1024 of the guest.
    fn device(directory: &tempfile::TempDir) -> (Vsock, UnixStream) {
        let path = directory.path().join("v");
        let listener = UnixListener::bind(&path).unwrap();
        let milestone = || Arc::new(Milestone::new(Instant::now()));
        let muxer = Muxer::new(3, listener, None, Arc::default(), milestone()).unwrap();
        let mut vsock = Vsock::new(3, muxer, Arc::default(), milestone());
        vsock.begin_with_reset().unwrap();
        let mut caller = UnixStream::connect(path).unwrap();
        caller.write_all(b"CONNECT 1024\n").unwrap();
        (vsock, caller)
    }

    #[test]
    fn the_event_comes_once_when_there_is_a_buffer_and_no_packet_before_it_was_handled() {
        let directory = tempfile::tempdir().unwrap();
        let (mut vsock, _caller) = device(&directory);
        let driver = Driver::new();
        driver.activate(&mut vsock, 0);
        for number in 0..2 {
            let room = (PACKET + u64::from(number) * 0x1000, 4096, WRITE, 0);
            driver.offer(RX, number, &[room]);
        }
        vsock.queue_ready(EVENTS).unwrap();
        vsock.host_ready().unwrap();
        assert!(driver.used(EVENTS).is_empty() && driver.used(RX).is_empty());

        // A buffer that is too short goes back as it came; the next one has the event.
        driver.write(AT, &[7; 64]);
        for (number, len) in [(0u16, 2), (1, 4), (2, 4)] {
            let room = (AT + u64::from(number) * 16, len, WRITE, 0);
            driver.offer(EVENTS, number, &[room]);
        }
        vsock.queue_ready(EVENTS).unwrap();
        assert_eq!(driver.used(EVENTS), [(0, 2), (1, 4)]);
        assert_eq!(driver.read(AT + 16, 5), [0, 0, 0, 0, 7]);
        assert_eq!(driver.read(AT + 32, 4), [7; 4]);
        assert_eq!(driver.interrupt_status(), 1);
        vsock.queue_ready(RX).unwrap();
        vsock.host_ready().unwrap();
        assert!(driver.used(RX).is_empty(), "it has not handled the event");

        driver.offer(EVENTS, 1, &[(AT + 16, 4, WRITE, 0)]);
        vsock.queue_ready(EVENTS).unwrap();
        assert_eq!(driver.used(RX), [(0, HEADER)], "the caller's request");
        vsock.queue_ready(EVENTS).unwrap();
        assert!(driver.used(EVENTS).is_empty(), "once");
    }

    #[test]
    fn a_driver_that_starts_anew_has_nothing_to_forget() {
        let directory = tempfile::tempdir().unwrap();
        let (mut vsock, _caller) = device(&directory);
        let driver = Driver::new();
        driver.activate(&mut vsock, 0);
        vsock.deactivate();
        let driver = Driver::new();
        driver.activate(&mut vsock, 0);
        driver.offer(RX, 0, &[(PACKET, 4096, WRITE, 0)]);
        driver.offer(EVENTS, 0, &[(AT, 4, WRITE, 0)]);
        vsock.host_ready().unwrap();
        assert_eq!(driver.used(RX), [(0, HEADER)]);
        assert!(driver.used(EVENTS).is_empty());
    }

    #[test]
    fn an_open_connection_is_in_the_way_of_a_template_only() {
        let directory = tempfile::tempdir().unwrap();
        let (mut vsock, caller) = device(&directory);
        let driver = Driver::new();
        driver.activate(&mut vsock, 0);
        vsock.host_ready().unwrap();
        let busy = vsock.save(Purpose::Template).unwrap_err();
        assert_eq!(busy.to_string(), "device vsock has a connection open");
        assert_eq!(vsock.save(Purpose::Checkpoint).unwrap().unwrap().len(), 3);
        drop(caller);
    }
}
