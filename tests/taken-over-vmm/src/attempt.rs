// SPDX-License-Identifier: Apache-2.0
//! One thing that a VMM which was taken over might try, and what the jail answers to it.

use std::fmt;

use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::world::{Tried, World};

/// How an attempt ends without a list of system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Refused with this number of errno(3).
    No(i32),
    /// It did what it was for.
    Works,
    /// It went well and found nothing.
    Nothing,
    /// This signal ended it.
    Signal(i32),
}

impl From<Tried> for Answer {
    fn from(tried: Tried) -> Self {
        match tried {
            Ok(true) => Self::Works,
            Ok(false) => Self::Nothing,
            Err(errno) => Self::No(errno),
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::No(errno) => write!(f, "{:?}", Errno::from_raw(*errno)),
            Self::Works => f.write_str("works"),
            Self::Nothing => f.write_str("nothing there"),
            Self::Signal(number) => match Signal::try_from(*number) {
                Ok(signal) => f.write_str(signal.as_str()),
                Err(_) => write!(f, "signal {number}"),
            },
        }
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Attempt {
    /// Unique, in the words of the threat model.
    pub name: &'static str,
    /// Each of these is right: which one it is depends on the kernel and its settings.
    pub may: &'static [Answer],
    /// If it may work: why that harms nobody. Empty otherwise.
    pub harmless: &'static str,
    /// Whether it needs a VM of its process.
    pub has_vm: bool,
    /// Whether the daemon hears of it, and then ends the VM soon.
    pub is_heard: bool,
    pub run: fn(&World) -> Tried,
}

impl Attempt {
    /// An attempt that must fail.
    pub const fn refused(
        name: &'static str,
        may: &'static [Answer],
        run: fn(&World) -> Tried,
    ) -> Self {
        Self::harmless(name, may, "", run)
    }

    /// An attempt that may work, because it harms nobody.
    pub const fn harmless(
        name: &'static str,
        may: &'static [Answer],
        harmless: &'static str,
        run: fn(&World) -> Tried,
    ) -> Self {
        Self {
            name,
            may,
            harmless,
            has_vm: false,
            is_heard: false,
            run,
        }
    }

    /// The same with a VM that its process has made.
    pub const fn with_vm(mut self) -> Self {
        self.has_vm = true;
        self
    }

    /// The same, made after all others.
    pub const fn heard(mut self) -> Self {
        self.is_heard = true;
        self
    }
}
