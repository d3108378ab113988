// SPDX-License-Identifier: Apache-2.0
//! Byte streams: what crosses the vsock beside gRPC.
//!
//! Logs: [`buffer`] is the log of one container in memory, [`pump`] fills it from the container's pipes,
//! [`log`] serves it to the host. Exec and attach: [`records`] is their encoding, [`input`] and [`output`]
//! the two directions, [`session`] puts them together; [`tap`] is what an attached host has not read yet.
//! [`forward`] connects to a port of the pod. [`messages`] are what every stream begins with.

pub mod buffer;
pub mod forward;
mod input;
pub mod log;
pub mod messages;
pub mod output;
pub mod pump;
pub mod records;
pub mod session;
pub mod tap;
