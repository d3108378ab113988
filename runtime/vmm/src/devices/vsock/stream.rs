// SPDX-License-Identifier: Apache-2.0
//! One stream between a unix socket and a port of the guest: credit, half-close, and the bytes that
//! wait until the host reads them. It knows no other stream; [`super::muxer`] knows all of them.
//!
//! ```text
//! Offered ──RESPONSE──> Open <──RESPONSE sent── Accepting
//!    └─────RST────┐      │ RST, SHUTDOWN(both), or a violation
//!                 v      v
//!              (gone)   Draining: the guest has ended it; its last bytes still go to the host
//! ```

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::packet::{Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::devices::chain::Buffers;
use crate::sys;

/// How many bytes may wait here for the host. The guest is told so (`buf_alloc`).
pub const WINDOW_BYTES: u32 = 256 << 10;
/// How much of the host's data for a guest that takes no more is dropped by one call.
const DROPPED_BYTES: usize = 4 << 10;

/// The two ports of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

/// Where a stream is in its life; see the head of this file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The host wants to connect; the guest has not answered yet.
    Offered {
        sent: bool,
        deadline: Instant,
    },
    /// The guest wants to connect. The host side is connected; the guest has not been told yet.
    Accepting,
    Open,
    /// The guest has ended the stream. Only its bytes for the host are left.
    Draining,
}

/// The next packet of a stream for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub op: Op,
    pub flags: u32,
    pub len: usize,
}

impl Message {
    fn new(op: Op) -> Self {
        Self {
            op,
            flags: 0,
            len: 0,
        }
    }
}

/// The guest violated the protocol. The stream ends with a reset.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation;

/// A stream. Its two directions have separate credit.
#[derive(Debug)]
pub struct Stream {
    pub ports: Ports,
    pub phase: Phase,
    /// Whether the stream is in the muxer's queue of streams with a packet to send.
    pub queued: bool,
    socket: UnixStream,
    /// Whether the socket may have something to read, as far as epoll and the last read tell.
    readable: bool,
    host_gone: bool,
    host_done: bool,
    // The halves that the guest closed with SHUTDOWN.
    guest_sends_no_more: bool,
    guest_takes_no_more: bool,
    // The socket's sending half is closed.
    host_told_of_end: bool,
    // SHUTDOWN flags that have to be sent, and those that were sent.
    shutdown_due: u32,
    shutdown_sent: u32,
    // Credit for data towards the guest.
    guest_window: u32,
    guest_forwarded: Wrapping<u32>,
    sent: Wrapping<u32>,
    credit_asked: bool,
    // Credit for data towards the host.
    backlog: VecDeque<u8>,
    forwarded: Wrapping<u32>,
    forwarded_told: Wrapping<u32>,
    credit_due: bool,
    host_takes_no_more: bool,
}

impl Stream {
    #[must_use]
    pub fn new(ports: Ports, socket: UnixStream, phase: Phase) -> Self {
        Self {
            ports,
            phase,
            queued: false,
            socket,
            readable: true,
            host_gone: false,
            host_done: false,
            guest_sends_no_more: false,
            guest_takes_no_more: false,
            host_told_of_end: false,
            shutdown_due: 0,
            shutdown_sent: 0,
            guest_window: 0,
            guest_forwarded: Wrapping(0),
            sent: Wrapping(0),
            credit_asked: false,
            backlog: VecDeque::new(),
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            credit_due: false,
            host_takes_no_more: false,
        }
    }

    #[must_use]
    pub fn socket_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// The value of `fwd_cnt` for the next packet's header.
    pub fn tell_forwarded(&mut self) -> u32 {
        self.forwarded_told = self.forwarded;
        self.credit_due = false;
        self.forwarded.0
    }

