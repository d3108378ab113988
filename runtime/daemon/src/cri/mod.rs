// SPDX-License-Identifier: Apache-2.0
//! The CRI server: gRPC in, calls to `pod` and `image`, gRPC out.
//!
//! Handlers are thin: parse, call, answer. [`parse`] converts CRI's messages to our types, and [`show`] converts back.
//! [`runtime`] and [`images`] are the two services, and [`codes`] maps errors to gRPC codes. The other files are groups
//! of RPCs. No code outside of this module uses CRI's protobuf types.

mod checkpoint;
mod codes;
mod container;
mod credentials;
mod filter;
mod images;
mod limits;
mod lists;
mod metrics;
mod parse;
mod parse_cdi;
mod parse_devices;
mod parse_mounts;
mod parse_security;
mod patience;
mod quantity;
mod refusal;
mod runtime;
mod sandbox;
mod show;
mod stats;
mod status;
mod streaming;

pub use checkpoint::{FROM_CHECKPOINT, SETTINGS};
pub use images::{ImageServer, PULL_INFO};
pub use lists::{BoxStream, stream_list};
pub use parse_security::{MASKED_PATHS, READONLY_PATHS};
pub use patience::caller_timeout;
pub use runtime::{Found, RuntimeServer};
