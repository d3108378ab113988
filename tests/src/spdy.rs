// SPDX-License-Identifier: Apache-2.0
//! A SPDY/3.1 client with what Kubernetes uses of it. It is written from the specification and shares no code with the
//! server. Like Kubernetes' own clients it has no flow control.

use std::io;

use flate2::{Compress, Compression, FlushCompress};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

use crate::wait::PATIENCE;

/// The server's answer when it refused to switch protocols.
#[derive(Debug)]
pub struct Refused {
    pub code: u16,
    pub body: String,
}

/// A frame from the server.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    Reply(u32),
    Data {
        stream: u32,
        fin: bool,
        bytes: Vec<u8>,
    },
    Reset(u32),
    Ping(u32),
    GoAway(u32),
    Other(u16),
}

#[derive(Debug)]
pub struct Receiver(OwnedReadHalf);

#[derive(Debug)]
pub struct Sender {
    writer: OwnedWriteHalf,
    compress: Compress,
    next: u32,
}

/// Sends the head of a request to the server of `url` and reads the head of the answer.
pub async fn request(url: &str, headers: &[(&str, &str)]) -> (TcpStream, u16, String) {
    let rest = url.strip_prefix("http://").expect("an http URL");
    let (host, path) = rest.split_once('/').expect("a path");
    let mut stream = TcpStream::connect(host).await.expect("connect");
    let mut head = format!("POST /{path} HTTP/1.1\r\nHost: {host}\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await.expect("ask");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.expect("an answer"));
    }
    let answer = String::from_utf8(answer).expect("an answer in text");
    let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    (stream, code.expect("a status code"), answer)
}

/// Upgrades a connection to SPDY and offers `protocols`.
pub async fn connect(url: &str, protocols: &[&str]) -> Result<(Sender, Receiver), Refused> {
    let mut headers = vec![("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")];
    headers.extend(
        protocols
            .iter()
            .map(|one| ("X-Stream-Protocol-Version", *one)),
    );
    let (mut stream, code, answer) = request(url, &headers).await;
    if code != 101 {
        let mut body = String::new();
        let _ = stream.read_to_string(&mut body).await;
        return Err(Refused { code, body });
    }
    let chosen = answer.to_ascii_lowercase();
    let chosen: Vec<_> = chosen
        .lines()
        .filter_map(|line| line.strip_prefix("x-stream-protocol-version: "))
        .collect();
    assert_eq!(chosen.len(), 1, "one protocol is chosen: {answer}");
    assert!(protocols.contains(&chosen[0]), "of those offered: {answer}");
    stream.set_nodelay(true).expect("no delay");
    let (reader, writer) = stream.into_split();
    let sender = Sender {
        writer,
        // No SPDY dictionary: a zlib stream says itself whether it needs one. The server's unit tests use the
        // dictionary.
        compress: Compress::new(Compression::fast(), true),
        next: 1,
    };
    Ok((sender, Receiver(reader)))
}

impl Sender {
    /// Opens a stream and returns its number.
    pub async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let mut plain = number(headers.len()).to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend(number(text.len()));
            plain.extend(text.as_bytes());
        }
        self.open_raw(&plain).await
    }

    /// Opens a stream with any header block, valid or not.
    pub async fn open_raw(&mut self, plain: &[u8]) -> u32 {
        let mut block = Vec::with_capacity(plain.len() + 4096);
        self.compress
            .compress_vec(plain, &mut block, FlushCompress::Sync)
            .expect("compress headers");
        let stream = self.next;
        self.next += 2;
        let mut payload = number(stream as usize).to_vec();
        payload.extend([0; 6]);
        payload.extend(block);
        self.control(1, &payload).await.expect("open a stream");
        stream
    }

    pub async fn data(&mut self, stream: u32, bytes: &[u8]) -> io::Result<()> {
        for chunk in bytes.chunks(32 << 10) {
            self.frame(number(stream as usize), 0, chunk).await?;
        }
        Ok(())
    }

    pub async fn fin(&mut self, stream: u32) -> io::Result<()> {
        self.frame(number(stream as usize), 1, &[]).await
    }

    pub async fn ping(&mut self, id: u32) {
        let id = number(id as usize);
        self.control(6, &id).await.expect("send a ping");
    }

    pub async fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.writer.write_all(bytes).await
    }

    async fn control(&mut self, kind: u8, payload: &[u8]) -> io::Result<()> {
        self.frame([0x80, 3, 0, kind], 0, payload).await
    }

    async fn frame(&mut self, head: [u8; 4], flags: u8, payload: &[u8]) -> io::Result<()> {
        let [_, a, b, c] = number(payload.len());
        let mut bytes = head.to_vec();
        bytes.extend([flags, a, b, c]);
        bytes.extend(payload);
        self.writer.write_all(&bytes).await
    }
}

