// SPDX-License-Identifier: Apache-2.0
//! Another CRI server on this node, to which pods can be delegated.
//!
//! [`Delegate`] is such a server: a connection that is made when it is needed and made again when it broke, a time limit
//! for each kind of call, and what is known of the server's health. [`DelegateError`] says why a call failed. What the
//! server answers is bounded in size. This crate knows nothing about which pods are whose.

mod calls;
mod delegate;
mod error;
#[cfg(feature = "fake")]
pub mod fake;
mod health;
mod lists;
mod report;

pub use calls::{Limit, Limits};
pub use delegate::Delegate;
pub use error::{DelegateError, bounded};
pub use health::Health;
pub use report::Report;
