// SPDX-License-Identifier: Apache-2.0
//! The muxer with a guest that the test plays: packets in, packets out, unix sockets on the host.
#![allow(clippy::arithmetic_side_effects)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::super::packet::{SHUTDOWN_BOTH, SHUTDOWN_SEND};
use super::*;
use crate::memory::Memory;

const CID: u32 = 5;

struct Guest {
    muxer: Muxer,
    memory: Memory,
    dir: tempfile::TempDir,
    /// The host's end of the guest's own connection.
    ready: UnixStream,
    credit: u32,
}

/// The port of the host to which the guest can connect.
const READY: u32 = 52;

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let listener = UnixListener::bind(&path).unwrap();
        let first = Arc::new(Milestone::new(Instant::now()));
        let (ready, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let ours = Some((READY, ours));
        Self {
            muxer: Muxer::new(CID, listener, ours, Arc::default(), first).unwrap(),
            memory: crate::memory::create(32 << 20).unwrap(),
            dir,
            ready,
            credit: 1 << 20,
        }
    }

    fn dial(&mut self, line: &str) -> BufReader<UnixStream> {
        let mut host = UnixStream::connect(self.dir.path().join("v")).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        host.write_all(line.as_bytes()).unwrap();
        self.muxer.poll();
        BufReader::new(host)
    }

    /// The next packet and its data.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        self.muxer.poll();
        let mut room = Buffers::default();
        room.append(self.memory.get_slice(GuestAddress(0), 4096).unwrap());
        let header = self.muxer.next_packet(&room)?;
        let mut data = vec![0; header.len as usize];
        room.copy_to(&mut data);
        Some((header, data))
    }

    fn send(&mut self, ports: Ports, op: Op, flags: u32, fwd_cnt: u32, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(0x1000))
            .unwrap();
        let mut data = Buffers::default();
        data.append(
            self.memory
                .get_slice(GuestAddress(0x1000), bytes.len())
                .unwrap(),
        );
        let header = Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            len: u32::try_from(bytes.len()).unwrap(),
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: self.credit,
            fwd_cnt,
        };
        self.muxer.from_guest(&header, &data);
    }

    /// Opens a stream from the host.
    fn open(&mut self) -> (Ports, BufReader<UnixStream>) {
        let mut host = self.dial("CONNECT 1024\n");
        let (header, _) = self.receive().unwrap();
        assert_eq!((header.op, header.dst_port), (Op::Request, 1024));
        assert_eq!((header.src_cid, header.dst_cid), (2, u64::from(CID)));
        assert_eq!(header.buf_alloc, WINDOW_BYTES);
        let ports = Ports {
            host: header.src_port,
            guest: 1024,
        };
        self.send(ports, Op::Response, 0, 0, &[]);
        let mut line = String::new();
        host.read_line(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", ports.host));
        (ports, host)
    }
}

#[test]
fn the_host_connects_and_both_talk_and_half_close() {
    let mut guest = Guest::new();
    let (ports, mut host) = guest.open();
    assert!(guest.receive().is_none());
    host.get_mut().write_all(b"ping").unwrap();
    let (header, data) = guest.receive().unwrap();
    assert_eq!((header.op, data.as_slice()), (Op::Data, b"ping".as_slice()));
    guest.send(ports, Op::Data, 0, 4, b"pong\n");
    let mut line = String::new();
    host.read_line(&mut line).unwrap();
    assert_eq!(line, "pong\n");

    host.get_ref().shutdown(Shutdown::Write).unwrap();
    let (header, _) = guest.receive().unwrap();
    assert_eq!((header.op, header.flags), (Op::Shutdown, SHUTDOWN_SEND));
    assert_eq!(header.fwd_cnt, 5);
    guest.send(ports, Op::Data, 0, 4, b"bye");
    guest.send(ports, Op::Shutdown, SHUTDOWN_BOTH, 4, &[]);
    let mut rest = String::new();
    host.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "bye");
    assert_eq!(guest.receive().unwrap().0.op, Op::Reset);
    assert!(guest.muxer.streams.is_empty() && guest.muxer.streams.is_unknown_to_guest());
}

