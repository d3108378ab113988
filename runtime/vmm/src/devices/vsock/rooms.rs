// SPDX-License-Identifier: Apache-2.0
//! The driver's receive buffers for packets. Linux's are small, so one read from a socket may fill many of them. Each
//! filled buffer becomes a packet.

use std::collections::VecDeque;

use super::packet::{CHAIN_MAX, HEADER_BYTES, Header};
use crate::devices::budget::Budget;
use crate::devices::chain::{Buffers, Chain};
use crate::devices::ring::{Ring, RingError};
use crate::memory::Memory;
use crate::statistics::DeviceCounters;

/// A buffer for one packet.
#[derive(Debug)]
struct Room<'m> {
    head: u16,
    header: Buffers<'m>,
    data: Buffers<'m>,
}

/// Buffers that were popped from the queue and not used yet, oldest first.
#[derive(Debug, Default)]
pub struct Rooms<'m>(VecDeque<Room<'m>>);

impl<'m> Rooms<'m> {
    /// Pops buffers until there are `count`, or fewer if the driver does not offer as many valid ones.
    pub fn take(
        &mut self,
        count: usize,
        ring: &mut Ring,
        memory: &'m Memory,
        counters: &DeviceCounters,
        budget: &mut Budget,
    ) -> Result<(), RingError> {
        while self.0.len() < count {
            let Some(chain) = ring.pop(memory)? else {
                break;
            };
            let head = chain.head_index();
            let chain = Chain::resolve(chain, memory, CHAIN_MAX, budget);
            match chain.and_then(|chain| chain.writable.split(HEADER_BYTES)) {
                Ok((header, data)) => self.0.push_back(Room { head, header, data }),
                Err(_) if self.is_empty() => {
                    counters.fail();
                    return ring.push(memory, head, 0);
                }
                // Return a bad chain only when all earlier ones are used: `put_back` undoes the latest pops,
                // and so relies on the order.
                Err(_) => {
                    ring.undo_pop();
                    break;
                }
            }
        }
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The space for data in all buffers.
    pub fn data(&self) -> Buffers<'m> {
        let mut all = Buffers::default();
        for room in &self.0 {
            all.extend(&room.data);
        }
        all
    }

    /// Hands data, which is in [`Self::data`] already, to the driver. Each buffer that it reaches into becomes a
    /// packet of its own.
    pub fn give(
        &mut self,
        mut header: Header,
        ring: &mut Ring,
        memory: &Memory,
    ) -> Result<(), RingError> {
        let mut rest = header.len;
        while let Some(room) = self.0.pop_front() {
            header.len = rest.min(u32::try_from(room.data.len()).unwrap_or(u32::MAX));
            rest = rest.saturating_sub(header.len);
            room.header.copy_from(&header.bytes());
            let bytes = u32::try_from(HEADER_BYTES).unwrap_or(0);
            ring.push(memory, room.head, header.len.saturating_add(bytes))?;
            if rest == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Gives unused buffers back to the queue, for the next turn.
    pub fn put_back(self, ring: &mut Ring) {
        for _ in self.0 {
            ring.undo_pop();
        }
    }
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::Arc;
    use std::time::Instant;

    use super::super::muxer::{HOST_CID, Muxer};
    use super::super::packet::{HEADER_BYTES, Header, Op, TYPE_STREAM};
    use super::super::{RX, TX, Vsock};
    use crate::devices::VirtioDevice;
    use crate::devices::driver::{Driver, NEXT, WRITE};
    use crate::statistics::Milestone;

    const CID: u32 = 5;
    const PORT: u32 = 52;
    const PACKET: u64 = 0x20_0000;
    const ROOMS: u64 = 0x40_0000;
    const ROOM_BYTES: u64 = 4096;

    fn header_bytes() -> u32 {
        u32::try_from(HEADER_BYTES).unwrap()
    }

    /// Offers a buffer with this number, for `bytes` bytes of data.
    fn offer(driver: &Driver, number: u16, bytes: u32) {
        let at = ROOMS + u64::from(number) * 2 * ROOM_BYTES;
        let header = (at, header_bytes(), NEXT | WRITE, number * 2 + 1);
        let data = (at + ROOM_BYTES, bytes, WRITE, 0);
        driver.offer(RX, number * 2, &[header, data]);
    }

    fn data(driver: &Driver, number: u16, len: usize) -> Vec<u8> {
        let at = ROOMS + u64::from(number) * 2 * ROOM_BYTES;
        driver.read(at + ROOM_BYTES, len)
    }

    /// A device with a stream that the guest has opened, and the stream's host end.
    fn connected(driver: &Driver, dir: &std::path::Path) -> (Vsock, UnixStream) {
        let caller = UnixListener::bind(dir.join("v")).unwrap();
        let (host, ready) = UnixStream::pair().unwrap();
        ready.set_nonblocking(true).unwrap();
        let milestone = || Arc::new(Milestone::new(Instant::now()));
        let muxer = Muxer::new(
            CID,
            caller,
            Some((PORT, ready)),
            Arc::default(),
            milestone(),
        );
        let muxer = muxer.unwrap();
        let mut vsock = Vsock::new(CID, muxer, Arc::default(), milestone());
        driver.activate(&mut vsock, 0);
        let request = Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: 9,
            dst_port: PORT,
            len: 0,
            kind: TYPE_STREAM,
            op: Op::Request,
            flags: 0,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        };
        driver.write(PACKET, &request.bytes());
        driver.offer(TX, 0, &[(PACKET, header_bytes(), 0, 0)]);
        vsock.queue_ready(TX).unwrap();
        (vsock, host)
    }

    #[test]
    fn one_read_fills_many_rooms_and_the_rest_stays_with_the_driver() {
        let (driver, dir) = (Driver::new(), tempfile::tempdir().unwrap());
        let (mut vsock, mut host) = connected(&driver, dir.path());
        let bytes: Vec<u8> = (0..250).cycle().take(200).collect();
        host.write_all(&bytes).unwrap();
        for number in 0..6 {
            offer(&driver, number, 64);
        }
        vsock.host_ready().unwrap();
        // First the answer to the request, then the data: 64 bytes, and then 64, 64 and 8 from one read.
        let lengths = [0, 64, 64, 64, 8].map(|len| header_bytes() + len);
        let used = driver.used(RX);
        assert_eq!(
            used,
            (0..).step_by(2).zip(lengths).collect::<Vec<(u32, u32)>>()
        );
        let got: Vec<u8> = [(1, 64), (2, 64), (3, 64), (4, 8)]
            .into_iter()
            .flat_map(|(number, len)| data(&driver, number, len))
            .collect();
        assert_eq!(got, bytes);
        host.write_all(b"more").unwrap();
        vsock.host_ready().unwrap();
        assert_eq!(driver.used(RX), [(10, header_bytes() + 4)]);
        assert_eq!(data(&driver, 5, 4), b"more");
    }

    #[test]
    fn a_room_without_room_comes_back_in_its_turn() {
        let (driver, dir) = (Driver::new(), tempfile::tempdir().unwrap());
        let (mut vsock, mut host) = connected(&driver, dir.path());
        host.write_all(&[7; 150]).unwrap();
        for number in [0, 1, 2] {
            offer(&driver, number, 64);
        }
        driver.offer(RX, 6, &[(ROOMS, 8, WRITE, 0)]);
        offer(&driver, 4, 64);
        vsock.host_ready().unwrap();
        let header = header_bytes();
        let expected = [
            (0, header),
            (2, header + 64),
            (4, header + 64),
            (6, 0),
            (8, header + 22),
        ];
        assert_eq!(driver.used(RX), expected);
    }
}
