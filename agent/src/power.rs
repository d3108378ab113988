// SPDX-License-Identifier: Apache-2.0
//! How the guest ends. The VMM watches I/O port 0x600: a 1 written there is an orderly end of the
//! machine, so no ACPI is needed. Neighbours: [`crate::boot`] ends here on a fatal error,
//! [`crate::service`] on `Shutdown`.

use rustix::system::{RebootCommand, reboot};

use crate::sys;

const POWER_PORT: u16 = 0x600;
const POWER_OFF: u8 = 1;

/// Syncs nothing: callers that have data to keep sync it first.
pub fn off() -> ! {
    let _ = sys::write_port(POWER_PORT, POWER_OFF);
    // Only a VMM without the port gets here: a reset is what it will notice.
    let _ = reboot(RebootCommand::Restart);
    loop {
        std::thread::park();
    }
}

/// Says on the console why this guest cannot go on, and powers it off.
pub fn fatal(message: &str) -> ! {
    eprintln!("bulkhead-agent: fatal: {message}");
    off()
}
