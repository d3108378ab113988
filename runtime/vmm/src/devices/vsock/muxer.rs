// SPDX-License-Identifier: Apache-2.0
//! All streams of one guest, and the unix sockets at their host ends.
//!
//! The host connects to the socket and sends `CONNECT <port>\n`. The answer is `OK <port>\n`; all bytes
//! after it come from the guest. The guest can connect to one port of the host, once: the muxer has the connection to the
//! program behind it from the start. Streams take turns, each sends one packet or one burst per turn, so no stream starves
//! another. Bytes that a slow peer does not read are bounded by the credit that the other side has.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::alarm::Alarm;
use super::callers::Callers;
use super::packet::{Header, Op, TYPE_STREAM};
use super::stream::{Message, Phase, Ports, Stream, WINDOW_BYTES};
use super::table::Table;
use crate::devices::Turn;
use crate::devices::chain::Buffers;
use crate::statistics::{DeviceCounters, Milestone};

pub const HOST_CID: u64 = 2;
/// Streams and callers together.
pub const MAX_STREAMS: usize = 4096;
/// How many resets may wait until the guest takes them. When that many wait, the guest's packets wait, too.
const MAX_RESETS: usize = 256;
const EVENT_BATCHES: usize = 8;

const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const FIRST_ID: u64 = 2;

/// The streams of one guest. The head of this file explains it.
#[derive(Debug)]
pub struct Muxer {
    guest_cid: u64,
    epoll: Epoll,
    listener: UnixListener,
    /// The port of the host to which the guest can connect, and what it reaches there. `None` once it has.
    ready: Option<(u32, UnixStream)>,
    alarm: Alarm,
    next_id: u64,
    callers: Callers,
    streams: Table,
    turns: VecDeque<u64>,
    resets: VecDeque<Ports>,
    counters: Arc<DeviceCounters>,
    first_stream: Arc<Milestone>,
}

