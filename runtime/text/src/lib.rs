// SPDX-License-Identifier: Apache-2.0
//! What every program here needs to write text for people: errors with their causes, words of strangers made safe to
//! show, bytes as hexadecimal digits, and problems of the host with their remedies.
//!
//! The lowest floor of the house: it depends on the standard library only, so the VMM and the agent may use it too.

#![forbid(unsafe_code)]

mod chain;
mod hex;
mod printable;
mod problem;

pub use chain::chain;
pub use hex::hex;
pub use printable::{cut, one_line, printable};
pub use problem::Problem;
