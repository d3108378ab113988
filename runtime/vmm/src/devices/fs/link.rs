// SPDX-License-Identifier: Apache-2.0
//! The socket to the file server: sends whole requests and receives whole replies, without blocking.
//!
//! In both directions FUSE messages follow one another; each begins with its length. A server that
//! breaks the protocol is disconnected.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use bulkhead_share::fuse::{MOST_BYTES, REPLY_HEADER, reply_header};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::flight::{Flight, Waiting};
use crate::devices::chain::Buffers;
use crate::memory::Memory;
use crate::sys;

/// When this many bytes wait for the server, no further request is taken from the guest.
const MOST_WAITING: usize = MOST_BYTES;

/// For so many messages that wait, memory is kept when all are sent.
const KEPT_MESSAGES: usize = 64;

/// What arrived from the server.
#[derive(Debug)]
pub enum Arrived {
    /// The server's reply, of `len` bytes, has been written to guest memory.
    Reply {
        waiting: Waiting,
        len: u32,
    },
    Nothing,
    /// The server has gone. All waiting requests have to be told.
    End,
}

/// A reply whose end has not arrived yet.
#[derive(Debug)]
struct Incoming {
    number: u64,
    len: usize,
    done: usize,
}

/// The connection to the file server, if there is one, with the messages that are being sent and received.
pub struct Link {
    epoll: Epoll,
    server: Option<UnixStream>,
    /// The server has gone, and the requests in flight have not been failed yet.
    lost: bool,
    /// There was a server, and it has gone. Decides between EIO and ENOTCONN.
    ended: bool,
    output: VecDeque<Vec<u8>>,
    output_bytes: usize,
    /// How many bytes of the first message have been sent.
    sent: usize,
    header: [u8; REPLY_HEADER],
    header_bytes: usize,
    incoming: Option<Incoming>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("connected", &self.is_connected())
            .field("output_bytes", &self.output_bytes)
            .finish_non_exhaustive()
    }
}

