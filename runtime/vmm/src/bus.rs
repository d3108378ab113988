// SPDX-License-Identifier: Apache-2.0
//! The bus: which device answers to a port or an MMIO address of the guest. Called on vCPU threads.

use std::io;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::bounded::bounded;
use crate::devices::mmio::{MmioTransport, lock};
use crate::devices::registers::SLOT_BYTES;
use crate::devices::saved::{Busy, TransportRefused, TransportState};
use crate::devices::serial::{SerialPort, SerialRegisters};
use crate::report::{ExitReason, Outcome};
use crate::slot::{MMIO_BASE, Slot};

/// The serial port's interrupt line. The lines of the virtio devices are in [`crate::slot`].
pub const SERIAL_IRQ: u32 = 4;

const SERIAL_FIRST: u16 = 0x3f8;
const SERIAL_LAST: u16 = 0x3ff;
/// Status and command port of a PC's keyboard controller; one of its commands resets the machine.
const KEYBOARD_CONTROL: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
/// The guest's agent writes [`POWER_OFF`] to this port to end the VM.
const POWER: u16 = 0x600;
const POWER_OFF: u8 = 1;

/// What a write did to the VM.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    None,
    End(Outcome),
}

/// The state of all devices of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStates {
    pub(crate) serial: SerialRegisters,
    #[serde(deserialize_with = "bounded::<{ Slot::ALL.len() }, _, _>")]
    pub(crate) transports: Vec<TransportState>,
}

/// Why devices cannot go on from a state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("serial port")]
    Serial(#[source] io::Error),
    #[error("the state has {found} devices, this VMM {here}")]
    Devices { found: usize, here: usize },
    #[error("device {device}")]
    Device {
        device: &'static str,
        source: TransportRefused,
    },
}

/// All devices of a VM, with their transports in the order of [`crate::slot`].
#[allow(missing_debug_implementations)]
pub struct Bus {
    serial: Mutex<SerialPort>,
    slots: Vec<Mutex<MmioTransport>>,
}

impl Bus {
    #[must_use]
    pub fn new(serial: SerialPort, transports: Vec<MmioTransport>) -> Self {
        Self {
            serial: Mutex::new(serial),
            slots: transports.into_iter().map(Mutex::new).collect(),
        }
    }

    pub fn port_out(&self, port: u16, data: &[u8]) -> Effect {
        match (port, data) {
            (SERIAL_FIRST..=SERIAL_LAST, data) => {
                let mut serial = lock(&self.serial);
                for &byte in data {
                    serial.write(serial_register(port), byte);
                }
                Effect::None
            }
            (POWER, [POWER_OFF, ..]) => Effect::End(Outcome::new(ExitReason::GuestShutdown, "")),
            (KEYBOARD_CONTROL, [KEYBOARD_RESET, ..]) => {
                Effect::End(Outcome::new(ExitReason::GuestReset, ""))
            }
            _ => Effect::None,
        }
    }

    pub fn port_in(&self, port: u16, data: &mut [u8]) {
        match port {
            SERIAL_FIRST..=SERIAL_LAST => {
                let mut serial = lock(&self.serial);
                for byte in data {
                    *byte = serial.read(serial_register(port));
                }
            }
            // Input buffer empty, ready for a command: a kernel waits for this before it resets.
            KEYBOARD_CONTROL => data.fill(0),
            _ => data.fill(0xff),
        }
    }

    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.slot(address) {
            Some((slot, offset)) => lock(slot).read(offset, data),
            None => data.fill(0xff),
        }
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.slot(address) {
            lock(slot).write(offset, data);
        }
    }

    fn slot(&self, address: u64) -> Option<(&Mutex<MmioTransport>, u64)> {
        let relative = address.checked_sub(MMIO_BASE)?;
        let index = usize::try_from(relative / SLOT_BYTES).ok()?;
        Some((self.slots.get(index)?, relative % SLOT_BYTES))
    }

    /// Takes the state of all devices. If that succeeds, no device has a turn any more: nothing changes the guest's memory
    /// from now on, whatever happens on the host. Call it while no vCPU runs.
    pub fn freeze(&self) -> Result<DeviceStates, Busy> {
        let transports: Vec<_> = self.slots.iter().map(lock).collect();
        let saved = transports.iter().map(|transport| transport.save());
        let saved: Vec<_> = saved.collect::<Result<_, _>>()?;
        let serial = lock(&self.serial).save();
        let (transports, guards): (Vec<_>, Vec<_>) = saved.into_iter().unzip();
        // What is never unlocked is frozen.
        guards.into_iter().for_each(std::mem::forget);
        Ok(DeviceStates { serial, transports })
    }

    /// Lets devices that no driver has touched go on where others were frozen.
    pub fn restore(&self, states: &DeviceStates) -> Result<(), RestoreError> {
        let serial = lock(&self.serial).restore(&states.serial);
        serial.map_err(RestoreError::Serial)?;
        let (found, here) = (states.transports.len(), self.slots.len());
        if found != here {
            return Err(RestoreError::Devices { found, here });
        }
        let both = self.slots.iter().zip(&states.transports);
        for (slot, (transport, state)) in Slot::ALL.into_iter().zip(both) {
            let restored = lock(transport).restore(state);
            restored.map_err(|source| RestoreError::Device {
                device: slot.name(),
                source,
            })?;
        }
        Ok(())
    }

    /// Ends the console log; returns the kernel's panic line, if there is one.
    pub fn finish_console(&self) -> Option<String> {
        lock(&self.serial).finish()
    }
}

fn serial_register(port: u16) -> u8 {
    u8::try_from(port.wrapping_sub(SERIAL_FIRST)).unwrap_or(u8::MAX)
}
