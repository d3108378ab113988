// SPDX-License-Identifier: Apache-2.0
//! Moves output from a container's pipes or terminal into its log, as fast as the host stores it.
//!
//! There is one task per pipe. It reads only when the log has space. So a container that writes faster than the
//! host stores is slowed down, as by any pipe.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bulkhead_proto::agent::log_record::MAX_PAYLOAD_BYTES;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, watch};

use crate::sys;

use super::buffer::{BadAcknowledgement, LogBuffer, Record, Source};
use super::tap::Tap;

/// How long a pipe may stay open without data after the container's end. A process that left the container's
/// cgroup could hold it open for ever.
const SILENCE_AFTER_EXIT: Duration = Duration::from_secs(3);

/// A container's log, shared by the tasks that fill it and the stream that serves it.
#[derive(Debug)]
pub struct Log {
    state: Mutex<State>,
    /// Notified when there is something to read, or the end has been reached.
    readable: Notify,
    /// Notified when there may be space for more.
    writable: Notify,
    /// The number of the newest stream. When it changes, older streams end.
    pub reader: watch::Sender<u64>,
    exited: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    buffer: LogBuffer,
    open_pipes: usize,
    started: bool,
    closed: bool,
    taps: Vec<Weak<Tap>>,
    /// Those that are still read.
    pipes: Vec<Weak<AsyncFd<OwnedFd>>>,
}

impl State {
    fn has_ended(&self) -> bool {
        self.closed || (self.started && self.open_pipes == 0)
    }

    /// The taps that somebody still reads.
    fn taps(&mut self) -> impl Iterator<Item = Arc<Tap>> {
        self.taps.retain(|tap| tap.strong_count() > 0);
        self.taps.iter().filter_map(Weak::upgrade)
    }

    fn end_taps(&mut self) {
        if self.has_ended() {
            self.taps().for_each(|tap| tap.end());
        }
    }
}

/// What a reader finds at a position.
#[derive(Debug)]
pub enum Next {
    Record(Record),
    Wait,
    End,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            readable: Notify::new(),
            writable: Notify::new(),
            reader: watch::Sender::new(0),
            exited: watch::Sender::new(false),
        }
    }
}

impl Log {
    /// Starts reading from `pipes`, which are all pipes of the container.
    pub fn attach(self: &Arc<Self>, pipes: Vec<(Source, OwnedFd)>) -> std::io::Result<()> {
        let mut pumps = Vec::new();
        for (source, pipe) in pipes {
            pumps.push((source, Arc::new(sys::watch(pipe)?)));
        }
        let mut state = self.lock();
        state.started = true;
        state.open_pipes = pumps.len();
        state.pipes = pumps.iter().map(|(_, pipe)| Arc::downgrade(pipe)).collect();
        drop(state);
        for (source, pipe) in pumps {
            let log = Arc::clone(self);
            tokio::spawn(async move {
                log.pump(source, &pipe).await;
                let mut state = log.lock();
                state.open_pipes -= 1;
                state.end_taps();
                drop(state);
                log.readable.notify_waiters();
            });
        }
        Ok(())
    }

    /// The container has exited. It writes no more; its pipes may still hold output.
    pub fn container_exited(&self) {
        let mut state = self.lock();
        state.started = true;
        state.end_taps();
        drop(state);
        self.exited.send_replace(true);
        self.readable.notify_waiters();
    }

