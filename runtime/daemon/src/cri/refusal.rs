// SPDX-License-Identifier: Apache-2.0
//! Why a request is refused: something is missing, impossible, or not supported by this version.

use bulkhead_cdi::{CdiError, NameError};

use crate::config::HANDLER;

/// The names of this runtime's handlers. kubelet sends the empty one for pods without a RuntimeClass.
pub const HANDLERS: [&str; 2] = ["", HANDLER];

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{what} {value:?} is not possible")]
    Wrong { what: &'static str, value: String },
    #[error(
        "the host's {what} was asked for: a pod has a kernel of its own and cannot share it; schedule it with \
         another RuntimeClass"
    )]
    NotIsolated { what: &'static str },
    #[error("runtime handler {0:?} is not one of this runtime's handlers: {HANDLERS:?}")]
    Handler(String),
    #[error("{what} {value:?} is not supported by this version")]
    NotYet { what: &'static str, value: String },
    #[error(transparent)]
    CdiName(#[from] NameError),
    #[error(transparent)]
    Cdi(#[from] CdiError),
    /// Something that a CDI device would add.
    #[error("{of}")]
    CdiEdit { of: String, source: Box<ParseError> },
    #[error("read seccomp profile {path}")]
    Profile {
        path: String,
        source: std::io::Error,
    },
}

/// The error for a `value` of `what` that is impossible.
pub fn wrong(what: &'static str, value: impl ToString) -> ParseError {
    ParseError::Wrong {
        what,
        value: value.to_string(),
    }
}

/// The error for a `value` of `what` that a later version may support.
pub fn not_yet(what: &'static str, value: impl ToString) -> ParseError {
    ParseError::NotYet {
        what,
        value: value.to_string(),
    }
}

/// Refuses a runtime handler that is not ours.
pub fn check_handler(handler: &str) -> Result<(), ParseError> {
    if HANDLERS.contains(&handler) {
        return Ok(());
    }
    Err(ParseError::Handler(handler.to_owned()))
}
