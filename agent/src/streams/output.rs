// SPDX-License-Identifier: Apache-2.0
//! Sends the output of a command's pipe or terminal to the host.

use std::os::fd::OwnedFd;
use std::time::Duration;

use bulkhead_proto::agent::record::{HEADER_BYTES, MAX_PAYLOAD_BYTES, STDERR, STDOUT};
use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use super::buffer::Source;
use super::records::{self, ToHost};

/// How long to wait for the end of output after the command has ended: a descendant may hold it open.
const DRAIN_TIME: Duration = Duration::from_secs(2);
/// Output that was in the pipe when the command ended is always sent, however slow the host is. No pipe holds more.
const LARGEST_PIPE_BYTES: usize = 1 << 20;

/// Sends output until its end, until the host has left, or until some time after `ended`.
pub async fn pump(
    source: Source,
    pipe: &AsyncFd<OwnedFd>,
    host: &mpsc::Sender<ToHost>,
    mut ended: watch::Receiver<bool>,
) {
    let late = async {
        if ended.wait_for(|ended| *ended).await.is_ok() {
            sleep(DRAIN_TIME).await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    tokio::pin!(late);
    let mut is_late = false;
    let mut sent_late = 0;
    loop {
        let mut ready = None;
        if !is_late {
            tokio::select! {
                readable = pipe.readable() => match readable {
                    Ok(guard) => ready = Some(guard),
                    Err(_) => return,
                },
                () = &mut late => is_late = true,
            }
        }
        match read(source, pipe) {
            Ok(Some(record)) => {
                if is_late {
                    sent_late += record.0.len();
                }
                if host.send(record).await.is_err() || sent_late > LARGEST_PIPE_BYTES {
                    return;
                }
            }
            Ok(None) => return,
            Err(Errno::AGAIN) => match &mut ready {
                Some(ready) => ready.clear_ready(),
                None => return,
            },
            Err(Errno::INTR) => {}
            // A terminal returns EIO when nobody has it open any more.
            Err(_) => return,
        }
    }
}

/// Reads one record, without copying its payload. `None` at the end.
fn read(source: Source, pipe: &AsyncFd<OwnedFd>) -> rustix::io::Result<Option<ToHost>> {
    let kind = match source {
        Source::Stdout => STDOUT,
        Source::Stderr => STDERR,
    };
    let mut bytes = Vec::with_capacity(HEADER_BYTES + MAX_PAYLOAD_BYTES);
    bytes.extend_from_slice(&records::header(kind, 0));
    // Reads at most the spare capacity, so the payload is not longer than allowed.
    let length = rustix::io::read(pipe.get_ref(), spare_capacity(&mut bytes))?;
    if length == 0 {
        return Ok(None);
    }
    bytes[..HEADER_BYTES].copy_from_slice(&records::header(kind, length));
    Ok(Some(ToHost(bytes)))
}

#[cfg(test)]
mod tests {
    use super::pump;
    use crate::streams::buffer::Source;
    use crate::streams::records::ToHost;
    use crate::sys;
    use std::os::fd::OwnedFd;
    use tokio::io::unix::AsyncFd;
    use tokio::sync::{mpsc, watch};

    fn pipe_with(text: &[u8]) -> (AsyncFd<OwnedFd>, OwnedFd) {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&writer, text).unwrap();
        (sys::watch(reader).unwrap(), writer)
    }

    async fn all(mut told: mpsc::Receiver<ToHost>) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(record) = told.recv().await {
            all.extend(record.0);
        }
        all
    }

    #[tokio::test]
    async fn output_comes_until_its_end() {
        let (pipe, writer) = pipe_with(b"hello");
        drop(writer);
        let (host, told) = mpsc::channel(2);
        let (_running, ended) = watch::channel(false);
        pump(Source::Stdout, &pipe, &host, ended).await;
        drop(host);
        assert_eq!(all(told).await, b"\x01\0\0\0\x05hello");
    }

    #[tokio::test(start_paused = true)]
    async fn a_child_that_holds_the_pipe_does_not_hold_the_session() {
        let (pipe, _held) = pipe_with(b"hello");
        let (host, told) = mpsc::channel(2);
        let (running, ended) = watch::channel(false);
        running.send_replace(true);
        pump(Source::Stderr, &pipe, &host, ended).await;
        drop(host);
        assert_eq!(all(told).await, b"\x02\0\0\0\x05hello");
    }
}
