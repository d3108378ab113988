// SPDX-License-Identifier: Apache-2.0
//! Frames through mock queues, with a socket pair in place of the TAP.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use super::*;
use crate::devices::driver::{Driver, INDIRECT, NEXT, WRITE};

const DATA: u64 = 0x20_0000;
const MAC: MacAddress = MacAddress([2, 1, 2, 3, 4, 5]);
const FRAME: [u8; 60] = [9; 60];

/// A device, and the socket at the other end of its wire.
fn net(driver: &Driver, features: u64) -> (Net, UnixDatagram) {
    let (ours, wire) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    wire.set_nonblocking(true).unwrap();
    let tap = File::from(OwnedFd::from(ours));
    let mut net = Net::new(Some(tap), MAC, 1500, Arc::default());
    driver.activate(&mut net, features);
    (net, wire)
}

fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER_BYTES][..], frame].concat()
}

#[test]
fn a_frame_goes_out_however_it_is_cut() {
    let driver = Driver::new();
    let (mut net, wire) = net(&driver, 0);
    driver.write(DATA, &with_header(&FRAME));
    let len = u32::try_from(HEADER_BYTES + FRAME.len()).unwrap();
    driver.offer(TX, 0, &[(DATA, len, 0, 0)]);
    driver.offer(TX, 1, &[(DATA, 7, NEXT, 2), (DATA + 7, len - 7, 0, 0)]);
    assert_eq!(net.queue_ready(TX).unwrap(), Turn::Idle);
    assert_eq!(driver.used(TX), [(0, 0), (1, 0)]);
    for _ in 0..2 {
        let mut buffer = [0; 2000];
        let got = wire.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..got], with_header(&FRAME));
    }
}

#[test]
fn a_frame_that_makes_no_sense_is_dropped_and_its_chain_comes_back() {
    let driver = Driver::new();
    let (mut net, wire) = net(&driver, 0);
    for (case, piece) in [
        ("header only", (DATA, 12, 0, 0)),
        ("too large", (DATA, 70_000, 0, 0)),
        ("outside of memory", (1 << 40, 100, 0, 0)),
        ("writable", (DATA, 100, WRITE, 0)),
    ] {
        driver.offer(TX, 0, &[piece]);
        assert_eq!(net.queue_ready(TX).unwrap(), Turn::Idle, "{case}");
        assert_eq!(driver.used(TX), [(0, 0)], "{case}");
        assert!(wire.recv(&mut [0; 16]).is_err(), "{case} was sent");
    }
    assert!(net.queue_ready(5).is_err(), "there is no such queue");
}

#[test]
fn frames_come_in_once_there_is_room() {
    let driver = Driver::new();
    let (mut net, wire) = net(&driver, 0);
    wire.send(&with_header(&FRAME)).unwrap();
    assert_eq!(net.host_ready().unwrap(), Turn::Idle);
    assert!(driver.used(RX).is_empty());
    driver.offer(
        RX,
        0,
        &[(DATA, 12, NEXT | WRITE, 1), (DATA + 0x1000, 1518, WRITE, 0)],
    );
    assert_eq!(net.queue_ready(RX).unwrap(), Turn::Idle);
    assert_eq!(driver.used(RX), [(0, 72)]);
    assert_eq!(driver.read(DATA + 10, 2), [1, 0], "one buffer was used");
    assert_eq!(driver.read(DATA + 0x1000, 60), FRAME);
    assert_eq!(driver.interrupt_status(), 1);
}

#[test]
fn a_large_frame_fills_several_buffers_and_says_how_many() {
    let driver = Driver::new();
    let (mut net, wire) = net(&driver, F_MRG_RXBUF);
    for index in 0..4 {
        driver.offer(
            RX,
            index,
            &[(DATA + u64::from(index) * 0x1000, 512, WRITE, 0)],
        );
    }
    let frame: Vec<u8> = (0..1300u32)
        .map(|n| u8::try_from(n % 251).unwrap())
        .collect();
    wire.send(&with_header(&frame)).unwrap();
    assert_eq!(net.host_ready().unwrap(), Turn::Idle);
    assert_eq!(driver.used(RX), [(0, 512), (1, 512), (2, 288)]);
    assert_eq!(driver.read(DATA + 10, 2), [3, 0]);
    let parts = [
        driver.read(DATA + 12, 500),
        driver.read(DATA + 0x1000, 512),
        driver.read(DATA + 0x2000, 288),
    ];
    assert_eq!(parts.concat(), frame);
}

