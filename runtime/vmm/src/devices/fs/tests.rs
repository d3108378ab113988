// SPDX-License-Identifier: Apache-2.0
//! The device between a mock driver and a server, which is the other end of a socket pair.
#![allow(clippy::arithmetic_side_effects)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use bulkhead_share::fuse::reply_header;

use super::*;
use crate::devices::driver::{Driver, NEXT, Piece, WRITE};

const REQUEST: u64 = 0x20_0000;
const REPLY: u64 = 0x40_0000;
const GETATTR: u32 = 3;
const FORGET: u32 = 2;

fn device() -> (Driver, Fs) {
    let driver = Driver::new();
    let mut fs = Fs::new(Arc::default()).unwrap();
    driver.activate(&mut fs, 0);
    (driver, fs)
}

fn connected() -> (Driver, Fs, UnixStream) {
    let (driver, mut fs) = device();
    let (server, ours) = UnixStream::pair().unwrap();
    fs.connect(ours).unwrap();
    server.set_nonblocking(true).unwrap();
    (driver, fs, server)
}

fn request(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(REQUEST_HEADER + body.len()).unwrap();
    let mut bytes = vec![0; REQUEST_HEADER];
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
    bytes[8..16].copy_from_slice(&unique.to_le_bytes());
    [&bytes, body].concat()
}

/// Offers a request in two descriptors, with `room` bytes for the reply.
fn offer(driver: &Driver, slot: u16, bytes: &[u8], room: u32) {
    let at = REQUEST + u64::from(slot) * 0x1_0000;
    let reply = REPLY + u64::from(slot) * 0x1_0000;
    driver.write(at, bytes);
    driver.write(reply, &[0xee; 256]);
    let len = u32::try_from(bytes.len()).unwrap();
    let first = slot * 3;
    let half = len / 2;
    let mut chain = vec![
        (at, half, NEXT, first + 1),
        (at + u64::from(half), len - half, 0, 0),
    ];
    if room > 0 {
        chain[1] = (at + u64::from(half), len - half, NEXT, first + 2);
        chain.push((reply, room, WRITE, 0));
    }
    driver.offer(REQUESTS, first, &chain);
}

fn reply_at(driver: &Driver, slot: u16) -> (u32, i32, u64) {
    let bytes = driver.read(REPLY + u64::from(slot) * 0x1_0000, REPLY_HEADER);
    let number =
        |range: std::ops::Range<usize>| u32::from_le_bytes(bytes[range].try_into().unwrap());
    let unique = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    (number(0..4), number(4..8).cast_signed(), unique)
}

/// Reads a request of `len` bytes as the server; returns it and the number that the device gave it.
fn taken(server: &mut UnixStream, len: usize) -> (Vec<u8>, u64) {
    let mut bytes = vec![0; len];
    server.read_exact(&mut bytes).unwrap();
    let number = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    (bytes, number)
}

#[test]
fn a_request_reaches_the_server_and_its_reply_the_guest() {
    let (driver, mut fs, mut server) = connected();
    offer(&driver, 0, &request(GETATTR, 77, b"body"), 100);
    assert_eq!(fs.queue_ready(REQUESTS).unwrap(), Turn::Idle);
    let (bytes, number) = taken(&mut server, REQUEST_HEADER + 4);
    assert_eq!(&bytes[REQUEST_HEADER..], b"body");
    assert_ne!(number, 77, "the device has its own numbers");
    assert!(driver.used(REQUESTS).is_empty());
    // Send it in pieces, as a stream may deliver it.
    let reply = [&reply_header(21, 0, number)[..], b"reply"].concat();
    for part in reply.chunks(5) {
        server.write_all(part).unwrap();
        fs.host_ready().unwrap();
    }
    assert_eq!(driver.used(REQUESTS), [(0, 21)]);
    assert_eq!(reply_at(&driver, 0), (21, 0, 77));
    assert_eq!(driver.read(REPLY + 16, 6), b"reply\xee");
    assert_eq!(driver.interrupt_status(), 1);
}

