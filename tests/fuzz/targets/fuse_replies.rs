// SPDX-License-Identifier: Apache-2.0
//! Replies of a file server that is hostile, to requests that are good.
//!
//! A reply reaches only the request that it is for, carries the guest's own number, and never more than its room.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use bulkhead_fuzz::chains::{DATA, driver};
use bulkhead_fuzz::input::Input;
use bulkhead_share::fuse::{REPLY_HEADER, REQUEST_HEADER, reply_header};
use bulkhead_vmm::devices::VirtioDevice;
use bulkhead_vmm::devices::driver::{Driver, NEXT, WRITE};
use bulkhead_vmm::devices::fs::Fs;

const REQUESTS: usize = 1;
const GETATTR: u32 = 3;
/// Each request has a part of memory for itself: the request, and the room for its reply.
const PART_BYTES: u64 = 0x1000;
const ROOM: u64 = 0x800;
const ROOM_BYTES: u32 = 80;
/// Stands behind the room, and must stay.
const GUARD: [u8; 256] = [0xee; 256];
const FIRST_NUMBER: u64 = 4711;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let driver = driver();
    let mut fs = Fs::new(Default::default()).expect("a device");
    let (ours, mut server) = UnixStream::pair().expect("a socket pair");
    server
        .set_nonblocking(true)
        .expect("a socket that does not wait");
    fs.connect(ours).expect("the first server");
    driver.activate(&mut fs, 0);
    let count = u16::from(input.below(8)) + 1;
    for number in 0..count {
        ask(&driver, number);
    }
    fs.queue_ready(REQUESTS).expect("good requests");
    let mut sent = vec![0; REQUEST_HEADER * usize::from(count)];
    server.read_exact(&mut sent).expect("all of them");
    let numbers: Vec<u64> = sent
        .chunks(REQUEST_HEADER)
        .map(|request| u64::from_le_bytes(request[8..16].try_into().expect("eight bytes")))
        .collect();
    let mut answered = 0;
    while !input.is_empty() {
        let _ = match input.below(4) {
            0 => server.write_all(input.short()),
            _ => {
                let which = usize::from(input.byte());
                let number = numbers.get(which).copied().unwrap_or_else(|| input.u64());
                let len = u32::from(input.byte());
                let error = i32::from(input.byte());
                let header = reply_header(len, -error, number);
                let body = usize::try_from(len)
                    .expect("a length")
                    .saturating_sub(REPLY_HEADER);
                server.write_all(&[&header[..], &vec![7; body]].concat())
            }
        };
        fs.host_ready().expect("no fault of the guest");
        answered += check(&driver, count);
    }
    drop(server);
    fs.host_ready().expect("no fault of the guest");
    answered += check(&driver, count);
    assert_eq!(
        answered,
        usize::from(count),
        "after the server's end, nobody waits"
    );
});

fn part(number: u16) -> u64 {
    DATA + u64::from(number) * PART_BYTES
}

fn ask(driver: &Driver, number: u16) {
    let len = u32::try_from(REQUEST_HEADER).expect("a length");
    let mut request = vec![0; REQUEST_HEADER];
    request[..4].copy_from_slice(&len.to_le_bytes());
    request[4..8].copy_from_slice(&GETATTR.to_le_bytes());
    request[8..16].copy_from_slice(&(FIRST_NUMBER + u64::from(number)).to_le_bytes());
    driver.write(part(number), &request);
    driver.write(part(number) + ROOM + u64::from(ROOM_BYTES), &GUARD);
    let chain = [
        (part(number), len, NEXT, number * 2 + 1),
        (part(number) + ROOM, ROOM_BYTES, WRITE, 0),
    ];
    driver.offer(REQUESTS, number * 2, &chain);
}

/// Looks at the replies that came. Returns how many there are.
fn check(driver: &Driver, count: u16) -> usize {
    let used = driver.used(REQUESTS);
    for &(head, len) in &used {
        let number = u16::try_from(head / 2).expect("a chain");
        assert!(
            number < count && head % 2 == 0,
            "chain {head} was not offered"
        );
        assert!((16..=ROOM_BYTES).contains(&len), "a reply of {len} bytes");
        let header = driver.read(part(number) + ROOM, REPLY_HEADER);
        assert_eq!(header[..4], len.to_le_bytes());
        assert_eq!(
            header[8..],
            (FIRST_NUMBER + u64::from(number)).to_le_bytes()
        );
    }
    for number in 0..count {
        let guard = driver.read(part(number) + ROOM + u64::from(ROOM_BYTES), GUARD.len());
        assert_eq!(guard, GUARD, "request {number}");
    }
    used.len()
}