    /// The container is removed. A reader gets the rest of the log and then its end.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.end_taps();
        drop(state);
        self.readable.notify_waiters();
        self.writable.notify_waiters();
    }

    pub fn start(&self) -> u64 {
        self.lock().buffer.start()
    }

    pub fn next(&self, position: u64) -> Next {
        let state = self.lock();
        match state.buffer.next(position) {
            Some(record) => Next::Record(record),
            None if state.has_ended() => Next::End,
            None => Next::Wait,
        }
    }

    /// Sends output from now on to `tap`, too, as long as somebody holds it.
    pub fn tap(&self, tap: &Arc<Tap>) {
        let mut state = self.lock();
        state.taps.push(Arc::downgrade(tap));
        state.end_taps();
    }

    /// Resolves when [`Self::next`] may return something new. Call this before `next`.
    pub fn changed(&self) -> tokio::sync::futures::Notified<'_> {
        self.readable.notified()
    }

    pub fn acknowledge(&self, position: u64) -> Result<(), BadAcknowledgement> {
        self.lock().buffer.acknowledge(position)?;
        self.writable.notify_waiters();
        Ok(())
    }

    /// Resolves when the host has stored all that the container has written. Call it when the container writes no more,
    /// because it is frozen.
    pub async fn stored(&self) {
        loop {
            let changed = self.writable.notified();
            if self.is_stored() {
                return;
            }
            changed.await;
        }
    }

    fn is_stored(&self) -> bool {
        let state = self.lock();
        let mut pipes = state.pipes.iter().filter_map(Weak::upgrade);
        let has_more = |pipe: Arc<AsyncFd<OwnedFd>>| {
            let bytes = rustix::io::ioctl_fionread(pipe.get_ref());
            bytes.is_ok_and(|bytes| bytes > 0)
        };
        state.buffer.is_stored() && !pipes.any(has_more)
    }

    /// Moves the output of one pipe into the log, until its end or until it has been silent after the container's exit.
    async fn pump(&self, source: Source, pipe: &AsyncFd<OwnedFd>) {
        let mut chunk = vec![0; MAX_PAYLOAD_BYTES];
        let mut exited = self.exited.subscribe();
        loop {
            let room = self.wait_for_room().await;
            if room == 0 {
                return;
            }
            let ready = tokio::select! {
                ready = pipe.readable() => ready,
                () = silence(&mut exited) => return,
            };
            let Ok(mut ready) = ready else { return };
            // There is no await between this check and the append, so the space cannot be taken by another task.
            let room = self.lock().buffer.room().min(chunk.len());
            if room == 0 {
                continue;
            }
            match rustix::io::read(pipe.get_ref(), &mut chunk[..room]) {
                Ok(0) => return,
                Ok(length) => self.append(source, &chunk[..length]),
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                // A terminal returns EIO when nobody has it open any more.
                Err(_) => return,
            }
        }
    }

    /// Waits for space. Returns 0 when the log is closed.
    async fn wait_for_room(&self) -> usize {
        loop {
            let changed = self.writable.notified();
            {
                let state = self.lock();
                if state.closed {
                    return 0;
                }
                let room = state.buffer.room();
                if room > 0 {
                    return room;
                }
            }
            changed.await;
        }
    }

    fn append(&self, source: Source, bytes: &[u8]) {
        let mut state = self.lock();
        state.buffer.append(source, bytes);
        state.taps().for_each(|tap| tap.offer(source, bytes));
        drop(state);
        self.readable.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Resolves some time after the container's end.
async fn silence(exited: &mut watch::Receiver<bool>) {
    let ended = exited.wait_for(|exited| *exited).await.is_ok();
    if ended {
        tokio::time::sleep(SILENCE_AFTER_EXIT).await;
    } else {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::{Log, Next};
    use crate::streams::buffer::Source;
    use crate::streams::tap::{self, Tap, Wanted};
    use std::io::Write;
    use std::sync::Arc;
    use std::time::Duration;

    async fn wait_for_end(log: &Log, mut position: u64) -> u64 {
        loop {
            let changed = log.changed();
            match log.next(position) {
                Next::Record(record) => {
                    position += record.payload.len() as u64;
                    log.acknowledge(position).unwrap();
                }
                Next::End => return position,
                Next::Wait => changed.await,
            }
        }
    }

    #[tokio::test]
    async fn a_log_that_nobody_reads_stops_at_its_capacity_and_loses_nothing() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let log = Arc::new(Log::default());
        log.attach(vec![(Source::Stdout, reader)]).unwrap();
        const TOTAL: usize = 3 << 20;
        let thread = std::thread::spawn(move || {
            std::fs::File::from(writer)
                .write_all(&vec![b'x'; TOTAL])
                .unwrap();
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!thread.is_finished());
        assert!(log.lock().buffer.room() < 100);
        assert_eq!(wait_for_end(&log, 0).await, TOTAL as u64);
        thread.join().unwrap();
    }

    #[tokio::test]
    async fn taps_get_what_comes_while_they_are_held_and_the_log_all_of_it() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let log = Arc::new(Log::default());
        let wanted = Wanted {
            stdout: true,
            stderr: true,
        };
        let (kept, dropped) = (Arc::new(Tap::new(wanted)), Arc::new(Tap::new(wanted)));
        log.tap(&kept);
        log.tap(&dropped);
        drop(dropped);
        log.attach(vec![(Source::Stdout, reader)]).unwrap();
        rustix::io::write(&writer, b"hello").unwrap();
        let first = kept.next().await;
        let hello = tap::Next::Output(Source::Stdout, b"hello".to_vec());
        assert_eq!(first, Some(hello));
        assert_eq!(log.lock().taps().count(), 1);
        drop(writer);
        assert_eq!(kept.next().await, None);
        assert_eq!(wait_for_end(&log, 0).await, 5);
        let late = Arc::new(Tap::new(wanted));
        log.tap(&late);
        assert_eq!(late.next().await, None);
    }

    #[tokio::test]
    async fn a_log_is_stored_when_its_pipes_are_empty_and_all_of_it_is_acknowledged() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let log = Arc::new(Log::default());
        log.stored().await;
        log.attach(vec![(Source::Stdout, reader)]).unwrap();
        rustix::io::write(&writer, b"hello").unwrap();
        assert!(!log.is_stored(), "it is in the pipe");
        let waiting = tokio::spawn({
            let log = Arc::clone(&log);
            async move { log.stored().await }
        });
        while matches!(log.next(0), Next::Wait) {
            tokio::task::yield_now().await;
        }
        log.acknowledge(4).unwrap();
        assert!(!log.is_stored());
        log.acknowledge(5).unwrap();
        waiting.await.unwrap();
        drop(writer);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pipe_that_stays_open_ends_a_while_after_the_container() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let log = Arc::new(Log::default());
        log.attach(vec![(Source::Stdout, reader)]).unwrap();
        log.container_exited();
        assert_eq!(wait_for_end(&log, 0).await, 0);
        drop(writer);
    }
}
