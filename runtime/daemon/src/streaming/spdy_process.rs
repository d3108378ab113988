// SPDX-License-Identifier: Apache-2.0
//! Exec and attach over SPDY (`v4.channel.k8s.io`): each standard stream is an SPDY stream, which its headers name.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::session::{Client, FromClient, Left, Output, Size, SizeParser, Source};
use super::spdy::{Connection, Gone, Stream, StreamReader, StreamWriter};
use super::status::Ended;
use super::tokens::Streams;

/// How long the client may take to open its streams. Other runtimes use the same time.
const OPEN_TIME: Duration = Duration::from_secs(30);
const QUEUED_INPUTS: usize = 2;

/// Why a client's streams are not complete.
#[derive(Debug, thiserror::Error)]
pub enum StreamsError {
    #[error("it left before it had opened all its streams")]
    Left,
    #[error("it did not open all its streams within {OPEN_TIME:?}")]
    Late,
}

/// The server's halves of a client's streams.
#[derive(Debug)]
pub struct SpdyOutput {
    connection: Connection,
    error: StreamWriter,
    stdout: Option<StreamWriter>,
    stderr: Option<StreamWriter>,
    /// The server's halves of streams that only the client writes. They stay open until the end of the session, because
    /// the client takes their end for the end of the session.
    silent: Vec<StreamWriter>,
}

/// Waits until the client has opened all streams of the request.
pub async fn client(
    mut connection: Connection,
    wanted: Streams,
) -> Result<Client<SpdyOutput>, StreamsError> {
    let opening = Opened::all(&mut connection, wanted);
    let mut opened = tokio::time::timeout(OPEN_TIME, opening)
        .await
        .map_err(|_| StreamsError::Late)??;
    connection.refuse_more();
    let left = connection.closed();
    let (says, input) = mpsc::channel(QUEUED_INPUTS);
    let (resizes, sizes) = watch::channel(Size::default());
    let readers = (opened.reader("stdin"), opened.reader("resize"));
    tokio::spawn(listen(readers, says, resizes, left.clone()));
    Ok(Client {
        input,
        sizes,
        output: SpdyOutput {
            connection,
            error: opened.writer("error").ok_or(StreamsError::Left)?,
            stdout: opened.writer("stdout"),
            stderr: opened.writer("stderr"),
            silent: opened.rest(),
        },
        left,
    })
}

/// The opened streams by their type. What the client sends on an output stream is never read.
struct Opened(Vec<(&'static str, Option<StreamReader>, Option<StreamWriter>)>);

impl Opened {
    async fn all(connection: &mut Connection, wanted: Streams) -> Result<Self, StreamsError> {
        let mut missing: Vec<&'static str> = [
            ("error", true),
            ("stdin", wanted.stdin),
            ("stdout", wanted.stdout),
            ("stderr", wanted.stderr && !wanted.terminal),
            ("resize", wanted.terminal),
        ]
        .into_iter()
        .filter_map(|(name, wanted)| wanted.then_some(name))
        .collect();
        let mut opened = Vec::new();
        while !missing.is_empty() {
            let stream = connection.next().await.ok_or(StreamsError::Left)?;
            match kind(&stream).and_then(|kind| missing.iter().position(|one| *one == kind)) {
                Some(index) => {
                    let name = missing.swap_remove(index);
                    let halves = stream.accept().await;
                    let (reader, writer) = halves.map_err(|Gone| StreamsError::Left)?;
                    opened.push((name, Some(reader), Some(writer)));
                }
                None => stream.refuse().await,
            }
        }
        Ok(Self(opened))
    }

    fn reader(&mut self, name: &str) -> Option<StreamReader> {
        let found = self.0.iter_mut().find(|(kind, ..)| *kind == name);
        found.and_then(|(_, reader, _)| reader.take())
    }

    fn writer(&mut self, name: &str) -> Option<StreamWriter> {
        let found = self.0.iter_mut().find(|(kind, ..)| *kind == name);
        found.and_then(|(_, _, writer)| writer.take())
    }

    fn rest(self) -> Vec<StreamWriter> {
        self.0
            .into_iter()
            .filter_map(|(.., writer)| writer)
            .collect()
    }
}

fn kind(stream: &Stream) -> Option<&str> {
    stream.headers.get("streamtype").map(String::as_str)
}

/// Receives input and window sizes until the client has left.
async fn listen(
    (mut stdin, mut resize): (Option<StreamReader>, Option<StreamReader>),
    says: mpsc::Sender<FromClient>,
    resizes: watch::Sender<Size>,
    left: CancellationToken,
) {
    let mut sizes = SizeParser::default();
    loop {
        tokio::select! {
            said = next(&mut stdin) => {
                let said = match said {
                    Ok(Some(bytes)) => FromClient::Input(bytes),
                    // The client has reset or finished the stream, so no more input comes.
                    Ok(None) | Err(Gone) => {
                        stdin = None;
                        FromClient::EndOfInput
                    }
                };
                if says.send(said).await.is_err() {
                    return;
                }
            }
            said = next(&mut resize) => match said {
                Ok(Some(bytes)) => if let Some(size) = sizes.push(&bytes) {
                    resizes.send_replace(size);
                },
                Ok(None) | Err(Gone) => resize = None,
            },
            () = left.cancelled(), if stdin.is_none() => return,
            () = says.closed() => return,
        }
    }
}

async fn next(stream: &mut Option<StreamReader>) -> Result<Option<Bytes>, Gone> {
    match stream {
        Some(stream) => stream.next().await,
        None => std::future::pending().await,
    }
}

impl Output for SpdyOutput {
    async fn write(&mut self, source: Source, bytes: Bytes) -> Result<(), Left> {
        let stream = match source {
            Source::Stdout => &mut self.stdout,
            Source::Stderr => &mut self.stderr,
        };
        match stream {
            Some(stream) => stream.send(bytes).await.map_err(|Gone| Left),
            None => Ok(()),
        }
    }

    async fn finish(mut self, ended: Option<Ended>) {
        let Some(ended) = ended else {
            return;
        };
        // An error means that the client has left.
        let _ = self.error.send(ended.status().into()).await;
        let ours = [Some(self.error), self.stdout, self.stderr];
        for stream in ours.into_iter().flatten().chain(self.silent) {
            let _ = stream.finish().await;
        }
        self.connection.finish().await;
    }
}
