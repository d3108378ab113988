// SPDX-License-Identifier: Apache-2.0
//! A hostile driver of one virtio device: writes anything into its memory, offers any descriptor chains, notifies, resets,
//! and lies about how many chains there are.
//!
//! Whatever it does, the device returns, soon. A broken ring is an error, after which the device is reset, as its worker
//! does it. What the rings contain proves nothing, because the driver can let the device write into them.

use bulkhead_vmm::devices::Turn;
use std::sync::{Arc, OnceLock};

use bulkhead_vmm::devices::VirtioDevice;
use bulkhead_vmm::devices::driver::{Driver, INDIRECT, MEMORY_BYTES, NEXT, Piece, WRITE};
use bulkhead_vmm::devices::registers::RegisterPage;
use bulkhead_vmm::devices::ring::RingError;
use bulkhead_vmm::memory::{self, Memory};

use crate::input::Input;

/// Where the driver has its data: behind the queues.
pub const DATA: u64 = 0x10_0000;
/// The registers, and the configuration space as far as devices use it.
const REGISTER_BYTES: u64 = 0x200;
/// The steps of one run. More would only make runs slow.
const MOST_STEPS: usize = 64;

/// A driver in memory of zeroes.
#[must_use]
pub fn driver() -> Driver {
    static PLACES: OnceLock<(Arc<Memory>, RegisterPage)> = OnceLock::new();
    let make = || {
        let memory = memory::create(MEMORY_BYTES).expect("guest memory");
        (Arc::new(memory), RegisterPage::alone())
    };
    let (memory, registers) = PLACES.get_or_init(make);
    memory::release(memory, 0, MEMORY_BYTES).expect("guest memory");
    for offset in (0..REGISTER_BYTES).step_by(4) {
        registers.show(offset, 0);
    }
    Driver::over(Arc::clone(memory), registers.clone())
}

/// Lets the driver do what the input says. For the step that is not the driver's, `host` is called.
pub fn drive<D: VirtioDevice>(
    device: &mut D,
    features: u64,
    input: &mut Input<'_>,
    mut host: impl FnMut(&mut D, &Driver, &mut Input<'_>),
) {
    let driver = driver();
    let queues = device.queue_sizes().len();
    driver.activate(device, features);
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        match input.below(8) {
            0 => {
                let at = DATA + u64::from(input.byte()) * 0x100;
                driver.write(at, input.short());
            }
            1 => offer(&driver, queues, input),
            2 => {
                // One more than there are.
                let queue = usize::from(input.byte()) % (queues + 1);
                let turn = device.queue_ready(queue);
                settle(device, turn);
            }
            3 => {
                let turn = device.host_ready();
                settle(device, turn);
            }
            4 => driver.claim(usize::from(input.byte()) % queues, input.u16()),
            5 => {
                device.deactivate();
                driver.activate(device, features);
            }
            6 => {
                let offset = input.byte().into();
                device.write_config(offset, input.short());
                assert!(
                    device.config().len() <= 256,
                    "the configuration space stays small"
                );
            }
            _ => host(device, &driver, input),
        }
    }
    device.deactivate();
}

/// What a worker does after a turn.
fn settle(device: &mut dyn VirtioDevice, turn: Result<Turn, RingError>) {
    if turn.is_err() {
        device.deactivate();
    }
}

/// Writes a chain of up to eight descriptors and puts it on a queue.
fn offer(driver: &Driver, queues: usize, input: &mut Input<'_>) {
    let queue = usize::from(input.byte()) % queues;
    let first = u16::from(input.below(16));
    let count = u16::from(input.below(8)) + 1;
    let chain: Vec<Piece> = (0..count)
        .map(|number| piece(first, number, count, input))
        .collect();
    driver.offer(queue, first, &chain);
}

/// A descriptor. One byte says of what form it is: whether the device writes to it, whether it leads to a table, whether
/// its successor is the next one or any, how its length is told (2 bits), and how its address is (2 bits).
fn piece(first: u16, number: u16, count: u16, input: &mut Input<'_>) -> Piece {
    let form = input.byte();
    let address = match form >> 5 & 3 {
        0 => DATA + u64::from(input.byte()) * 0x100,
        1 => MEMORY_BYTES - u64::from(input.byte()),
        2 => u64::from(input.u32()),
        _ => input.u64(),
    };
    let len = match form >> 3 & 3 {
        0 => input.byte().into(),
        1 => input.u16().into(),
        2 => 0x1000,
        _ => input.u32(),
    };
    let flag = |bit: u8, flag: u16| if form & bit != 0 { flag } else { 0 };
    let flags = flag(1, WRITE) | flag(2, INDIRECT);
    let next = first + number + 1;
    match form & 4 != 0 {
        true => (address, len, flags | NEXT, input.byte().into()),
        false if number + 1 < count => (address, len, flags | NEXT, next),
        false => (address, len, flags, 0),
    }
}
