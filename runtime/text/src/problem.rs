// SPDX-License-Identifier: Apache-2.0
//! Why this host cannot do something, and what its administrator can do about it.

use std::fmt;

/// A problem of the host. `bulkhead check` and the conditions of CRI's `Status` show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub cause: String,
    pub remedy: String,
}

impl Problem {
    pub fn new(cause: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            cause: cause.into(),
            remedy: remedy.into(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.cause, self.remedy)
    }
}