#[test]
fn a_stream_that_the_guest_half_closed_is_quiet() {
    let mut guest = Guest::new();
    let (ports, mut host) = guest.open();
    guest.send(ports, Op::Shutdown, SHUTDOWN_SEND, 0, &[]);
    guest.muxer.poll();
    assert_eq!(
        guest.muxer.poll(),
        Turn::Idle,
        "no events of its own making"
    );

    let mut rest = String::new();
    host.read_to_string(&mut rest).unwrap();
    host.get_mut().write_all(b"still heard").unwrap();
    assert_eq!(guest.receive().unwrap().1, b"still heard");
}

#[test]
fn the_guest_connects_once_to_the_port_that_there_is() {
    let mut guest = Guest::new();
    let to = |host| Ports { host, guest: 9 };
    guest.send(to(53), Op::Request, 0, 0, &[]);
    assert_eq!(guest.receive().unwrap().0.op, Op::Reset, "no such port");

    let ports = to(READY);
    guest.send(ports, Op::Request, 0, 0, &[]);
    let (header, _) = guest.receive().unwrap();
    assert_eq!((header.op, header.src_port), (Op::Response, READY));
    let again = Ports {
        host: READY,
        guest: 10,
    };
    guest.send(again, Op::Request, 0, 0, &[]);
    assert_eq!(guest.receive().unwrap().0.op, Op::Reset, "it is taken");
    guest.send(ports, Op::Data, 0, 0, b"hello");
    guest.send(ports, Op::Shutdown, SHUTDOWN_SEND, 0, &[]);
    let mut host = guest.ready.try_clone().unwrap();
    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    host.write_all(b"answer").unwrap();
    host.shutdown(Shutdown::Both).unwrap();
    assert_eq!(guest.receive().unwrap().1, b"answer");
    let (header, _) = guest.receive().unwrap();
    assert_eq!((header.op, header.flags), (Op::Shutdown, SHUTDOWN_BOTH));
    guest.send(ports, Op::Reset, 0, 6, &[]);
    assert!(guest.muxer.streams.is_empty());
}

#[test]
fn credit_holds_back_and_comes_back() {
    let mut guest = Guest::new();
    guest.credit = 10;
    let (ports, mut host) = guest.open();
    host.get_mut().write_all(&[1; 25]).unwrap();
    assert_eq!(guest.receive().unwrap().1.len(), 10);
    assert_eq!(guest.receive().unwrap().0.op, Op::CreditRequest);
    assert!(guest.receive().is_none());
    guest.send(ports, Op::CreditUpdate, 0, 4, &[]);
    assert_eq!(guest.receive().unwrap().1.len(), 4);
    guest.send(ports, Op::CreditUpdate, 0, 14, &[]);
    assert_eq!(guest.receive().unwrap().1.len(), 10);
    // The guest may also request credit.
    guest.send(ports, Op::CreditRequest, 0, 24, &[]);
    let (header, data) = guest.receive().unwrap();
    assert_eq!((header.op, data.len()), (Op::Data, 1));
    assert_eq!((header.buf_alloc, header.fwd_cnt), (WINDOW_BYTES, 0));
}

#[test]
fn a_stalled_host_blocks_only_itself_and_loses_nothing() {
    let mut guest = Guest::new();
    let (slow, mut stalled) = guest.open();
    let (quick, mut other) = guest.open();
    let chunk = vec![7; 4096];
    let (mut sent, mut told) = (0u32, 0u32);
    // As a driver does, send no more than the credit allows.
    while sent - told + 4096 <= WINDOW_BYTES {
        guest.send(slow, Op::Data, 0, 0, &chunk);
        sent += 4096;
        while let Some((header, _)) = guest.receive() {
            assert_eq!(header.op, Op::CreditUpdate);
            told = header.fwd_cnt;
        }
    }
    guest.send(quick, Op::Data, 0, 0, b"still here\n");
    let mut line = String::new();
    other.read_line(&mut line).unwrap();
    assert_eq!(line, "still here\n");
    // The guest closes. What it sent is still delivered.
    guest.send(slow, Op::Shutdown, SHUTDOWN_BOTH, 0, &[]);
    assert_eq!(guest.receive().unwrap().0.op, Op::Reset);
    assert_eq!(guest.muxer.streams.len(), 2);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        stalled.read_to_end(&mut all).unwrap();
        all.len()
    });
    while guest.muxer.streams.len() > 1 {
        guest.muxer.poll();
    }
    assert_eq!(reader.join().unwrap(), sent as usize);
}

