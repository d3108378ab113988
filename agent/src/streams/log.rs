// SPDX-License-Identifier: Apache-2.0
//! Serves a container's log on a connection, as described for `LogStream` in `agent.proto`.

use std::io;
use std::sync::Arc;

use bulkhead_proto::agent::log_record;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter};

use super::buffer::Source;
use super::pump::{Log, Next};
use super::records::header;

/// Returns when the host closes the connection, or when another stream replaces this one. At the end of the log it
/// waits until the host has stored everything and closes.
pub async fn serve(
    log: &Arc<Log>,
    start: u64,
    reader: impl AsyncRead + Unpin,
    writer: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let mut replaced = log.reader.subscribe();
    tokio::select! {
        result = send(log, start, writer) => result,
        result = receive(log, reader) => result,
        _ = replaced.changed() => Ok(()),
    }
}

/// Ends the stream that reads the log now, so that a new one can replace it.
pub fn replace_reader(log: &Log) {
    log.reader.send_modify(|generation| *generation += 1);
}

/// Sends the log from `position` on, then the end mark.
async fn send(log: &Log, mut position: u64, writer: impl AsyncWrite + Unpin) -> io::Result<()> {
    let mut writer = BufWriter::with_capacity(64 << 10, writer);
    loop {
        let changed = log.changed();
        match log.next(position) {
            Next::Record(record) => {
                let kind = match record.source {
                    Source::Stdout => log_record::STDOUT,
                    Source::Stderr => log_record::STDERR,
                };
                writer
                    .write_all(&header(kind, record.payload.len()))
                    .await?;
                writer.write_all(&record.payload).await?;
                position += record.payload.len() as u64;
            }
            Next::Wait => {
                writer.flush().await?;
                changed.await;
            }
            Next::End => break,
        }
    }
    writer.write_all(&header(log_record::END, 0)).await?;
    writer.flush().await?;
    // The host closes the connection when it has stored everything.
    std::future::pending().await
}

async fn receive(log: &Log, mut reader: impl AsyncRead + Unpin) -> io::Result<()> {
    loop {
        match reader.read_u64().await {
            Ok(position) => log.acknowledge(position).map_err(io::Error::other)?,
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{replace_reader, serve};
    use crate::streams::buffer::Source;
    use crate::streams::pump::Log;
    use std::sync::Arc;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    fn log_of(bytes: &[u8]) -> Arc<Log> {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&writer, bytes).unwrap();
        let log = Arc::new(Log::default());
        log.attach(vec![(Source::Stderr, reader)]).unwrap();
        log
    }

    fn connect(log: &Arc<Log>) -> DuplexStream {
        let (host, agent) = tokio::io::duplex(1 << 16);
        replace_reader(log);
        let (log, start) = (Arc::clone(log), log.start());
        tokio::spawn(async move {
            let (reader, writer) = tokio::io::split(agent);
            let _ = serve(&log, start, reader, writer).await;
        });
        host
    }

    #[tokio::test]
    async fn records_then_the_end_and_a_second_stream_gets_what_was_not_acknowledged() {
        let log = log_of(b"hello world");
        let mut host = connect(&log);
        let mut seen = [0; 5 + 11 + 5];
        host.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"\x02\0\0\0\x0bhello world\0\0\0\0\0");
        host.write_u64(6).await.unwrap();
        while log.start() < 6 {
            tokio::task::yield_now().await;
        }

        let mut second = connect(&log);
        assert_eq!(
            host.read_u8().await.unwrap_err().kind(),
            std::io::ErrorKind::UnexpectedEof
        );
        let mut seen = [0; 5 + 5 + 5];
        second.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"\x02\0\0\0\x05world\0\0\0\0\0");
    }

    #[tokio::test]
    async fn an_impossible_acknowledgement_ends_the_stream() {
        let log = log_of(b"x");
        let mut host = connect(&log);
        host.write_u64(2).await.unwrap();
        let mut rest = Vec::new();
        host.read_to_end(&mut rest).await.unwrap();
        assert_eq!(log.start(), 0);
    }
}
