// SPDX-License-Identifier: Apache-2.0
//! What a failure means to the caller, whatever caused it. The daemon turns these kinds into gRPC codes.

use std::io;

use bulkhead_text::{cut, one_line};

/// The most bytes of another party's text in a message.
const SHOWN_BYTES: usize = 500;

/// The kinds of failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// There is no such image in the store, or none in the registry.
    NotFound,
    /// The name, or something in the image, is not valid.
    Invalid,
    /// The registry asks for credentials, or does not accept those that it got.
    Unauthenticated,
    /// The registry accepts the credentials but refuses the request.
    Denied,
    /// The registry cannot be reached or does not work. Trying again later may help.
    Unavailable,
    /// The bytes do not match their digest.
    Corrupt,
    /// The disk is full.
    NoSpace,
    /// Our own fault.
    Internal,
}

impl FailureKind {
    /// The kind of an error with one of our own files.
    pub(crate) fn of_io(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            _ => Self::Internal,
        }
    }
}

/// Makes another party's text fit for a message: short, and on one line.
pub(crate) fn shorten(text: &str) -> String {
    cut(&one_line(text), SHOWN_BYTES).to_owned()
}
