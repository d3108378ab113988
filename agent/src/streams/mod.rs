// SPDX-License-Identifier: Apache-2.0
//! Byte streams: what crosses the vsock beside gRPC. [`buffer`] is the log of one container in memory,
//! [`pump`] fills it from the container's pipes, [`log`] serves it to the host.

pub mod buffer;
pub mod log;
pub mod pump;
