// SPDX-License-Identifier: Apache-2.0
//! Sequences of vsock packets from a guest, and what programs of the host do meanwhile.
//!
//! The guest never gets more bytes of a stream than its credit allows, nor is told that more of its bytes went on than it
//! sent, and no packet is larger than its room.
#![no_main]

use std::collections::HashMap;
use std::io::Write;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use bulkhead_fuzz::chains::{DATA, driver};
use bulkhead_fuzz::input::Input;
use bulkhead_fuzz::places::{READY_PORT, vsock_sockets};
use bulkhead_vmm::devices::chain::Buffers;
use bulkhead_vmm::devices::driver::Driver;
use bulkhead_vmm::devices::vsock::muxer::{HOST_CID, Muxer};
use bulkhead_vmm::devices::vsock::packet::{HEADER_BYTES, Header, Op};
use bulkhead_vmm::statistics::Milestone;
use vm_memory::{GuestAddress, GuestMemoryBackend};

const CID: u32 = 5;
const MOST_STEPS: usize = 256;

/// What the guest knows of a stream.
#[derive(Debug, Default)]
struct Stream {
    window: u32,
    taken: Wrapping<u32>,
    got: Wrapping<u32>,
    sent: Wrapping<u32>,
}

impl Stream {
    fn credit(&self) -> u32 {
        self.window.saturating_sub((self.got - self.taken).0)
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let (path, caller, ready, host) = vsock_sockets();
    let first = Arc::new(Milestone::new(Instant::now()));
    let muxer = Muxer::new(CID, caller, Some(ready), Arc::default(), first);
    let mut muxer = muxer.expect("a muxer");
    let driver = driver();
    let mut input = Input::new(bytes);
    let mut hosts = vec![host];
    let mut streams: HashMap<(u32, u32), Stream> = HashMap::new();
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        match input.below(8) {
            0..=2 => {
                let header = packet(&mut input, &streams);
                let len = usize::try_from(header.len).expect("a length");
                driver.write(DATA, &vec![input.byte(); len]);
                if muxer.takes_input() {
                    let stream = streams
                        .entry((header.dst_port, header.src_port))
                        .or_default();
                    (stream.window, stream.taken) = (header.buf_alloc, Wrapping(header.fwd_cnt));
                    if header.op == Op::Data {
                        stream.sent += header.len;
                    }
                    muxer.from_guest(&header, &room(&driver, len));
                }
            }
            3 | 4 => {
                muxer.poll();
                let len = usize::from(input.byte()) * 16;
                if let Some(header) = muxer.next_packet(&room(&driver, len)) {
                    took(&header, len, &mut streams);
                }
            }
            5 => {
                if let Ok(mut host) = UnixStream::connect(&path) {
                    let _ = host.set_nonblocking(true);
                    let _ = host.write_all(input.short());
                    hosts.push(host);
                }
            }
            6 => match input.below(3) {
                0 => drop(hosts.pop()),
                1 => muxer.guest_reset(),
                _ => {
                    let text = input.short();
                    if let Some(host) = hosts.last_mut() {
                        let _ = host.set_nonblocking(true);
                        let _ = host.write_all(text);
                    }
                }
            },
            _ => {
                muxer.poll();
            }
        }
    }
});

fn room(driver: &Driver, len: usize) -> Buffers<'_> {
    let mut room = Buffers::default();
    let slice = driver.memory.get_slice(GuestAddress(DATA), len);
    room.append(slice.expect("guest memory"));
    room
}

/// A packet of the guest. Its ports are those of a stream, or of the port on which the host listens, or any.
fn packet(input: &mut Input<'_>, streams: &HashMap<(u32, u32), Stream>) -> Header {
    let mut known: Vec<_> = streams.keys().copied().collect();
    known.sort_unstable();
    let (host, guest) = match input.byte() {
        number @ 0..32 => known
            .get(usize::from(number))
            .copied()
            .unwrap_or((READY_PORT, 9)),
        number @ 32..64 => (READY_PORT, number.into()),
        _ => (input.u32(), input.u32()),
    };
    let mut bytes = Header::new((CID.into(), guest), (HOST_CID, host), Op::Data).bytes();
    bytes[30] = input.below(9);
    let mut header = Header::parse(&bytes);
    header.flags = input.below(4).into();
    if header.op == Op::Data {
        header.len = u32::from(input.byte()) * 64;
    }
    (header.buf_alloc, header.fwd_cnt) = match input.byte() {
        0 => (1 << 20, 0),
        1 => (input.u16().into(), input.u16().into()),
        _ => (input.u32(), input.u32()),
    };
    assert_eq!(bytes.len(), HEADER_BYTES);
    header
}

/// The guest gets a packet.
fn took(header: &Header, room: usize, streams: &mut HashMap<(u32, u32), Stream>) {
    assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
    let stream = streams
        .entry((header.src_port, header.dst_port))
        .or_default();
    match header.op {
        Op::Request | Op::Response => (stream.got, stream.sent) = Default::default(),
        Op::Data => {
            let len = usize::try_from(header.len).expect("a length");
            assert!(len <= room, "{len} bytes in a room of {room}");
            assert!(
                header.len <= stream.credit(),
                "{header:?} beyond the credit of {stream:?}"
            );
            stream.got += header.len;
        }
        _ => assert_eq!(header.len, 0),
    }
    if header.op != Op::Reset {
        assert!(header.fwd_cnt <= stream.sent.0, "{header:?} for {stream:?}");
    }
}
