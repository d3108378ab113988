// SPDX-License-Identifier: Apache-2.0
//! The host connections that have not said yet which port of the guest they want. Each has a time limit, which goes on
//! until the guest has answered.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::handshake::{Line, read_line};

/// How much time may pass from the host's connect to the guest's answer. The guest may still boot in it.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// A host connection that has not sent its CONNECT line yet.
#[derive(Debug)]
pub struct Caller {
    pub socket: UnixStream,
    /// When the guest must have answered.
    pub deadline: Instant,
}

/// The callers of one guest, by their epoll ids.
#[derive(Debug, Default)]
pub struct Callers(HashMap<u64, Caller>);

impl Callers {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn contains(&self, id: u64) -> bool {
        self.0.contains_key(&id)
    }

    /// Adds a connection of this moment.
    pub fn add(&mut self, id: u64, socket: UnixStream, now: Instant) {
        let deadline = now.checked_add(CONNECT_TIME).unwrap_or(now);
        self.0.insert(id, Caller { socket, deadline });
    }

    /// Reads what a caller has sent. Returns the caller and its port once its line is complete. A caller that sends
    /// anything else is dropped, which closes its connection.
    pub fn hear(&mut self, id: u64) -> Option<(Caller, u32)> {
        let line = read_line(&self.0.get(&id)?.socket);
        if line == Line::Partial {
            return None;
        }
        let caller = self.0.remove(&id)?;
        match line {
            Line::Port(port) => Some((caller, port)),
            Line::Partial | Line::Wrong => None,
        }
    }

    /// Drops the callers whose time is up. Returns whether any are left.
    pub fn expire(&mut self, now: Instant) -> bool {
        self.0.retain(|_, caller| caller.deadline > now);
        !self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// Adds a caller; returns its own end of the connection.
    fn call(callers: &mut Callers, id: u64, now: Instant) -> UnixStream {
        let (theirs, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        callers.add(id, ours, now);
        theirs
    }

    #[test]
    fn a_caller_is_handed_on_with_its_port_once_its_line_is_complete() {
        let (mut callers, now) = (Callers::default(), Instant::now());
        let mut caller = call(&mut callers, 7, now);
        caller.write_all(b"CONNECT 10").unwrap();
        assert!(callers.hear(7).is_none());
        assert!(callers.contains(7));
        caller.write_all(b"24\n").unwrap();
        let (heard, port) = callers.hear(7).unwrap();
        assert_eq!((port, heard.deadline), (1024, now + CONNECT_TIME));
        assert_eq!(callers.len(), 0);
        assert!(callers.hear(7).is_none(), "it is no caller any more");
    }

    #[test]
    fn a_caller_that_says_something_else_or_nothing_in_time_is_closed() {
        let (mut callers, now) = (Callers::default(), Instant::now());
        let mut wrong = call(&mut callers, 1, now);
        let mut silent = call(&mut callers, 2, now);
        let later = now + Duration::from_secs(1);
        let _fresh = call(&mut callers, 3, later);
        wrong.write_all(b"GET / HTTP/1.0\n").unwrap();
        assert!(callers.hear(1).is_none());
        // The kernel may answer with a reset, because the line was not read.
        assert!(matches!(wrong.read(&mut [0]), Ok(0) | Err(_)));
        assert!(!callers.contains(1));
        assert!(callers.expire(now + CONNECT_TIME), "one is left");
        assert!(!callers.contains(2) && callers.contains(3));
        assert_eq!(silent.read(&mut [0]).unwrap(), 0);
        assert!(!callers.expire(later + CONNECT_TIME));
    }
}