#[test]
fn replies_may_come_in_another_order_than_requests() {
    let (driver, mut fs, mut server) = connected();
    offer(&driver, 0, &request(GETATTR, 5, b""), 16);
    offer(&driver, 1, &request(GETATTR, 5, b""), 16);
    fs.queue_ready(REQUESTS).unwrap();
    let (_, first) = taken(&mut server, REQUEST_HEADER);
    let (_, second) = taken(&mut server, REQUEST_HEADER);
    assert_ne!(first, second, "though the guest gave both the same number");
    server.write_all(&failure(second, libc::ENOENT)).unwrap();
    server.write_all(&failure(first, libc::EPERM)).unwrap();
    fs.host_ready().unwrap();
    assert_eq!(driver.used(REQUESTS), [(3, 16), (0, 16)]);
    assert_eq!(reply_at(&driver, 0), (16, -libc::EPERM, 5));
    assert_eq!(reply_at(&driver, 1), (16, -libc::ENOENT, 5));
}

#[test]
fn a_request_without_a_reply_comes_back_at_once() {
    let (driver, mut fs, mut server) = connected();
    let bytes = request(FORGET, 9, &[0; 8]);
    driver.write(REQUEST, &bytes);
    driver.offer(HIPRIO, 0, &[(REQUEST, 48, 0, 0)]);
    assert_eq!(fs.queue_ready(HIPRIO).unwrap(), Turn::Idle);
    assert_eq!(driver.used(HIPRIO), [(0, 0)]);
    assert_eq!(taken(&mut server, 48).0, bytes);
}

#[test]
fn without_a_server_requests_fail_at_once() {
    let (driver, mut fs) = device();
    offer(&driver, 0, &request(GETATTR, 1, b""), 100);
    assert_eq!(fs.queue_ready(REQUESTS).unwrap(), Turn::Idle);
    assert_eq!(driver.used(REQUESTS), [(0, 16)]);
    assert_eq!(reply_at(&driver, 0), (16, -libc::ENOTCONN, 1));
}

#[test]
fn a_server_that_goes_away_fails_what_waits_and_what_comes() {
    let (driver, mut fs, mut server) = connected();
    offer(&driver, 0, &request(GETATTR, 1, b""), 100);
    fs.queue_ready(REQUESTS).unwrap();
    let (_, number) = taken(&mut server, REQUEST_HEADER);
    // The server ends in the middle of a reply.
    let half = reply_header(100, 0, number);
    server.write_all(&half).unwrap();
    server.write_all(&[1; 10]).unwrap();
    fs.host_ready().unwrap();
    assert!(driver.used(REQUESTS).is_empty());
    drop(server);
    fs.host_ready().unwrap();
    assert_eq!(driver.used(REQUESTS), [(0, 16)]);
    assert_eq!(reply_at(&driver, 0), (16, -libc::EIO, 1));
    offer(&driver, 1, &request(GETATTR, 2, b""), 100);
    fs.queue_ready(REQUESTS).unwrap();
    assert_eq!(driver.used(REQUESTS), [(3, 16)]);
    assert_eq!(reply_at(&driver, 1), (16, -libc::EIO, 2));
}