#[test]
fn a_driver_that_ignores_credit_loses_the_stream() {
    let mut guest = Guest::new();
    let (ports, _host) = guest.open();
    for _ in 0..200 {
        guest.send(ports, Op::Data, 0, 0, &[0; 4096]);
    }
    let ops: Vec<Op> = std::iter::from_fn(|| guest.receive())
        .map(|p| p.0.op)
        .collect();
    assert!(ops.contains(&Op::Reset));
    assert!(guest.muxer.streams.is_unknown_to_guest());
}

#[test]
fn refusals_and_time_limits() {
    let mut guest = Guest::new();
    let mut host = guest.dial("CONNECT 7\n");
    let (header, _) = guest.receive().unwrap();
    let ports = Ports {
        host: header.src_port,
        guest: 7,
    };
    guest.send(ports, Op::Reset, 0, 0, &[]);
    let mut line = String::new();
    assert_eq!(
        host.read_line(&mut line).unwrap(),
        0,
        "closed without an OK"
    );

    let mut late = guest.dial("CONNECT 8\n");
    assert_eq!(guest.receive().unwrap().0.op, Op::Request);
    guest.muxer.expire(Instant::now() + Duration::from_secs(60));
    assert_eq!(late.read_line(&mut line).unwrap(), 0);
    assert_eq!(guest.receive().unwrap().0.op, Op::Reset);

    let mut rude = guest.dial("HELLO\n");
    // The kernel may answer with a reset, because the line was not read completely.
    assert_eq!(rude.read_line(&mut line).unwrap_or(0), 0);
}

#[test]
fn a_caller_waits_for_the_driver_and_survives_its_reset() {
    let mut guest = Guest::new();
    let mut host = guest.dial("CONNECT 1024\n");
    assert_eq!(guest.receive().unwrap().0.op, Op::Request);
    guest.muxer.guest_reset();
    let (header, _) = guest.receive().unwrap();
    assert_eq!(header.op, Op::Request, "it is asked again");
    let ports = Ports {
        host: header.src_port,
        guest: 1024,
    };
    guest.send(ports, Op::Response, 0, 0, &[]);
    let mut line = String::new();
    host.read_line(&mut line).unwrap();
    guest.muxer.guest_reset();
    assert_eq!(host.read_line(&mut line).unwrap(), 0, "open streams end");
}

#[test]
fn nonsense_is_answered_with_bounded_resets() {
    let mut guest = Guest::new();
    for port in 0..MAX_RESETS {
        assert!(guest.muxer.takes_input());
        let ports = Ports {
            host: 1,
            guest: u32::try_from(port).unwrap(),
        };
        guest.send(ports, Op::Unknown(77), 0, 0, &[]);
    }
    assert!(!guest.muxer.takes_input());
    while let Some((header, _)) = guest.receive() {
        assert_eq!(header.op, Op::Reset);
    }
    let (ports, _host) = guest.open();
    guest.send(ports, Op::Unknown(9), 0, 0, &[]);
    assert_eq!(guest.receive().unwrap().0.op, Op::Reset);
}

#[test]
fn streams_take_turns() {
    let mut guest = Guest::new();
    let (first, mut a) = guest.open();
    let (second, mut b) = guest.open();
    a.get_mut().write_all(&[1; 16384]).unwrap();
    b.get_mut().write_all(&[2; 16384]).unwrap();
    let ports: Vec<u32> = (0..8)
        .map(|_| guest.receive().unwrap().0.src_port)
        .collect();
    assert!(ports.windows(2).all(|w| w[0] != w[1]), "{ports:?}");
    assert!(ports.contains(&first.host) && ports.contains(&second.host));
}
