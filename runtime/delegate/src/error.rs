// SPDX-License-Identifier: Apache-2.0
//! Why a call to a delegate failed.

use std::error::Error;
use std::iter::successors;
use std::time::Duration;

use bulkhead_text::{cut, one_line};
use tonic::{Code, Status};

/// The longest message of a delegate that is shown.
const MESSAGE_BYTES: usize = 4096;

/// Why a call failed. Its text names the delegate.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DelegateError {
    #[error("the delegate {name} is down: {why}: start it, then try again")]
    Down { name: String, why: String },
    #[error("the delegate {name} did not answer within {limit:?}")]
    Slow { name: String, limit: Duration },
    /// The server's own answer.
    #[error("{}", .0.message())]
    Refused(Status),
}

impl DelegateError {
    /// Tells a broken connection from an error that the server answered.
    pub(crate) fn of(name: &str, status: &Status) -> Self {
        match status.source() {
            // Only an error of this side has a cause. One that came over the wire is a code and a message.
            Some(cause) => Self::Down {
                name: name.to_owned(),
                why: bounded(&root(cause).to_string()),
            },
            None => Self::Refused(Status::new(status.code(), bounded(status.message()))),
        }
    }

    /// The code with which the server refused.
    pub fn refusal(&self) -> Option<Code> {
        match self {
            Self::Refused(status) => Some(status.code()),
            Self::Down { .. } | Self::Slow { .. } => None,
        }
    }
}

impl From<DelegateError> for Status {
    fn from(error: DelegateError) -> Self {
        let code = match &error {
            DelegateError::Down { .. } => Code::Unavailable,
            // What was asked for may still happen.
            DelegateError::Slow { .. } => Code::DeadlineExceeded,
            DelegateError::Refused(status) => status.code(),
        };
        Self::new(code, error.to_string())
    }
}

/// The first cause of an error. What is above it in tonic's errors repeats it.
fn root<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    successors(Some(error), |&error| error.source())
        .last()
        .unwrap_or(error)
}

/// A delegate's text, printable on one line and not too long.
pub fn bounded(text: &str) -> String {
    cut(&one_line(text), MESSAGE_BYTES).to_owned()
}
