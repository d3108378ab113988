// SPDX-License-Identifier: Apache-2.0
//! What all programs need to write text for people: errors with their causes, untrusted text made safe to show, bytes
//! as hexadecimal digits, and problems of the host with their remedies.
//!
//! This crate depends only on the standard library, so that the VMM and the agent can use it too.

#![forbid(unsafe_code)]

mod chain;
mod hex;
mod printable;
mod problem;

pub use chain::chain;
pub use hex::hex;
pub use printable::{cut, one_line, printable};
pub use problem::Problem;
