// SPDX-License-Identifier: Apache-2.0
//! Byte streams: everything that crosses the vsock besides gRPC.
//!
//! Logs: [`buffer`] holds the log of one container, [`pump`] fills it from the container's pipes, [`log`] serves it to
//! the host. Exec and attach: [`records`] is the encoding, [`input`] and [`output`] are the two directions, and
//! [`session`] combines them. [`tap`] holds the output that an attached client has not read yet. [`forward`] connects
//! to a port of the pod. [`messages`] reads and writes the messages at the start of every stream.

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
