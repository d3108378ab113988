// SPDX-License-Identifier: Apache-2.0
//! One client's connection: its slot among the streams, and whether the client has hung up, even while nothing is read.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::OwnedSemaphorePermit;

use super::strangers::Stranger;

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A client that has hung up may have sent data that is not delivered yet. After so many looks it counts as gone.
const LAST_WORDS: u32 = 20;

/// One connection of a client. When the last reference to this is dropped, its slot is free again.
#[derive(Debug)]
pub struct Peer {
    socket: OwnedFd,
    stranger: Stranger,
    slot: OnceLock<OwnedSemaphorePermit>,
}

impl Peer {
    pub fn new(socket: &impl AsFd, stranger: Stranger) -> io::Result<Self> {
        Ok(Self {
            socket: socket.as_fd().try_clone_to_owned()?,
            stranger,
            slot: OnceLock::new(),
        })
    }

    /// The client has shown a token, and there is a slot for its stream.
    pub fn is_known(&self, slot: OwnedSemaphorePermit) {
        self.stranger.is_known();
        // A connection has one stream. If there were another, it would be in the same slot.
        let _ = self.slot.set(slot);
    }

    /// Waits until the client has hung up, and some time more. For tasks that do not read from the connection now, and
    /// so would not notice its end.
    pub async fn left(&self) {
        let mut seen = 0;
        while seen < LAST_WORDS {
            tokio::time::sleep(LOOK_EVERY).await;
            if self.has_hung_up() {
                seen += 1;
            }
        }
    }

    fn has_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let at_once = Timespec::default();
        let polled = poll(&mut fds, Some(&at_once));
        polled.is_ok_and(|count| count > 0)
    }
}

#[cfg(test)]
impl Peer {
    /// A peer that never hangs up.
    pub fn fixture() -> std::sync::Arc<Self> {
        let strangers = std::sync::Arc::new(super::strangers::Strangers::default());
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        std::sync::Arc::new(Self::new(&socket, strangers.enter().0).unwrap())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::Arc;

    #[test]
    fn a_client_that_has_hung_up_is_noticed_though_its_bytes_are_unread() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (ours, _) = listener.accept().unwrap();
        let strangers = Arc::new(super::super::strangers::Strangers::default());
        let peer = Peer::new(&ours, strangers.enter().0).unwrap();
        client.write_all(b"unread").unwrap();
        assert!(!peer.has_hung_up());
        drop(client);
        assert!(peer.has_hung_up());
    }
}
