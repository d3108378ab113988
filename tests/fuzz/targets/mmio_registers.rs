// SPDX-License-Identifier: Apache-2.0
//! Writes to the registers of a virtio-mmio transport, and turns of its device meanwhile, wherever the driver put the
//! rings.
//!
//! A driver sees only status bits that exist, and after a reset none. No feature is accepted that was not offered.
#![no_main]

use std::sync::{Arc, Mutex};

use bulkhead_fuzz::chains::{DATA, driver};
use bulkhead_fuzz::input::Input;
use bulkhead_vmm::devices::mmio::{MmioTransport, SharedDevice, lock};
use bulkhead_vmm::devices::rng::Rng;

const STATUS: u64 = 0x70;
const KNOWN: u32 = 0x80 | 0x40 | 8 | 4 | 2 | 1;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const MOST_STEPS: usize = 256;
/// The registers that a driver writes, in the order of a handshake.
const WRITTEN: [u64; 18] = [
    STATUS, 0x14, 0x24, 0x20, 0x30, 0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x44, 0x50, 0x64,
    0x100, 0x104, 0x0,
];

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // Only its memory is of use here: the queues are where the input puts them.
    let driver = driver();
    let device: SharedDevice = Arc::new(Mutex::new(Rng::new(std::io::repeat(7), Arc::default())));
    let registers = driver.registers.clone();
    let transport = MmioTransport::new(
        Arc::clone(&device),
        Arc::clone(&driver.memory),
        registers.clone(),
    );
    let mut transport = transport.expect("a transport");
    let mut input = Input::new(bytes);
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        match input.below(8) {
            0..=3 => {
                let which = usize::from(input.byte());
                let offset = WRITTEN
                    .get(which)
                    .copied()
                    .unwrap_or_else(|| input.u16().into());
                let value = match input.byte() {
                    255 => input.u32(),
                    small @ 128.. => u32::from(small - 128) << 12,
                    small => small.into(),
                };
                transport.write(offset, &value.to_le_bytes());
                if offset == STATUS && value == 0 {
                    assert_eq!(registers.word_at(STATUS), 0, "after a reset");
                }
            }
            4 => {
                let offset = input.u64();
                transport.write(offset, input.short());
            }
            5 => driver.write(DATA + u64::from(input.byte()) * 16, input.short()),
            6 => {
                let mut bytes = vec![0; usize::from(input.below(9))];
                transport.read(input.u64(), &mut bytes);
            }
            _ => {
                let mut device = lock(&device);
                if device.queue_ready(0).is_err() {
                    device.deactivate();
                    transport.interrupt().needs_reset();
                }
            }
        }
        let status = registers.word_at(STATUS);
        assert_eq!(status & !KNOWN, 0, "status {status:#x}");
        let is = |bit| status & bit != 0;
        assert!(!is(DRIVER_OK) || is(FEATURES_OK), "status {status:#x}");
    }
});
