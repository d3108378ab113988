// SPDX-License-Identifier: Apache-2.0
//! Frames of a driver, and frames for it. A socket pair is the wire.
//!
//! What reaches the host has a header that asks only for work that was negotiated.
#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use bulkhead_fuzz::chains::drive;
use bulkhead_fuzz::input::Input;
use bulkhead_vmm::config::MacAddress;
use bulkhead_vmm::devices::net::Net;

const HEADER_BYTES: usize = 12;
/// Each kind of segmentation with the feature that allows it (virtio 1.2, 5.1.3).
const SEGMENTS: [(u8, u64); 3] = [(1, 1 << 11), (4, 1 << 12), (5, 1 << 56)];
const CONGESTION: (u8, u64) = (0x80, 1 << 13);

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let features = input.u64();
    let (ours, wire) = UnixDatagram::pair().expect("a wire");
    ours.set_nonblocking(true).expect("our end");
    wire.set_nonblocking(true).expect("its end");
    let tap = File::from(OwnedFd::from(ours));
    let mut net = Net::new(
        Some(tap),
        MacAddress([2, 0, 0, 0, 0, 1]),
        1500,
        Default::default(),
    );
    drive(&mut net, features, &mut input, |_, _, input| {
        drain(&wire, features);
        let header = [0; HEADER_BYTES];
        let len = usize::from(input.u16());
        let frame = [&header[..], input.short(), &vec![7; len]].concat();
        let _ = wire.send(&frame);
    });
    drain(&wire, features);
});

fn drain(wire: &UnixDatagram, features: u64) {
    let mut frame = vec![0; 80 << 10];
    while let Ok(len) = wire.recv(&mut frame) {
        let frame = &frame[..len];
        assert!(len > HEADER_BYTES, "a frame without bytes");
        assert!(
            frame[0] == 0 || features & 1 != 0,
            "a checksum that was not negotiated"
        );
        let (kind, congestion) = (frame[1] & !CONGESTION.0, frame[1] & CONGESTION.0 != 0);
        let allowed = SEGMENTS
            .iter()
            .any(|&(one, feature)| one == kind && features & feature != 0);
        assert!(
            kind == 0 && !congestion || allowed,
            "segmentation that was not negotiated"
        );
        assert!(
            !congestion || features & CONGESTION.1 != 0,
            "congestion marks that were not negotiated"
        );
        let segment_bytes = u16::from_le_bytes([frame[4], frame[5]]);
        assert_eq!(kind == 0, segment_bytes == 0, "segments of no size");
        if frame[0] != 0 {
            let place = [[frame[6], frame[7]], [frame[8], frame[9]]].map(u16::from_le_bytes);
            let end = place.map(usize::from).iter().sum::<usize>() + 2;
            assert!(end <= len - HEADER_BYTES, "a checksum outside of the frame");
        }
    }
}
