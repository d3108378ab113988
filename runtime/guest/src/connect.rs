// SPDX-License-Identifier: Apache-2.0
//! Connections into the guest. They go through the VMM's vsock socket, and begin with a line that names the port.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_faults::{self as faults, Fault, Step};
use bulkhead_proto::agent::{
    LogStream, MirrorStream, OpenStream, STREAM_PORT, StreamOpened, open_stream,
};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::text::bounded;

/// How long a guest may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest answer, which is `OK <port>\n`.
const ANSWER_BYTES: usize = 32;
/// The longest answer to the header of a stream.
const HEADER_BYTES: u32 = 64 << 10;

/// An error about a connection into a guest.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("connect to port {port} of the guest through {path}")]
    Connect {
        port: u32,
        path: PathBuf,
        source: io::Error,
    },
    #[error("port {port} of the guest did not answer within {CONNECT_TIMEOUT:?}")]
    Timeout { port: u32 },
    #[error("port {port} of the guest refused: {answer:?}")]
    Refused { port: u32, answer: String },
    #[error("open a stream in the guest")]
    Stream(#[source] io::Error),
    #[error("the guest refused a stream: {0}")]
    StreamRefused(String),
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// Connects to a port of the guest. `vsock` is the VMM's socket.
pub async fn connect(vsock: &Path, port: u32) -> Result<UnixStream, ConnectError> {
    let connecting = async {
        let mut stream = UnixStream::connect(vsock).await?;
        stream
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .await?;
        let answer = read_line(&mut stream).await?;
        Ok::<_, io::Error>((stream, answer))
    };
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, connecting)
        .await
        .map_err(|_| ConnectError::Timeout { port })?;
    let (stream, answer) = connected.map_err(|source| ConnectError::Connect {
        port,
        path: vsock.to_owned(),
        source,
    })?;
    if answer.starts_with("OK ") {
        return Ok(stream);
    }
    Err(ConnectError::Refused { port, answer })
}

/// Opens the log of a container. Also returns how many payload bytes came before its first record.
pub async fn open_log(vsock: &Path, container: &str) -> Result<(UnixStream, u64), ConnectError> {
    let kind = open_stream::Kind::Log(LogStream {
        container_id: container.to_owned(),
    });
    let (stream, opened) = open_stream(vsock, OpenStream { kind: Some(kind) }).await?;
    Ok((stream, opened.log_offset))
}

/// Opens the stream on which the states of a mirrored volume are sent.
pub async fn open_mirror(vsock: &Path, volume: &str) -> Result<UnixStream, ConnectError> {
    let volume = volume.to_owned();
    open(vsock, open_stream::Kind::Mirror(MirrorStream { volume })).await
}

/// Opens a stream of any other kind.
pub(crate) async fn open(
    vsock: &Path,
    kind: open_stream::Kind,
) -> Result<UnixStream, ConnectError> {
    let (stream, _) = open_stream(vsock, OpenStream { kind: Some(kind) }).await?;
    Ok(stream)
}

async fn open_stream(
    vsock: &Path,
    header: OpenStream,
) -> Result<(UnixStream, StreamOpened), ConnectError> {
    faults::before(Step::OpenStream)?;
    let mut stream = connect(vsock, STREAM_PORT).await?;
    let exchange = async {
        write_message(&mut stream, &header).await?;
        read_message::<StreamOpened>(&mut stream, HEADER_BYTES).await
    };
    let opened = tokio::time::timeout(CONNECT_TIMEOUT, exchange)
        .await
        .map_err(|_| ConnectError::Timeout { port: STREAM_PORT })?
        .map_err(ConnectError::Stream)?;
    if !opened.error.is_empty() {
        return Err(ConnectError::StreamRefused(bounded(&opened.error)));
    }
    faults::after(Step::OpenStream)?;
    Ok((stream, opened))
}

