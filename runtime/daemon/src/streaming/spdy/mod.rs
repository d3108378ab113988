// SPDX-License-Identifier: Apache-2.0
//! SPDY/3.1, the server's side, as Kubernetes clients speak it. Knows nothing of pods.
//!
//! [`frame`] is the encoding, [`headers`] the compressed header blocks, [`connection`] the streams of one
//! connection, [`stream`] what their users see and [`outbox`] the frames on their way out.
//!
//! Kubernetes' own clients ignore flow control: they send as fast as TCP takes it and never open a window
//! for us. So a stream's window is kept for those who obey it, and one who does not is told of it no more and
//! held back by not reading from its connection: nothing but that connection waits. In the other direction TCP
//! alone holds us back.

mod connection;
mod frame;
mod headers;
mod outbox;
mod stream;

pub use connection::{Connection, GOODBYE_TIME};
pub use outbox::Gone;
pub use stream::{Stream, StreamReader, StreamWriter};