    /// Takes over the guest's credit, which is in every packet from it.
    pub fn learn_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_window = buf_alloc;
        self.guest_forwarded = Wrapping(fwd_cnt);
        if self.credit() > 0 {
            self.credit_asked = false;
        }
    }

    /// Handles the guest's request to be told its credit.
    pub fn credit_requested(&mut self) {
        self.credit_due = true;
    }

    fn credit(&self) -> u32 {
        let in_flight = (self.sent - self.guest_forwarded).0;
        self.guest_window.saturating_sub(in_flight)
    }

    fn may_read(&self) -> bool {
        self.phase == Phase::Open && self.readable && !self.host_done && !self.guest_takes_no_more
    }

    /// Whether [`Self::next_message`] may have a packet.
    #[must_use]
    pub fn has_message(&self) -> bool {
        match self.phase {
            Phase::Offered { sent, .. } => !sent,
            Phase::Accepting => true,
            Phase::Draining => false,
            Phase::Open => {
                self.credit_due
                    || self.shutdown_due & !self.shutdown_sent != 0
                    || (self.may_read() && (self.credit() > 0 || !self.credit_asked))
            }
        }
    }

    /// The next packet for the guest. Its data is written to `room`.
    pub fn next_message(&mut self, room: &Buffers<'_>) -> Option<Message> {
        match &mut self.phase {
            Phase::Offered { sent, .. } => {
                return (!std::mem::replace(sent, true)).then(|| Message::new(Op::Request));
            }
            Phase::Accepting => {
                self.phase = Phase::Open;
                return Some(Message::new(Op::Response));
            }
            Phase::Draining => return None,
            Phase::Open => {}
        }
        if let Some(data) = self.read_data(room) {
            return Some(data);
        }
        if self.shutdown_due & !self.shutdown_sent != 0 {
            self.shutdown_sent |= self.shutdown_due;
            return Some(Message {
                op: Op::Shutdown,
                flags: self.shutdown_sent,
                len: 0,
            });
        }
        if self.credit_due {
            return Some(Message::new(Op::CreditUpdate));
        }
        if self.may_read() && self.credit() == 0 && !self.credit_asked {
            self.credit_asked = true;
            return Some(Message::new(Op::CreditRequest));
        }
        None
    }

    /// Reads data from the socket into `room`, as much as the guest's credit allows.
    fn read_data(&mut self, room: &Buffers<'_>) -> Option<Message> {
        let most = usize::try_from(self.credit()).unwrap_or(usize::MAX);
        if !self.may_read() || most == 0 {
            return None;
        }
        let room = room.part(0, most);
        loop {
            match sys::read(self.socket.as_fd(), room.slices()) {
                Ok(0) => {
                    self.end_of_host();
                    return None;
                }
                Ok(len) => {
                    self.sent += u32::try_from(len).unwrap_or(0);
                    let mut message = Message::new(Op::Data);
                    message.len = len;
                    return Some(message);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return None;
                }
                Err(_) => {
                    self.host_gone = true;
                    self.end_of_host();
                    return None;
                }
            }
        }
    }

    /// Handles the end of the host's data: the host closed its sending half or the whole connection.
    fn end_of_host(&mut self) {
        self.host_done = true;
        self.shutdown_due |= if self.host_gone {
            SHUTDOWN_BOTH
        } else {
            SHUTDOWN_SEND
        };
    }

    /// Handles an epoll event of the socket.
    pub fn host_event(&mut self, readable: bool, writable: bool, gone: bool) {
        self.readable |= readable | gone;
        self.host_gone |= gone;
        if self.host_gone && (self.host_done || self.guest_takes_no_more) {
            self.shutdown_due = SHUTDOWN_BOTH;
        }
        if writable | gone {
            self.flush();
        }
    }

    /// Handles data from the guest.
    pub fn guest_data(&mut self, data: &Buffers<'_>) -> Result<(), Violation> {
        let room = (WINDOW_BYTES as usize).saturating_sub(self.backlog.len());
        if self.phase != Phase::Open || self.guest_sends_no_more || data.len() > room {
            return Err(Violation);
        }
        let mut done = 0;
        if self.backlog.is_empty() && !self.host_takes_no_more {
            match sys::send(self.socket.as_fd(), data.slices()) {
                Ok(len) => done = len,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.refuse_data(),
            }
        }
        let rest = data.len().saturating_sub(done);
        if self.host_takes_no_more || rest == 0 {
            self.forward(data.len());
            return Ok(());
        }
        self.forward(done);
        let mut bytes = vec![0; rest];
        data.part(done, rest).copy_to(&mut bytes);
        self.backlog.extend(bytes);
        Ok(())
    }

    /// Drops data for the host from now on, because the host closed its receiving half.
    fn refuse_data(&mut self) {
        self.host_takes_no_more = true;
        self.shutdown_due |= SHUTDOWN_RECEIVE;
        let dropped = self.backlog.len();
        self.backlog = VecDeque::new();
        self.forward(dropped);
    }

    fn forward(&mut self, bytes: usize) {
        self.forwarded += u32::try_from(bytes).unwrap_or(0);
        // Half a window has become free since the guest was told last: tell it now.
        if (self.forwarded - self.forwarded_told).0 >= WINDOW_BYTES / 2 {
            self.credit_due = true;
        }
    }

    /// Writes as many waiting bytes as the host takes.
    pub fn flush(&mut self) {
        while !self.backlog.is_empty() && !self.host_takes_no_more {
            let (front, _) = self.backlog.as_slices();
            let flags = rustix::net::SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, front, flags) {
                Ok(len) => {
                    self.backlog.drain(..len);
                    self.forward(len);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return,
                Err(_) => self.refuse_data(),
            }
        }
        if self.backlog.capacity() > 0 {
            self.backlog = VecDeque::new();
        }
        if self.guest_sends_no_more && !self.host_told_of_end {
            // Once: each call is an event of this very socket, which would bring us here again.
            self.host_told_of_end = true;
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// Handles the guest's SHUTDOWN, which closes one or both halves. True if both are closed now.
    pub fn guest_shutdown(&mut self, flags: u32) -> bool {
        self.guest_sends_no_more |= flags & SHUTDOWN_SEND != 0;
        self.guest_takes_no_more |= flags & SHUTDOWN_RECEIVE != 0;
        if self.guest_takes_no_more {
            self.refuse_host_data();
        }
        self.flush();
        self.guest_sends_no_more && self.guest_takes_no_more
    }

    /// Lets the host's writes fail from now on. What it has written goes nowhere; it is taken, because a host that waits to
    /// write more would not be woken otherwise, and might not read what waits for it before it has written.
    fn refuse_host_data(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Read);
        let mut dropped = [0; DROPPED_BYTES];
        // It ends, because the socket's buffer has an end and nothing more comes in.
        while let Ok(1..) | Err(rustix::io::Errno::INTR) =
            rustix::io::read(&self.socket, &mut dropped)
        {}
    }

    /// Ends the stream on the guest's side. True if some bytes still wait for the host.
    pub fn drain(&mut self) -> bool {
        self.phase = Phase::Draining;
        self.guest_sends_no_more = true;
        self.refuse_host_data();
        self.flush();
        self.is_draining()
    }

    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.phase == Phase::Draining && !self.backlog.is_empty() && !self.host_takes_no_more
    }

    /// Sends a text to the host before any data.
    pub fn greet(&self, text: &str) -> bool {
        let flags = rustix::net::SendFlags::NOSIGNAL;
        rustix::net::send(&self.socket, text.as_bytes(), flags) == Ok(text.len())
    }

    /// Whether the host closed the connection before the guest answered.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.host_gone && matches!(self.phase, Phase::Offered { .. })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use proptest::prelude::*;
    use rustix::event::{PollFd, PollFlags, poll};
    use vm_memory::{GuestAddress, GuestMemoryBackend};

    use super::*;

    /// Whether a socket can be written to, at once.
    fn is_writable(socket: &UnixStream) -> bool {
        let mut wanted = [PollFd::new(socket, PollFlags::OUT)];
        poll(&mut wanted, Some(&rustix::time::Timespec::default())).unwrap() == 1
    }

    type End = fn(&mut Stream) -> bool;

    /// A host that writes answers before it reads more, beside a guest that writes and reads nothing, and then ends.
    #[test]
    fn a_host_that_waits_to_write_is_woken_when_the_guest_takes_no_more() {
        // How the guest ends it, and whether both halves are closed then.
        let ends: [(End, bool); 3] = [
            (Stream::drain, true),
            (|stream| stream.guest_shutdown(SHUTDOWN_BOTH), true),
            (|stream| stream.guest_shutdown(SHUTDOWN_RECEIVE), false),
        ];
        for (end, is_all) in ends {
            let memory = crate::memory::create(1 << 20).unwrap();
            let (mut host, ours) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            host.set_nonblocking(true).unwrap();
            let mut stream = Stream::new(Ports { host: 1, guest: 2 }, ours, Phase::Open);
            let mut data = Buffers::default();
            data.append(memory.get_slice(GuestAddress(0), 64 << 10).unwrap());
            let mut sent = 0;
            while stream.backlog.len() < 128 << 10 {
                stream.guest_data(&data).unwrap();
                sent += data.len();
            }
            while host.write(&[7; 4096]).is_ok() {}
            assert!(!is_writable(&host));

            assert_eq!(end(&mut stream), is_all);
            assert!(is_writable(&host));
            let refused = host.write(&[7]).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::BrokenPipe);
            // The guest's last bytes are still there.
            let mut got = 0;
            let mut bytes = [0; 64 << 10];
            loop {
                match host.read(&mut bytes) {
                    Ok(0) => break,
                    Ok(len) => got += len,
                    Err(_) if got == sent => break,
                    Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
                }
                stream.flush();
            }
            assert_eq!(got, sent);
            assert_eq!(matches!(host.read(&mut bytes), Ok(0)), is_all);
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        HostWrites(usize),
        GuestSays { window: u32, taken: u32 },
        GuestReads { room: usize },
    }

    fn step() -> impl Strategy<Value = Step> {
        let number = || prop_oneof![0u32..3000, any::<u32>()];
        prop_oneof![
            (0usize..2000).prop_map(Step::HostWrites),
            (number(), number()).prop_map(|(window, taken)| Step::GuestSays { window, taken }),
            (0usize..2000).prop_map(|room| Step::GuestReads { room }),
        ]
    }

    proptest! {
        #[test]
        fn for_all_credit_that_a_guest_tells_it_gets_no_more_and_loses_nothing(
            steps in proptest::collection::vec(step(), 1..60),
        ) {
            let memory = crate::memory::create(1 << 20).unwrap();
            let (mut host, ours) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            host.set_nonblocking(true).unwrap();
            let mut stream = Stream::new(Ports { host: 1, guest: 2 }, ours, Phase::Open);
            let (mut window, mut taken) = (0u32, Wrapping(0u32));
            let (mut written, mut got) = (0u32, Wrapping(0u32));
            for step in steps {
                match step {
                    Step::HostWrites(len) => {
                        let len = host.write(&vec![7; len]).unwrap_or(0);
                        written = written.saturating_add(u32::try_from(len).unwrap());
                        stream.host_event(true, false, false);
                    }
                    Step::GuestSays { window: all, taken: some } => {
                        (window, taken) = (all, Wrapping(some));
                        stream.learn_credit(all, some);
                    }
                    Step::GuestReads { room } => {
                        let mut buffers = Buffers::default();
                        buffers.append(memory.get_slice(GuestAddress(0), room).unwrap());
                        let credit = window.saturating_sub((got - taken).0);
                        let len = match stream.next_message(&buffers) {
                            Some(Message { op: Op::Data, len, .. }) => len,
                            _ => 0,
                        };
                        prop_assert!(len <= room);
                        let len = u32::try_from(len).unwrap();
                        prop_assert!(len <= credit, "{} bytes with a credit of {}", len, credit);
                        got += len;
                        prop_assert!(got.0 <= written);
                    }
                }
            }
        }
    }
}