#[test]
fn a_server_that_breaks_the_rules_is_disconnected() {
    type Wrong = fn(u64) -> Vec<u8>;
    let wrong: [(&str, Wrong); 5] = [
        ("a number that nobody has", |n| {
            reply_header(16, 0, n ^ 1 << 40).to_vec()
        }),
        ("a slot that is not there", |n| {
            reply_header(16, 0, n | 0xffff).to_vec()
        }),
        ("shorter than its header", |n| {
            reply_header(15, 0, n).to_vec()
        }),
        ("longer than the guest's room", |n| {
            reply_header(101, 0, n).to_vec()
        }),
        ("longer than anything", |n| {
            reply_header(u32::MAX, 0, n).to_vec()
        }),
    ];
    for (case, wrong) in wrong {
        let (driver, mut fs, mut server) = connected();
        offer(&driver, 0, &request(GETATTR, 1, b""), 100);
        fs.queue_ready(REQUESTS).unwrap();
        let (_, number) = taken(&mut server, REQUEST_HEADER);
        server.write_all(&wrong(number)).unwrap();
        fs.host_ready().unwrap();
        assert_eq!(driver.used(REQUESTS), [(0, 16)], "{case}");
        assert_eq!(reply_at(&driver, 0), (16, -libc::EIO, 1), "{case}");
        assert_eq!(server.read(&mut [0; 1]).unwrap(), 0, "{case}");
    }
}

#[test]
fn an_answer_that_was_given_cannot_be_given_again() {
    let (driver, mut fs, mut server) = connected();
    offer(&driver, 0, &request(GETATTR, 1, b""), 100);
    fs.queue_ready(REQUESTS).unwrap();
    let (_, number) = taken(&mut server, REQUEST_HEADER);
    server.write_all(&failure(number, libc::ENOENT)).unwrap();
    fs.host_ready().unwrap();
    offer(&driver, 1, &request(GETATTR, 2, b""), 100);
    fs.queue_ready(REQUESTS).unwrap();
    server.write_all(&failure(number, libc::ENOENT)).unwrap();
    fs.host_ready().unwrap();
    assert_eq!(driver.used(REQUESTS), [(0, 16), (3, 16)]);
    assert_eq!(reply_at(&driver, 1), (16, -libc::EIO, 2));
}

