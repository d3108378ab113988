// SPDX-License-Identifier: Apache-2.0
//! The streams of one guest, by id and by ports. Pure.

use std::collections::HashMap;

use super::stream::{Ports, Stream};

/// The first host port for connections that the host makes.
const FIRST_PORT: u32 = 1 << 30;

/// All streams of one guest.
#[derive(Debug)]
pub struct Table {
    streams: HashMap<u64, Stream>,
    /// Streams that the guest knows. A draining stream is not among them.
    by_ports: HashMap<Ports, u64>,
    next_port: u32,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            streams: HashMap::new(),
            by_ports: HashMap::new(),
            next_port: FIRST_PORT,
        }
    }
}

impl Table {
    pub fn len(&self) -> usize {
        self.streams.len()
    }

    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    pub fn ids(&self) -> Vec<u64> {
        self.streams.keys().copied().collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, &Stream)> {
        self.streams.iter().map(|(&id, stream)| (id, stream))
    }

    pub fn get_mut(&mut self, id: u64) -> Option<&mut Stream> {
        self.streams.get_mut(&id)
    }

    /// The id of the stream with these ports.
    pub fn find(&self, ports: Ports) -> Option<u64> {
        self.by_ports.get(&ports).copied()
    }

    pub fn insert(&mut self, id: u64, stream: Stream) {
        self.by_ports.insert(stream.ports, id);
        self.streams.insert(id, stream);
    }

    /// Ends a stream on the guest's side. It stays until its waiting bytes have gone to the host.
    pub fn end(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if self.by_ports.get(&stream.ports) == Some(&id) {
            self.by_ports.remove(&stream.ports);
        }
        if !stream.drain() {
            self.streams.remove(&id);
        }
    }

    /// Removes a stream that has no bytes left for the host.
    pub fn remove(&mut self, id: u64) {
        self.streams.remove(&id);
    }

    /// Lets the host's ports begin at another one, which depends on `port`.
    pub fn begin_at(&mut self, port: u32) {
        self.next_port = port | FIRST_PORT;
    }

    /// Ports that no stream uses, for a connection to the guest's port `guest`.
    pub fn free_ports(&mut self, guest: u32) -> Ports {
        loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).unwrap_or(FIRST_PORT);
            let ports = Ports { host, guest };
            // This loop ends, because there are far fewer streams than ports.
            if !self.by_ports.contains_key(&ports) {
                return ports;
            }
        }
    }
}

#[cfg(test)]
impl Table {
    /// Whether the guest knows no stream.
    pub fn is_unknown_to_guest(&self) -> bool {
        self.by_ports.is_empty()
    }
}
