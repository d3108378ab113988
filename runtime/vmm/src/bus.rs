// SPDX-License-Identifier: Apache-2.0
//! The bus: which device answers to a port or an MMIO address of the guest. Called on vCPU threads.

use std::io;
use std::sync::{Mutex, TryLockError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::bounded::bounded;
use crate::devices::mmio::{MmioTransport, SharedDevice, Turnless, lock};
use crate::devices::registers::SLOT_BYTES;
use crate::devices::saved::{Busy, Purpose, TransportRefused, TransportState};
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
/// Between two looks whether a device's turn is over.
const TURN_PAUSE: Duration = Duration::from_micros(200);

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
    /// Those of the slots.
    devices: Vec<SharedDevice>,
}

/// While it is there, no device has a turn.
#[allow(missing_debug_implementations)]
#[must_use]
pub struct Frozen<'a>(Vec<Turnless<'a>>);

impl Frozen<'_> {
    /// No device ever has a turn again: what is never unlocked is frozen.
    pub fn for_ever(self) {
        std::mem::forget(self);
    }
}

impl Bus {
    #[must_use]
    pub fn new(serial: SerialPort, transports: Vec<MmioTransport>) -> Self {
        Self {
            serial: Mutex::new(serial),
            devices: transports.iter().map(MmioTransport::device).collect(),
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

    /// Takes the state of all devices. Until what comes with it is dropped, no device has a turn: nothing changes the guest's
    /// memory, whatever happens on the host. Call it while no vCPU runs. A device whose turn is not over by then, because
    /// something on the host hangs, is busy.
    pub fn freeze(
        &self,
        purpose: Purpose,
        until: Instant,
    ) -> Result<(DeviceStates, Frozen<'_>), Busy> {
        let transports: Vec<_> = self.slots.iter().map(lock).collect();
        let named = self.devices.iter().zip(Slot::ALL);
        let turnless = named.map(|(device, slot)| turnless(device, slot.name(), until));
        let frozen = Frozen(turnless.collect::<Result<_, _>>()?);
        let both = transports.iter().zip(&frozen.0);
        let saved = both.map(|(transport, device)| transport.save(&**device, purpose));
        let transports = saved.collect::<Result<_, _>>()?;
        let serial = lock(&self.serial).save();
        Ok((DeviceStates { serial, transports }, frozen))
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

/// Locks a device between two of its turns.
fn turnless<'d>(
    device: &'d SharedDevice,
    name: &'static str,
    until: Instant,
) -> Result<Turnless<'d>, Busy> {
    loop {
        match device.try_lock() {
            Ok(locked) => return Ok(locked),
            Err(TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() >= until => {
                return Err(Busy {
                    device: name,
                    what: "a request that does not end",
                });
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(TURN_PAUSE),
        }
    }
}

fn serial_register(port: u16) -> u8 {
    u8::try_from(port.wrapping_sub(SERIAL_FIRST)).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::devices::registers::RegisterPage;
    use crate::devices::rng::Rng;
    use crate::memory::create;

    const LONG: Duration = Duration::from_secs(60);

    fn bus() -> Bus {
        let memory = Arc::new(create(1 << 20).unwrap());
        let transport = || {
            let device = Arc::new(Mutex::new(Rng::new(io::repeat(7), Arc::default())));
            MmioTransport::new(device, Arc::clone(&memory), RegisterPage::alone()).unwrap()
        };
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let serial = SerialPort::new(line, tempfile::tempfile().unwrap());
        Bus::new(serial, vec![transport(), transport()])
    }

    #[test]
    fn frozen_devices_have_no_turn_until_they_are_thawed() {
        let bus = bus();
        let soon = || Instant::now() + LONG;
        let (states, frozen) = bus.freeze(Purpose::Checkpoint, soon()).unwrap();
        assert_eq!(states.transports.len(), 2);
        let (sender, turns) = mpsc::channel();
        for device in bus.devices.clone() {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let _ = lock(&device).queue_ready(0);
                sender.send(()).unwrap();
            });
        }
        let short = Duration::from_millis(50);
        assert!(turns.recv_timeout(short).is_err(), "frozen");
        // The driver's side can be read meanwhile, and nothing is locked by it.
        bus.read(MMIO_BASE, &mut [0; 4]);
        drop(frozen);
        for _ in &bus.devices {
            turns.recv_timeout(LONG).expect("thawed");
        }
        let (again, frozen) = bus.freeze(Purpose::Template, soon()).unwrap();
        assert_eq!(again, states);
        frozen.for_ever();
        assert!(bus.devices.iter().all(|device| device.try_lock().is_err()));
    }

    #[test]
    fn a_device_whose_turn_does_not_end_is_named_and_the_others_go_on() {
        let bus = bus();
        let hangs = lock(&bus.devices[1]);
        let busy = bus.freeze(Purpose::Checkpoint, Instant::now()).err();
        let busy = busy.unwrap().to_string();
        assert_eq!(busy, "device net has a request that does not end");
        assert!(bus.devices[0].try_lock().is_ok());
        drop(hangs);
        assert!(bus.freeze(Purpose::Checkpoint, Instant::now()).is_ok());
    }
}