#[test]
fn a_segment_of_64_kib_goes_out_and_comes_in_whole() {
    let driver = Driver::new();
    let features = F_MRG_RXBUF
        | offload::F_CSUM
        | offload::F_GUEST_CSUM
        | offload::F_HOST_TSO4
        | offload::F_GUEST_TSO4;
    let (mut net, wire) = net(&driver, features);
    let mut header = [0; HEADER_BYTES];
    header[..10].copy_from_slice(&[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
    let frame: Vec<u8> = (0..65_549u32)
        .map(|n| u8::try_from(n % 251).unwrap())
        .collect();
    driver.write(DATA, &header);
    driver.write(DATA + 0x1000, &frame);
    let len = u32::try_from(frame.len()).unwrap();
    driver.offer(TX, 0, &[(DATA, 12, NEXT, 1), (DATA + 0x1000, len, 0, 0)]);
    assert_eq!(net.queue_ready(TX).unwrap(), Turn::Idle);
    let mut sent = vec![0; 70_000];
    let got = wire.recv(&mut sent).unwrap();
    assert_eq!(sent[..got], [&header[..], &frame[..]].concat());

    for index in 0..4 {
        let at = DATA + 0x10_0000 + u64::from(index) * 0x4000;
        driver.offer(RX, index, &[(at, 0x4000, WRITE, 0)]);
    }
    wire.send(&sent[..got]).unwrap();
    assert_eq!(net.host_ready().unwrap(), Turn::Idle);
    assert_eq!(driver.used(RX), [], "64 KiB hold no header and 64 KiB");
    driver.offer(RX, 4, &[(DATA + 0x11_0000, 0x4000, WRITE, 0)]);
    assert_eq!(net.queue_ready(RX).unwrap(), Turn::Idle);
    let full = 0x4000;
    assert_eq!(
        driver.used(RX),
        [(0, full), (1, full), (2, full), (3, full), (4, 25)]
    );
    let whole = driver.read(DATA + 0x10_0000, got);
    assert_eq!(whole[..10], header[..10]);
    assert_eq!(whole[10..12], [5, 0]);
    assert_eq!(whole[12..], frame);
}

#[test]
fn headers_that_ask_for_what_was_not_negotiated_do_not_reach_the_host() {
    let driver = Driver::new();
    let (mut net, wire) = net(&driver, offload::F_CSUM);
    let mut count = 0;
    for (case, header) in [
        ("segments", [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0]),
        ("fragments of UDP", [1, 3, 42, 0, 100, 0, 34, 0, 6, 0, 0, 0]),
        (
            "checksum outside",
            [1, 0, 0, 0, 0, 0, 255, 255, 16, 0, 0, 0],
        ),
    ] {
        driver.write(DATA, &[&header[..], &FRAME].concat());
        driver.offer(TX, 0, &[(DATA, 72, 0, 0)]);
        assert_eq!(net.queue_ready(TX).unwrap(), Turn::Idle, "{case}");
        assert_eq!(driver.used(TX), [(0, 0)], "{case}");
        assert!(wire.recv(&mut [0; 16]).is_err(), "{case} was sent");
        count += 1;
        assert_eq!(net.counters.snapshot().failures, count, "{case}");
    }
    let sane = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 9, 9];
    driver.write(DATA, &[&sane[..], &FRAME].concat());
    driver.offer(TX, 0, &[(DATA, 72, 0, 0)]);
    assert_eq!(net.queue_ready(TX).unwrap(), Turn::Idle);
    let mut sent = [0; 72];
    assert_eq!(wire.recv(&mut sent).unwrap(), 72);
    assert_eq!(sent[..12], [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0]);
}

#[test]
fn receive_chains_without_room_come_back_unused() {
    let driver = Driver::new();
    let (mut net, wire) = net(&driver, 0);
    wire.send(&with_header(&FRAME)).unwrap();
    driver.offer(RX, 0, &[(DATA, 100, 0, 0)]);
    driver.offer(RX, 1, &[(1 << 40, 2000, WRITE, 0)]);
    driver.offer(RX, 2, &[(DATA, 12, WRITE, 0)]);
    driver.offer(RX, 3, &[(DATA, 2000, WRITE, 0)]);
    assert_eq!(net.host_ready().unwrap(), Turn::Idle);
    assert_eq!(driver.used(RX), [(0, 0), (1, 0), (2, 0), (3, 72)]);
}

#[test]
fn without_a_tap_the_link_is_down_and_what_is_sent_is_gone() {
    let driver = Driver::new();
    let mut net = Net::new(None, MAC, 1400, Arc::default());
    driver.activate(&mut net, 0);
    driver.write(DATA, &with_header(&FRAME));
    driver.offer(TX, 0, &[(DATA, 72, 0, 0)]);
    driver.offer(RX, 0, &[(DATA, 2000, WRITE, 0)]);
    assert_eq!(net.queue_ready(TX).unwrap(), Turn::Idle);
    assert_eq!(net.queue_ready(RX).unwrap(), Turn::Idle);
    assert_eq!(driver.used(TX), [(0, 0)]);
    assert!(driver.used(RX).is_empty());
    assert_eq!(net.config(), [2, 1, 2, 3, 4, 5, 0, 0, 1, 0, 0x78, 5]);
}

#[test]
fn what_a_driver_offers_for_frames_is_bounded() {
    const TABLE: u64 = 0x100_0000;
    let driver = Driver::new();
    let (mut net, wire) = net(&driver, F_MRG_RXBUF | offload::GUEST_SEGMENTS);
    wire.send(&with_header(&FRAME)).unwrap();
    let table = (TABLE, u32::from(u16::MAX) * 16, INDIRECT, 0);
    // Only readable buffers, which a frame cannot use: they are not looked at for ever either.
    driver.indirect(TABLE, u16::MAX, (DATA, 4096, 0));
    driver.offer(RX, 0, &[table]);
    assert_eq!(net.host_ready().unwrap(), Turn::Idle);
    assert_eq!(driver.used(RX), [(0, 0)]);
    // The same chain again and again, before it has come back: too small for a frame, in any number.
    driver.offer(RX, 1, &[(DATA, 13, WRITE, 0)]);
    for _ in 0..MOST_WAITING * 2 {
        net.queue_ready(RX).unwrap();
        driver.offer(RX, 1, &[(DATA, 13, WRITE, 0)]);
    }
    assert_eq!(net.waiting.len(), MOST_WAITING);
    assert_eq!(driver.used(RX), []);
}

#[test]
fn chains_without_room_end_a_turn_when_they_are_many() {
    let driver = Driver::new();
    let (mut net, _wire) = net(&driver, 0);
    // Each chain has 64 buffers, the most, and room for nothing but a header.
    let table = 0x100_0000;
    driver.indirect(table, 64, (DATA, 0, WRITE));
    for _ in 0..8 {
        driver.offer(RX, 0, &[(table, 64 * 16, INDIRECT, 0)]);
    }
    let mut active = net.active.take().unwrap();
    let mut budget = BUDGET;
    // One is for the chain itself.
    budget.spend_buffers(budget.buffers_left() - 5 * (64 + 1));
    let end = net.collect(&mut active, &mut budget).unwrap();
    assert_eq!(end, Some(Turn::More));
    assert_eq!(driver.used(RX).len(), 5, "the rest has to wait");
    let end = net.collect(&mut active, &mut BUDGET.clone()).unwrap();
    assert_eq!(end, Some(Turn::Idle));
    assert_eq!(driver.used(RX).len(), 3);
}

#[test]
fn frames_that_are_cut_into_thousands_do_not_reach_the_host() {
    let driver = Driver::new();
    let (mut net, wire) = net(&driver, offload::F_CSUM | offload::F_HOST_TSO4);
    let header = [1, 1, 54, 0, 1, 0, 34, 0, 16, 0, 0, 0];
    driver.write(DATA, &[&header[..], &FRAME].concat());
    driver.offer(TX, 0, &[(DATA, 72, 0, 0)]);
    assert_eq!(net.queue_ready(TX).unwrap(), Turn::Idle);
    assert_eq!(driver.used(TX), [(0, 0)]);
    assert!(wire.recv(&mut [0; 16]).is_err());
    assert_eq!(net.counters.snapshot().failures, 1);
}
