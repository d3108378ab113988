// SPDX-License-Identifier: Apache-2.0
//! How a file server says that shares may be mounted: a word on standard output, and nothing
//! more there. Main thread, once.

use std::io;

/// What is said.
pub const READY: &[u8] = b"ready\n";

pub fn announce() -> io::Result<()> {
    let output = rustix::stdio::stdout();
    if rustix::io::write(output, READY)? != READY.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    Ok(())
}
