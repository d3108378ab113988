// SPDX-License-Identifier: Apache-2.0
//! Clients that have not shown a token yet. Every user of the host can connect, and a client with a good token looks like
//! all others until its request is read. So strangers have little room and little time, and none of the room for streams.
//! When the room is full, the one who waited longest has to go: a client with a token sends its request at once, and is
//! known before others can push it out.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

/// The most clients without a token.
const ROOM: usize = 128;
/// How long a client may take for the TLS handshake and the head of its request together.
const TIME: Duration = Duration::from_secs(5);

/// All clients without a token.
#[derive(Debug, Default)]
pub struct Strangers(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    /// The one who came first is the first.
    clients: VecDeque<(u64, oneshot::Sender<()>)>,
}

/// One client. It is a stranger until [`Self::is_known`] or until this is dropped.
#[derive(Debug)]
pub struct Stranger {
    all: Arc<Strangers>,
    number: u64,
}

/// When a client has to go.
#[derive(Debug)]
pub struct Turn(oneshot::Receiver<()>);

impl Strangers {
    /// Takes a client in. Sends away who came first if there is no room.
    pub fn enter(self: &Arc<Self>) -> (Stranger, Turn) {
        let (send_away, turn) = oneshot::channel();
        let mut waiting = self.waiting();
        let number = waiting.next;
        waiting.next += 1;
        waiting.clients.push_back((number, send_away));
        if waiting.clients.len() > ROOM
            && let Some((_, first)) = waiting.clients.pop_front()
        {
            // It may have gone at this moment.
            let _ = first.send(());
        }
        drop(waiting);
        let all = Arc::clone(self);
        (Stranger { all, number }, Turn(turn))
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stranger {
    /// The client has shown a token: from now on it is not sent away.
    pub fn is_known(&self) {
        let mut waiting = self.all.waiting();
        waiting.clients.retain(|(number, _)| *number != self.number);
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.is_known();
    }
}

impl Turn {
    /// Waits until the client has to go. That is never, once it is known.
    pub async fn wait(self) {
        // The sender is dropped when the client is known.
        if let Ok(Err(_)) = timeout(TIME, self.0).await {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn who_waited_longest_makes_room_and_a_known_client_stays() {
        let all = Arc::new(Strangers::default());
        let (known, known_turn) = all.enter();
        known.is_known();
        let mut known_turn = Box::pin(known_turn.wait());
        let (_first, first_turn) = all.enter();
        let mut first_turn = Box::pin(first_turn.wait());
        let mut others: Vec<_> = (1..ROOM).map(|_| all.enter()).collect();
        assert!(
            first_turn.as_mut().now_or_never().is_none(),
            "there is room"
        );
        others.push(all.enter());
        assert_eq!(first_turn.now_or_never(), Some(()));
        assert!(known_turn.as_mut().now_or_never().is_none());
        others.clear();
        assert_eq!(all.waiting().clients.len(), 0, "all have left");
        assert!(known_turn.now_or_never().is_none());
    }
}
