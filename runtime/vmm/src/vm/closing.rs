// SPDX-License-Identifier: Apache-2.0
//! Closes a volume that was taken off its disk, without waiting for ever: a request to it may hang, and so may the close
//! of a device that does not answer. A short thread of its own does the waiting; the main thread goes on.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// How long a caller waits. Its client gives up after 5 s.
pub const LIMIT: Duration = Duration::from_secs(2);
/// Between two looks whether the volume's last request has ended: at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Why a volume is not closed yet.
#[derive(Debug, thiserror::Error)]
pub enum ClosingError {
    #[error(
        "the volume is detached, but a request to it has not ended within {0:?}; it is closed when that ends"
    )]
    Hangs(Duration),
    #[error("start a thread that closes the volume")]
    Thread(#[source] std::io::Error),
}

/// Drops `volume` when nobody else holds it any more. The error says that this takes longer than `limit`.
pub fn close<V: Send + Sync + 'static>(
    volume: Arc<V>,
    thread: std::thread::Builder,
    limit: Duration,
) -> Result<(), ClosingError> {
    let (sender, closed) = mpsc::channel::<()>();
    let close = move || {
        let mut held = volume;
        let mut pause = FIRST_PAUSE;
        while let Err(still_held) = Arc::try_unwrap(held).map(drop) {
            held = still_held;
            std::thread::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        drop(sender);
    };
    thread.spawn(close).map_err(ClosingError::Thread)?;
    match closed.recv_timeout(limit) {
        // Nothing is ever sent: the sender's end says that the volume is closed.
        Ok(()) | Err(RecvTimeoutError::Disconnected) => Ok(()),
        Err(RecvTimeoutError::Timeout) => Err(ClosingError::Hangs(limit)),
    }
}

#[cfg(test)]
mod tests {
    use std::thread::Builder;
    use std::time::Instant;

    use super::*;

    struct Volume(mpsc::Sender<()>);

    impl Drop for Volume {
        fn drop(&mut self) {
            let _ = self.0.send(());
        }
    }

    #[test]
    fn a_volume_is_closed_at_once_or_when_its_last_request_ends() {
        let (sender, closed) = mpsc::channel();
        let limit = Duration::from_secs(20);
        close(Arc::new(Volume(sender.clone())), Builder::new(), limit).unwrap();
        closed.try_recv().expect("it was closed before the answer");

        let volume = Arc::new(Volume(sender));
        let request = Arc::clone(&volume);
        let started = Instant::now();
        let short = Duration::from_millis(20);
        let error = close(volume, Builder::new(), short).unwrap_err();
        assert!(started.elapsed() < limit, "{:?}", started.elapsed());
        assert!(error.to_string().contains("has not ended"), "{error}");
        assert!(closed.try_recv().is_err());
        drop(request);
        closed.recv_timeout(limit).expect("it is closed later");
    }
}
