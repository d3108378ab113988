// SPDX-License-Identifier: Apache-2.0
//! The descriptors that a process was started with.

use std::fs::File;
use std::io;

use crate::{JailError, failed, sys};

/// Takes ownership of a descriptor that the parent passed on purpose.
pub fn inherited(fd: i32) -> io::Result<File> {
    sys::inherited(fd)
}

/// Closes all descriptors from this number on.
pub fn close_from(first: u32) -> Result<(), JailError> {
    sys::close_from(first).map_err(failed("close what was not passed on purpose"))
}