impl Muxer {
    /// Callers of the guest come by `listener`. `ready` is a port of the host, and what the guest reaches there; it does
    /// not block.
    pub fn new(
        guest_cid: u32,
        listener: UnixListener,
        ready: Option<(u32, UnixStream)>,
        counters: Arc<DeviceCounters>,
        first_stream: Arc<Milestone>,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let alarm = Alarm::new()?;
        let epoll = Epoll::new()?;
        let input = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (fd, token) in [(listener.as_raw_fd(), LISTENER), (alarm.fd(), TIMER)] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(input, token))?;
        }
        Ok(Self {
            guest_cid: guest_cid.into(),
            epoll,
            listener,
            ready,
            alarm,
            next_id: FIRST_ID,
            callers: Callers::default(),
            streams: Table::default(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            counters,
            first_stream,
        })
    }

    /// Readable when [`Self::poll`] has something to do.
    #[must_use]
    pub fn event_source(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Handles a reset of the guest's driver. Open streams end. Host connections that the guest has not
    /// answered are offered again.
    pub fn guest_reset(&mut self) {
        self.resets.clear();
        self.turns.clear();
        for id in self.streams.ids() {
            let Some(stream) = self.streams.get_mut(id) else {
                continue;
            };
            stream.queued = false;
            if let Phase::Offered { sent, .. } = &mut stream.phase {
                *sent = false;
                self.queue(id);
            } else {
                self.streams.end(id);
            }
        }
    }

    /// Lets the host's ports begin anywhere. The guest may still use those of connections that have ended without its
    /// knowledge, and would take a new connection with the same ports for the old one.
    pub fn use_other_ports(&mut self) -> io::Result<()> {
        let mut port = [0; 4];
        rustix::rand::getrandom(&mut port, rustix::rand::GetRandomFlags::empty())?;
        self.streams.begin_at(u32::from_le_bytes(port));
        Ok(())
    }

    /// Whether nobody is connected, or about to be.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.streams.is_empty() && self.callers.is_empty() && self.resets.is_empty()
    }

    // --- towards the guest

    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// The next packet for the guest. Its data is in `room` already.
    pub fn next_packet(&mut self, room: &Buffers<'_>) -> Option<Header> {
        if let Some(ports) = self.resets.pop_front() {
            return Some(self.header(ports, Op::Reset));
        }
        while let Some(id) = self.turns.pop_front() {
            let Some(stream) = self.streams.get_mut(id) else {
                continue;
            };
            stream.queued = false;
            let message = stream.next_message(room);
            let ports = stream.ports;
            let forwarded = message.map(|_| stream.tell_forwarded());
            self.queue(id);
            if let (Some(message), Some(forwarded)) = (message, forwarded) {
                let Message { op, flags, len } = message;
                if op == Op::Data {
                    self.counters.read(len);
                }
                let mut header = self.header(ports, op);
                header.flags = flags;
                header.len = u32::try_from(len).unwrap_or(0);
                header.buf_alloc = WINDOW_BYTES;
                header.fwd_cnt = forwarded;
                return Some(header);
            }
        }
        None
    }

    fn header(&self, ports: Ports, op: Op) -> Header {
        Header::new((HOST_CID, ports.host), (self.guest_cid, ports.guest), op)
    }

    /// Puts a stream in line if it has a packet to send.
    fn queue(&mut self, id: u64) {
        if let Some(stream) = self.streams.get_mut(id)
            && !stream.queued
            && stream.has_message()
        {
            stream.queued = true;
            self.turns.push_back(id);
        }
    }

    // --- from the guest

    /// Whether another packet of the guest may be taken. The answer may be a reset, which needs a place.
    #[must_use]
    pub fn takes_input(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Handles a packet of the guest with its data.
    pub fn from_guest(&mut self, header: &Header, data: &Buffers<'_>) {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            self.counters.fail();
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let id = self.streams.find(ports);
        match (id, header.op) {
            (None, Op::Reset) => {}
            (Some(id), Op::Reset) => self.streams.end(id),
            (None, Op::Request) if header.kind == TYPE_STREAM => self.accept(ports, header),
            (Some(id), _) if header.kind == TYPE_STREAM => self.advance(id, header, data),
            (None, _) => self.resets.push_back(ports),
            (Some(id), _) => {
                self.streams.end(id);
                self.resets.push_back(ports);
            }
        }
    }

    /// Handles a packet for an existing stream.
    fn advance(&mut self, id: u64, header: &Header, data: &Buffers<'_>) {
        let Some(stream) = self.streams.get_mut(id) else {
            return;
        };
        stream.learn_credit(header.buf_alloc, header.fwd_cnt);
        let goes_on = match (header.op, stream.phase) {
            (Op::Response, Phase::Offered { sent: true, .. }) => {
                stream.phase = Phase::Open;
                self.first_stream.reached();
                stream.greet(&format!("OK {}\n", stream.ports.host))
            }
            (Op::Data, Phase::Open) => {
                self.counters.written(data.len());
                stream.guest_data(data).is_ok()
            }
            (Op::Shutdown, Phase::Open) => !stream.guest_shutdown(header.flags),
            (Op::CreditUpdate, Phase::Open) => true,
            (Op::CreditRequest, Phase::Open) => {
                stream.credit_requested();
                true
            }
            _ => false,
        };
        if goes_on {
            self.queue(id);
        } else {
            let ports = stream.ports;
            self.streams.end(id);
            self.resets.push_back(ports);
        }
    }

    /// Handles the guest's request to connect to the host.
    fn accept(&mut self, ports: Ports, header: &Header) {
        let socket = match self.is_full() {
            true => None,
            false => self.ready.take_if(|(port, _)| *port == ports.host),
        };
        let id = socket.and_then(|(_, socket)| {
            let mut stream = Stream::new(ports, socket, Phase::Accepting);
            stream.learn_credit(header.buf_alloc, header.fwd_cnt);
            self.add(stream)
        });
        match id {
            Some(id) => {
                self.first_stream.reached();
                self.queue(id);
            }
            None => self.resets.push_back(ports),
        }
    }

    // --- the host's sockets

    fn is_full(&self) -> bool {
        self.streams.len().saturating_add(self.callers.len()) >= MAX_STREAMS
    }

    fn new_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id = id.saturating_add(1);
        id
    }

    fn watch(&self, fd: RawFd, id: u64) -> io::Result<()> {
        let events =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.epoll
            .ctl(ControlOperation::Add, fd, EpollEvent::new(events, id))
    }

    fn add(&mut self, stream: Stream) -> Option<u64> {
        let id = self.new_id();
        self.watch(stream.socket_fd(), id).ok()?;
        self.streams.insert(id, stream);
        Some(id)
    }

    /// Handles events of the host's sockets and the timer.
    pub fn poll(&mut self) -> Turn {
        let mut events = [EpollEvent::default(); 64];
        for _ in 0..EVENT_BATCHES {
            let count = self.epoll.wait(0, &mut events).unwrap_or(0);
            if count == 0 {
                return Turn::Idle;
            }
            for event in events.iter().take(count) {
                match event.data() {
                    LISTENER => self.accept_callers(),
                    TIMER => self.tick(),
                    id => self.host_event(id, event.event_set()),
                }
            }
        }
        Turn::More
    }

    fn accept_callers(&mut self) {
        while let Ok((socket, _)) = self.listener.accept() {
            // If there are too many streams, dropping the socket closes it, which refuses the connection.
            if self.is_full() || socket.set_nonblocking(true).is_err() {
                continue;
            }
            let id = self.new_id();
            if self.watch(socket.as_raw_fd(), id).is_ok() {
                self.callers.add(id, socket, Instant::now());
                self.alarm.run(true);
            }
        }
    }

    /// Handles an epoll event of a caller's or a stream's socket.
    fn host_event(&mut self, id: u64, events: EventSet) {
        if self.callers.contains(id) {
            self.hear_caller(id);
            return;
        }
        let Some(stream) = self.streams.get_mut(id) else {
            return;
        };
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        let readable = events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        stream.host_event(readable, events.contains(EventSet::OUT), gone);
        if stream.is_abandoned() {
            let (ports, told) = (stream.ports, !stream.has_message());
            self.streams.end(id);
            if told && self.takes_input() {
                self.resets.push_back(ports);
            }
        } else if stream.phase == Phase::Draining && !stream.is_draining() {
            self.streams.remove(id);
        } else {
            self.queue(id);
        }
    }

    fn hear_caller(&mut self, id: u64) {
        let Some((caller, port)) = self.callers.hear(id) else {
            return;
        };
        let ports = self.streams.free_ports(port);
        let phase = Phase::Offered {
            sent: false,
            deadline: caller.deadline,
        };
        // The socket stays registered with epoll under the same id.
        let stream = Stream::new(ports, caller.socket, phase);
        self.streams.insert(id, stream);
        self.queue(id);
    }

    // --- time limits

    /// Closes connections whose time limit has passed. Runs once a second while any has one.
    fn tick(&mut self) {
        self.alarm.heard();
        self.expire(Instant::now());
        // An earlier accept may have failed for lack of file descriptors.
        self.accept_callers();
    }

    fn expire(&mut self, now: Instant) {
        let mut waiting = self.callers.expire(now);
        let mut late = Vec::new();
        for (id, stream) in self.streams.iter() {
            if let Phase::Offered { sent, deadline } = stream.phase {
                if deadline <= now {
                    late.push((id, stream.ports, sent));
                } else {
                    waiting = true;
                }
            }
        }
        for (id, ports, sent) in late {
            self.streams.end(id);
            if sent && self.takes_input() {
                self.resets.push_back(ports);
            }
        }
        self.alarm.run(waiting);
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