#[test]
fn requests_that_make_no_sense_do_not_reach_the_server() {
    let mut lies = request(GETATTR, 3, b"");
    lies[..4].copy_from_slice(&100u32.to_le_bytes());
    let cases: [(&str, Vec<u8>, u32, Option<i32>); 4] = [
        ("a length that is not so", lies, 100, Some(-libc::EINVAL)),
        ("less than a header", vec![1; 30], 100, None),
        ("no room for a reply", request(GETATTR, 3, b""), 15, None),
        ("no reply wanted", request(GETATTR, 3, b""), 0, None),
    ];
    for (case, bytes, room, error) in cases {
        let (driver, mut fs, mut server) = connected();
        offer(&driver, 0, &bytes, room);
        assert_eq!(fs.queue_ready(REQUESTS).unwrap(), Turn::Idle, "{case}");
        let used = driver.used(REQUESTS);
        assert_eq!(used.len(), 1, "{case}");
        match error {
            Some(error) => assert_eq!(reply_at(&driver, 0), (16, error, 3), "{case}"),
            None => assert_eq!(used[0].1, 0, "{case}"),
        }
        let error = server.read(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{case}");
    }
}

#[test]
fn chains_outside_of_memory_or_without_an_end_come_back_empty() {
    let cases: [(&str, &[Piece]); 4] = [
        (
            "outside",
            &[(1 << 40, 100, NEXT, 1), (REPLY, 100, WRITE, 0)],
        ),
        ("loops", &[(REQUEST, 40, NEXT, 0)]),
        (
            "written before read",
            &[(REPLY, 100, WRITE | NEXT, 1), (REQUEST, 40, 0, 0)],
        ),
        (
            "room outside",
            &[(REQUEST, 40, NEXT, 1), (1 << 40, 100, WRITE, 0)],
        ),
    ];
    for (case, chain) in cases {
        let (driver, mut fs, mut server) = connected();
        driver.write(REQUEST, &request(GETATTR, 1, b""));
        driver.offer(REQUESTS, 0, chain);
        assert_eq!(fs.queue_ready(REQUESTS).unwrap(), Turn::Idle, "{case}");
        assert_eq!(driver.used(REQUESTS), [(0, 0)], "{case}");
        assert!(server.read(&mut [0; 1]).is_err(), "{case}");
    }
    let (_, mut fs) = device();
    assert!(fs.queue_ready(2).is_err(), "there is no such queue");
}

#[test]
fn a_server_that_does_not_read_stops_the_queue_and_not_the_device() {
    let (driver, mut fs, mut server) = connected();
    // Small enough for the mock's memory, large enough to fill a socket's buffer.
    let bytes = request(GETATTR, 1, &vec![7; 0xf000]);
    let mut offered = 0;
    while fs.link.takes_output() && offered < 200 {
        offer(&driver, offered % 5, &bytes, 16);
        fs.queue_ready(REQUESTS).unwrap();
        offered += 1;
    }
    assert!(offered < 200, "the device takes no more");
    offer(&driver, offered % 5, &bytes, 16);
    assert_eq!(fs.queue_ready(REQUESTS).unwrap(), Turn::Idle);
    let mut read = 0;
    let mut buffer = vec![0; 1 << 16];
    while read < (usize::from(offered) + 1) * bytes.len() {
        match server.read(&mut buffer) {
            Ok(count) => read += count,
            Err(_) => assert_eq!(fs.host_ready().unwrap(), Turn::Idle),
        }
    }
    assert!(fs.link.takes_output());
}

#[test]
fn a_driver_that_starts_anew_has_no_server() {
    let (driver, mut fs, mut server) = connected();
    offer(&driver, 0, &request(GETATTR, 1, b""), 100);
    fs.queue_ready(REQUESTS).unwrap();
    taken(&mut server, REQUEST_HEADER);
    fs.deactivate();
    assert_eq!(server.read(&mut [0; 1]).unwrap(), 0);
    driver.activate(&mut fs, 0);
    offer(&driver, 0, &request(GETATTR, 2, b""), 100);
    fs.queue_ready(REQUESTS).unwrap();
    assert_eq!(reply_at(&driver, 0), (16, -libc::ENOTCONN, 2));
    let (_server, ours) = UnixStream::pair().unwrap();
    fs.connect(ours).unwrap();
    let (_server, another) = UnixStream::pair().unwrap();
    assert!(fs.connect(another).is_err(), "there can be one");
}

#[test]
fn the_configuration_space_has_the_tag_and_one_queue() {
    let (_, fs) = device();
    let space = fs.config();
    assert_eq!(space.len(), 40);
    assert_eq!(&space[..9], b"bulkhead\0");
    assert_eq!(space[36..], 1u32.to_le_bytes());
}

#[test]
fn for_all_lengths_a_reply_fits_its_room_or_the_server_is_disconnected() {
    const ROOM: u32 = 80;
    let lengths = (0..=ROOM + 20).chain([1 << 20, u32::MAX - 1, u32::MAX]);
    for len in lengths {
        let (driver, mut fs, mut server) = connected();
        offer(&driver, 0, &request(GETATTR, 9, &[]), ROOM);
        fs.queue_ready(REQUESTS).unwrap();
        let mut sent = [0; REQUEST_HEADER];
        server.read_exact(&mut sent).unwrap();
        let number = u64::from_le_bytes(sent[8..16].try_into().unwrap());
        let body = vec![7; (len.min(ROOM + 20) as usize).saturating_sub(REPLY_HEADER)];
        let reply = [&reply_header(len, 0, number)[..], &body].concat();
        server.write_all(&reply).unwrap();
        fs.host_ready().unwrap();
        // The error that the device makes itself is a header alone.
        let fits = (16..=ROOM).contains(&len);
        let (expected, error) = if fits { (len, 0) } else { (16, -libc::EIO) };
        assert_eq!(driver.used(REQUESTS), [(0, expected)], "{len}");
        let header = reply_header(expected, error, 9);
        assert_eq!(driver.read(REPLY, REPLY_HEADER), header, "{len}");
        let guard = driver.read(REPLY + u64::from(ROOM), 64);
        assert_eq!(guard, [0xee; 64], "{len}");
    }
}