impl Receiver {
    /// Reads the next frame; `None` once the server has closed the connection.
    pub async fn next(&mut self) -> Option<Frame> {
        let mut head = [0; 8];
        self.0.read_exact(&mut head).await.ok()?;
        let [a, b, c, d, flags, l1, l2, l3] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, l1, l2, l3]) as usize];
        self.0.read_exact(&mut payload).await.ok()?;
        if a & 0x80 == 0 {
            return Some(Frame::Data {
                stream: u32::from_be_bytes([a, b, c, d]),
                fin: flags & 1 != 0,
                bytes: payload,
            });
        }
        let at = |index: usize| {
            let bytes = payload.get(index..index + 4).expect("a whole frame");
            u32::from_be_bytes(bytes.try_into().expect("four bytes"))
        };
        Some(match d {
            2 => Frame::Reply(at(0)),
            3 => Frame::Reset(at(0)),
            6 => Frame::Ping(at(0)),
            7 => Frame::GoAway(at(4)),
            other => Frame::Other(other.into()),
        })
    }

    /// Reads the next frame that is not a window update.
    pub async fn next_but_windows(&mut self) -> Option<Frame> {
        loop {
            match self.next().await {
                Some(Frame::Other(_)) => {}
                frame => return frame,
            }
        }
    }
}

fn number(number: usize) -> [u8; 4] {
    u32::try_from(number).expect("a small number").to_be_bytes()
}

/// The streams of one exec or attach.
#[derive(Debug)]
pub struct Process {
    pub sender: Sender,
    pub receiver: Receiver,
    pub stdin: Option<u32>,
    pub resize: Option<u32>,
    stdout: Option<u32>,
    stderr: Option<u32>,
    error: u32,
    pub seen: Outcome,
}

/// What a process has written so far, and the status at its end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub status: String,
}

impl Outcome {
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

pub const PROCESS_PROTOCOLS: [&str; 4] = [
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v3.channel.k8s.io",
    "channel.k8s.io",
];

impl Process {
    /// Opens the stream `error` and the streams named in `kinds`, in the order of Kubernetes' clients.
    pub async fn connect(url: &str, kinds: &[&str]) -> Self {
        let connected = connect(url, &PROCESS_PROTOCOLS).await;
        let (mut sender, mut receiver) = connected.expect("an upgrade to SPDY");
        let error = open(&mut sender, &mut receiver, "error").await;
        let mut process = Self {
            sender,
            receiver,
            stdin: None,
            resize: None,
            stdout: None,
            stderr: None,
            error,
            seen: Outcome::default(),
        };
        for kind in kinds {
            let stream = open(&mut process.sender, &mut process.receiver, kind).await;
            let place = match *kind {
                "stdin" => &mut process.stdin,
                "stdout" => &mut process.stdout,
                "stderr" => &mut process.stderr,
                "resize" => &mut process.resize,
                other => panic!("no stream is called {other}"),
            };
            *place = Some(stream);
        }
        process
    }

    pub async fn input(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.expect("a stdin stream");
        self.sender.data(stdin, bytes).await.expect("send input");
    }

    pub async fn end_input(&mut self) {
        let stdin = self.stdin.expect("a stdin stream");
        self.sender.fin(stdin).await.expect("end the input");
    }

    pub async fn resize(&mut self, columns: u16, rows: u16) {
        let resize = self.resize.expect("a resize stream");
        let size = format!("{{\"Width\":{columns},\"Height\":{rows}}}\n");
        let sent = self.sender.data(resize, size.as_bytes()).await;
        sent.expect("send a window size");
    }

    /// Reads one frame. Returns false once the server has closed the connection.
    pub async fn step(&mut self) -> bool {
        let frame = timeout(PATIENCE, self.receiver.next()).await;
        match frame.unwrap_or_else(|_| panic!("no more after {:?}", self.seen)) {
            Some(Frame::Data { stream, fin, bytes }) => {
                // Kubernetes' clients end the session when the server closes its half of stdin.
                let ended = !self.seen.status.is_empty();
                assert!(
                    ended || !fin || Some(stream) != self.stdin,
                    "stdin ended early"
                );
                let stream = Some(stream);
                if stream == self.stdout {
                    self.seen.stdout.extend(bytes);
                } else if stream == self.stderr {
                    self.seen.stderr.extend(bytes);
                } else if stream == Some(self.error) {
                    self.seen.status += &String::from_utf8_lossy(&bytes);
                }
                true
            }
            Some(_) => true,
            None => false,
        }
    }

    /// Reads until `enough` is true.
    pub async fn until(&mut self, enough: impl Fn(&Outcome) -> bool) {
        while !enough(&self.seen) {
            assert!(
                self.step().await,
                "the server closed the connection after {:?}",
                self.seen
            );
        }
    }

    /// Reads until the server closes the connection.
    pub async fn end(mut self) -> Outcome {
        while self.step().await {}
        self.seen
    }
}

/// Opens a stream and waits for the reply, as Kubernetes' clients do.
pub async fn open(sender: &mut Sender, receiver: &mut Receiver, kind: &str) -> u32 {
    open_with(sender, receiver, &[("streamtype", kind)]).await
}

pub async fn open_with(
    sender: &mut Sender,
    receiver: &mut Receiver,
    headers: &[(&str, &str)],
) -> u32 {
    let stream = sender.open(headers).await;
    let reply = timeout(PATIENCE, receiver.next_but_windows()).await;
    let reply = reply.expect("a reply in time");
    assert_eq!(reply, Some(Frame::Reply(stream)), "{headers:?}");
    stream
}