impl Link {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            server: None,
            lost: false,
            ended: false,
            output: VecDeque::new(),
            output_bytes: 0,
            sent: 0,
            header: [0; REPLY_HEADER],
            header_bytes: 0,
            incoming: None,
        })
    }

    pub fn connect(&mut self, server: UnixStream) -> io::Result<()> {
        if self.is_connected() || self.lost {
            return Err(io::Error::new(
                ErrorKind::AlreadyExists,
                "a file server is already connected",
            ));
        }
        server.set_nonblocking(true)?;
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(events, 0);
        self.epoll
            .ctl(ControlOperation::Add, server.as_raw_fd(), event)?;
        self.server = Some(server);
        self.ended = false;
        Ok(())
    }

    fn is_connected(&self) -> bool {
        self.server.is_some()
    }

    /// The error number for requests, if there is no server that could get them.
    pub fn refusal(&self) -> Option<i32> {
        match (&self.server, self.ended) {
            (Some(_), _) => None,
            (None, true) => Some(libc::EIO),
            (None, false) => Some(libc::ENOTCONN),
        }
    }

    /// Whether there has never been a server for this driver.
    pub fn is_new(&self) -> bool {
        !self.is_connected() && !self.lost && !self.ended
    }

    /// Whether the server has gone and the requests in flight have not been failed yet.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// Disconnects from the server. Call it only when no request is in flight.
    pub fn close(&mut self) {
        self.lose();
        self.lost = false;
        self.ended = false;
    }

    fn lose(&mut self) {
        // Closing the only descriptor takes it out of epoll.
        self.lost |= self.server.take().is_some();
        self.ended |= self.lost;
        self.output.clear();
        self.output_bytes = 0;
        self.sent = 0;
        self.header_bytes = 0;
        self.incoming = None;
    }

    pub fn event_source(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Takes notice of an event and sends what waits. [`Self::receive`] does the reading.
    pub fn poll(&mut self) {
        let mut events = [EpollEvent::default(); 1];
        // This only re-arms the edge-triggered event. Reading and writing show what there is to do.
        let _ = self.epoll.wait(0, &mut events);
        self.flush();
    }

    /// Whether another message may be sent.
    pub fn takes_output(&self) -> bool {
        self.output_bytes < MOST_WAITING
    }

    pub fn send(&mut self, message: Vec<u8>) {
        self.output_bytes = self.output_bytes.saturating_add(message.len());
        self.output.push_back(message);
        self.flush();
    }

    fn flush(&mut self) {
        while let (Some(server), Some(message)) = (&mut self.server, self.output.front()) {
            let rest = message.get(self.sent..).unwrap_or_default();
            match server.write(rest) {
                Ok(count) if count < rest.len() => self.sent = self.sent.saturating_add(count),
                Ok(count) => {
                    let whole = self.sent.saturating_add(count);
                    self.output_bytes = self.output_bytes.saturating_sub(whole);
                    self.sent = 0;
                    self.output.pop_front();
                    if self.output.is_empty() {
                        // Many small messages may have waited.
                        self.output.shrink_to(KEPT_MESSAGES);
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.lose(),
            }
        }
    }

    /// Moves at most one reply into guest memory.
    pub fn receive(&mut self, memory: &Memory, flight: &mut Flight) -> Arrived {
        loop {
            let step = match self.incoming {
                None => self.receive_header(memory, flight),
                Some(_) => self.receive_body(memory, flight),
            };
            match step {
                Ok(Some(arrived)) => return arrived,
                Ok(None) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    return if std::mem::take(&mut self.lost) {
                        Arrived::End
                    } else {
                        Arrived::Nothing
                    };
                }
                Err(_) => self.lose(),
            }
        }
    }

    /// Reads the header of the next reply, checks it, and writes it to guest memory with the guest's own number.
    fn receive_header(
        &mut self,
        memory: &Memory,
        flight: &mut Flight,
    ) -> io::Result<Option<Arrived>> {
        let server = self.server.as_mut().ok_or(ErrorKind::WouldBlock)?;
        let rest = self.header.get_mut(self.header_bytes..);
        let count = server.read(rest.unwrap_or_default())?;
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.header_bytes = self.header_bytes.saturating_add(count);
        if self.header_bytes < REPLY_HEADER {
            return Ok(None);
        }
        self.header_bytes = 0;
        let [a, b, c, d, e, f, g, h, number @ ..] = self.header;
        let len = u32::from_le_bytes([a, b, c, d]);
        let error = i32::from_le_bytes([e, f, g, h]);
        let number = u64::from_le_bytes(number);
        // A reply with an unknown number, or one too long for the guest's buffers, breaks the protocol.
        let waiting = flight.get(number).ok_or(ErrorKind::InvalidData)?;
        let room = Buffers::at(memory, &waiting.room);
        let whole = usize::try_from(len).unwrap_or(usize::MAX);
        if whole < REPLY_HEADER || whole > room.len() || whole > MOST_BYTES {
            return Err(ErrorKind::InvalidData.into());
        }
        room.copy_from(&reply_header(len, error, waiting.unique));
        self.incoming = Some(Incoming {
            number,
            len: whole,
            done: REPLY_HEADER,
        });
        Ok(None)
    }

    /// Reads the rest of the reply directly into guest memory. A complete reply is returned.
    fn receive_body(
        &mut self,
        memory: &Memory,
        flight: &mut Flight,
    ) -> io::Result<Option<Arrived>> {
        let (server, incoming) = match (&self.server, &mut self.incoming) {
            (Some(server), Some(incoming)) => (server, incoming),
            _ => return Err(ErrorKind::WouldBlock.into()),
        };
        let rest = incoming.len.saturating_sub(incoming.done);
        if rest == 0 {
            let waiting = flight.end(incoming.number);
            let len = u32::try_from(incoming.len).unwrap_or(0);
            self.incoming = None;
            let waiting = waiting.ok_or(ErrorKind::InvalidData)?;
            return Ok(Some(Arrived::Reply { waiting, len }));
        }
        let waiting = flight.get(incoming.number).ok_or(ErrorKind::InvalidData)?;
        let room = Buffers::at(memory, &waiting.room);
        let room = room.part(incoming.done, rest);
        let count = sys::read(server.as_fd(), room.slices())?;
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        incoming.done = incoming.done.saturating_add(count);
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_for_many_waiting_messages_is_kept_only_as_long_as_they_wait() {
        let (ours, mut server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        let mut link = Link::new().unwrap();
        link.connect(ours).unwrap();
        while link.takes_output() {
            link.send(vec![0; 64]);
        }
        assert!(link.output.capacity() > 10 * KEPT_MESSAGES);
        let mut taken = [0; 4096];
        while !link.output.is_empty() {
            while server.read(&mut taken).is_ok() {}
            link.poll();
        }
        assert!(link.output.capacity() <= KEPT_MESSAGES);
        assert_eq!(link.output_bytes, 0);
    }
}
