// SPDX-License-Identifier: Apache-2.0
//! What a failure means to who asked, whatever its cause; one step from a gRPC code.

use std::io;

use bulkhead_text::{cut, one_line};

/// The most of a stranger's words that stands in a message.
const SHOWN_BYTES: usize = 500;

/// Kinds of failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// No such image, here or there.
    NotFound,
    /// The name, or what the image says, cannot be.
    Invalid,
    /// The registry wants to know who asks.
    Unauthenticated,
    /// The registry knows who asks and says no.
    Denied,
    /// The registry cannot be reached or does not work; later may be better.
    Unavailable,
    /// The bytes are not the ones that their digest promises.
    Corrupt,
    /// No room for it.
    NoSpace,
    /// Our own fault.
    Internal,
}

impl FailureKind {
    /// Of an error of a file of ours.
    pub(crate) fn of_io(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            _ => Self::Internal,
        }
    }
}

/// What a stranger wrote, made fit for a message: short and on one line.
pub(crate) fn shorten(text: &str) -> String {
    cut(&one_line(text), SHOWN_BYTES).to_owned()
}
