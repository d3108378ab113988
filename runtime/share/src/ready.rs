// SPDX-License-Identifier: Apache-2.0
//! How a file server reports that shares may be mounted: it writes one word to standard output, and
//! nothing else ever. Main thread, once.

use std::io;

/// The word and a newline.
pub const READY: &[u8] = b"ready\n";

pub fn announce() -> io::Result<()> {
    let output = rustix::stdio::stdout();
    if rustix::io::write(output, READY)? != READY.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    Ok(())
}
