// SPDX-License-Identifier: Apache-2.0
//! How the guest ends. The VMM watches I/O port 0x600: writing 1 there ends the machine in an orderly way, so no
//! ACPI is needed. [`crate::boot`] calls this after a fatal error, [`crate::service`] for `Shutdown`.

use rustix::system::{RebootCommand, reboot};

use crate::sys;

const POWER_PORT: u16 = 0x600;
const POWER_OFF: u8 = 1;

/// Powers off without syncing. Callers that have data to keep must sync it first.
pub fn off() -> ! {
    let _ = sys::write_port(POWER_PORT, POWER_OFF);
    // Only a VMM without that port gets here. It will notice a reset.
    let _ = reboot(RebootCommand::Restart);
    loop {
        std::thread::park();
    }
}

/// Writes to the console why this guest cannot go on, and powers it off.
pub fn fatal(message: &str) -> ! {
    eprintln!("bulkhead-agent: fatal: {message}");
    off()
}