/// Writes a message after its length, which is four bytes, big-endian.
pub async fn write_message(
    stream: &mut (impl AsyncWriteExt + Unpin),
    message: &impl Message,
) -> io::Result<()> {
    let body = message.encode_to_vec();
    let length = u32::try_from(body.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend_from_slice(&body);
    stream.write_all(&bytes).await
}

/// Reads a message of at most `limit` bytes.
pub async fn read_message<M: Message + Default>(
    stream: &mut (impl AsyncReadExt + Unpin),
    limit: u32,
) -> io::Result<M> {
    let length = stream.read_u32().await?;
    if length > limit {
        let text = format!("a message of {length} bytes is too long: the maximum is {limit}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut body = vec![0; usize::try_from(length).unwrap_or(0)];
    stream.read_exact(&mut body).await?;
    M::decode(body.as_slice()).map_err(io::Error::other)
}

/// Reads up to a line feed and not a byte more, because what follows belongs to the user of the connection.
async fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::new();
    while line.len() < ANSWER_BYTES {
        match stream.read_u8().await? {
            b'\n' => break,
            byte => line.push(byte),
        }
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// A VMM that answers every `CONNECT` with `answer`, then with `then`.
    fn vmm(answer: &'static [u8], then: Vec<u8>) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            read_line(&mut stream).await.unwrap();
            stream.write_all(answer).await.unwrap();
            stream.write_all(&then).await.unwrap();
            stream.shutdown().await.unwrap();
            // Wait for the other end, which may still be writing.
            let _ = stream.read_to_end(&mut Vec::new()).await;
        });
        (directory, path)
    }

    #[tokio::test]
    async fn bytes_after_the_answer_belong_to_the_connection() {
        let (_directory, path) = vmm(b"OK 1073741824\n", b"rest".to_vec());
        let mut stream = connect(&path, 7).await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "rest");
    }

    #[tokio::test]
    async fn a_refusal_and_a_missing_socket_are_errors() {
        let (_directory, path) = vmm(b"NO\n", Vec::new());
        assert!(matches!(
            connect(&path, 7).await,
            Err(ConnectError::Refused { .. })
        ));
        let missing = path.with_extension("missing");
        assert!(matches!(
            connect(&missing, 7).await,
            Err(ConnectError::Connect { .. })
        ));
    }

    #[tokio::test]
    async fn a_log_opens_with_its_offset_or_says_why_not() {
        let reply = |opened: StreamOpened| {
            let body = opened.encode_to_vec();
            let mut bytes = u32::try_from(body.len()).unwrap().to_be_bytes().to_vec();
            bytes.extend(body);
            bytes
        };
        let opened = StreamOpened {
            log_offset: 42,
            ..Default::default()
        };
        let (_directory, path) = vmm(b"OK 1\n", reply(opened));
        assert_eq!(open_log(&path, "c").await.unwrap().1, 42);
        let refused = StreamOpened {
            error: "no such container".into(),
            ..Default::default()
        };
        let (_directory, path) = vmm(b"OK 1\n", reply(refused));
        let error = open_log(&path, "c").await.unwrap_err();
        assert!(error.to_string().contains("no such container"));
    }

    #[tokio::test]
    async fn what_a_guest_says_of_a_refusal_is_cut_and_made_printable() {
        let refusal = StreamOpened {
            error: format!("\x1b[2J{}", "x".repeat(60_000)),
            ..Default::default()
        };
        let mut said = Vec::new();
        write_message(&mut said, &refusal).await.unwrap();
        let (_directory, path) = vmm(b"OK 1\n", said);
        let error = open_log(&path, "c").await.unwrap_err().to_string();
        assert!(error.len() < 5000, "{}", error.len());
        assert!(!error.contains('\x1b'));
    }

    #[tokio::test]
    async fn a_message_over_its_bound_is_refused_before_it_is_read() {
        let mut bytes: &[u8] = &[255, 255, 255, 255, 0];
        let error = read_message::<StreamOpened>(&mut bytes, 10)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
