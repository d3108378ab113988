// SPDX-License-Identifier: Apache-2.0
//! The server's side of SPDY/3.1, as Kubernetes clients speak it. Knows nothing of pods.
//!
//! [`frame`] is the encoding, [`headers`] the compressed header blocks, [`connection`] the streams of one connection,
//! [`stream`] what their users see, and [`outbox`] the frames that wait to be sent.
//!
//! Kubernetes' own clients ignore SPDY's flow control: they send as fast as TCP accepts it, and they never open a
//! window for the server. So from client to server, windows are kept for clients that obey them. A client that does not
//! gets no window updates any more; when too much waits for a stream, its connection is not read until there is room,
//! which stops only that connection. From server to client there is only the flow control of TCP.

mod connection;
mod frame;
mod headers;
mod outbox;
mod stream;

pub use connection::{Connection, GOODBYE_TIME};
pub use outbox::Gone;
pub use stream::{Stream, StreamReader, StreamWriter};
