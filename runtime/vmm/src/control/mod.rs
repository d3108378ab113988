// SPDX-License-Identifier: Apache-2.0
//! The control socket: newline-delimited JSON over a unix stream socket, one reply per request. This
//! file has the messages and the client; [`server`] is the other end.
//!
//! A file descriptor is sent together with the bytes of its request (SCM_RIGHTS).

pub mod server;

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::{Deserialize, Serialize};

use crate::extent::Extent;
use crate::statistics::Statistics;

/// The longest request or reply, including its newline.
pub const LINE_BYTES: usize = 16 << 10;
/// How long a request may take until its whole reply is there.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A request to a VMM. None of them waits for a disk or volume of the host that hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Carries a descriptor: a regular file, open for reading only.
    AttachExtent,
    /// Carries a descriptor. Either a block device, open for reading or for reading and synchronous
    /// writing (O_DSYNC); or a regular file, open for both, to which nobody else writes.
    AttachVolume,
    /// Carries a descriptor of a file that may be on the volume disk. The reply is its extent there.
    FindVolume,
    /// Takes off and closes the volume that begins at this sector. It is no error if there is none. It fails if a
    /// request to the volume hangs. The volume is off the disk all the same, and is closed when that request ends.
    DetachVolume {
        first_sector: u64,
    },
    /// Carries a descriptor: a stream socket whose other end is a file server.
    ConnectFiles,
    /// Sets how many pages of 4 KiB the guest should put into its balloon. The host takes their memory
    /// back. 0 lets the guest use them again. The statistics say how many pages are in the balloon.
    Balloon {
        pages: u32,
    },
    Statistics,
    /// The reply comes when no vCPU runs any more.
    Pause,
    Resume,
    /// Only for a template: writes the VM's state to the file that it was started with, then ends the VM. It must be quiet:
    /// a connection into the guest refuses the request, and the VM goes on.
    Save,
    /// Ends the VM. The reply is sent before it ends.
    Stop,
}

/// The answer to a request. `Extent` answers the requests that attach or find something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    Done,
    Extent(Extent),
    Statistics(Box<Statistics>),
    Failed { message: String },
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("connect to control socket")]
    Connect(#[source] io::Error),
    #[error("send request")]
    Send(#[source] io::Error),
    #[error("receive reply")]
    Receive(#[source] io::Error),
    #[error("control socket closed without a reply")]
    Closed,
    #[error("parse reply")]
    Parse(#[source] serde_json::Error),
    #[error("reply does not match the request")]
    WrongReply,
    #[error("refused: {0}")]
    Refused(String),
}

/// A connection to a VMM. It blocks, with a time limit for each request.
#[derive(Debug)]
pub struct Client {
    socket: BufReader<UnixStream>,
}

impl Client {
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let connect = || {
            let socket = UnixStream::connect(path)?;
            socket.set_write_timeout(Some(TIMEOUT))?;
            Ok(socket)
        };
        let socket = connect().map_err(ClientError::Connect)?;
        Ok(Self {
            socket: BufReader::with_capacity(4096, socket),
        })
    }

    /// Appends a file to the image disk.
    pub fn attach_extent(&mut self, file: &File) -> Result<Extent, ClientError> {
        match self.call(Request::AttachExtent, Some(file.as_fd()))? {
            Reply::Extent(extent) => Ok(extent),
            _ => Err(ClientError::WrongReply),
        }
    }

    /// Puts a block device, or a file with a file system, on the volume disk.
    pub fn attach_volume(&mut self, device: &File) -> Result<Extent, ClientError> {
        match self.call(Request::AttachVolume, Some(device.as_fd()))? {
            Reply::Extent(extent) => Ok(extent),
            _ => Err(ClientError::WrongReply),
        }
    }

    /// Asks where a file is on the volume disk. An error if it is not there.
    pub fn find_volume(&mut self, file: &File) -> Result<Extent, ClientError> {
        match self.call(Request::FindVolume, Some(file.as_fd()))? {
            Reply::Extent(extent) => Ok(extent),
            _ => Err(ClientError::WrongReply),
        }
    }

    /// Takes a volume off the volume disk.
    pub fn detach_volume(&mut self, first_sector: u64) -> Result<(), ClientError> {
        self.expect_done(Request::DetachVolume { first_sector })
    }

    /// Connects the guest's virtio-fs device to a file server.
    pub fn connect_files(&mut self, server: BorrowedFd<'_>) -> Result<(), ClientError> {
        match self.call(Request::ConnectFiles, Some(server))? {
            Reply::Done => Ok(()),
            _ => Err(ClientError::WrongReply),
        }
    }

    /// Asks the guest to put this many pages of 4 KiB into its balloon.
    pub fn balloon(&mut self, pages: u32) -> Result<(), ClientError> {
        self.expect_done(Request::Balloon { pages })
    }

    pub fn statistics(&mut self) -> Result<Statistics, ClientError> {
        match self.call(Request::Statistics, None)? {
            Reply::Statistics(statistics) => Ok(*statistics),
            _ => Err(ClientError::WrongReply),
        }
    }

    pub fn pause(&mut self) -> Result<(), ClientError> {
        self.expect_done(Request::Pause)
    }

    pub fn resume(&mut self) -> Result<(), ClientError> {
        self.expect_done(Request::Resume)
    }

    /// Saves a template, which ends then. Refused as long as somebody is connected to its guest.
    pub fn save(&mut self) -> Result<(), ClientError> {
        self.expect_done(Request::Save)
    }

    pub fn stop(&mut self) -> Result<(), ClientError> {
        self.expect_done(Request::Stop)
    }

    fn expect_done(&mut self, request: Request) -> Result<(), ClientError> {
        match self.call(request, None)? {
            Reply::Done => Ok(()),
            _ => Err(ClientError::WrongReply),
        }
    }

    fn call(
        &mut self,
        request: Request,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<Reply, ClientError> {
        let mut line = serde_json::to_vec(&request).map_err(ClientError::Parse)?;
        line.push(b'\n');
        let deadline = Instant::now() + TIMEOUT;
        self.send(&line, file).map_err(ClientError::Send)?;
        let answer = self.receive(deadline).map_err(ClientError::Receive)?;
        if answer.is_empty() {
            return Err(ClientError::Closed);
        }
        match serde_json::from_slice(&answer).map_err(ClientError::Parse)? {
            Reply::Failed { message } => Err(ClientError::Refused(message)),
            reply => Ok(reply),
        }
    }

    /// Receives a line. The limit is for all of it: a VMM whose guest has taken it over may send a byte now and then.
    fn receive(&mut self, deadline: Instant) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        while line.len() < LINE_BYTES {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.socket.get_ref().set_read_timeout(Some(left))?;
            let ready = match self.socket.fill_buf() {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                ready => ready?,
            };
            let end = ready.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(ready.len(), |end| end + 1);
            line.extend_from_slice(ready.get(..taken).unwrap_or_default());
            self.socket.consume(taken);
            if end.is_some() || taken == 0 {
                break;
            }
        }
        Ok(line)
    }

    fn send(&mut self, line: &[u8], file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = file.map(|file| [file]);
        if let Some(fds) = &fds {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let mut socket = self.socket.get_ref();
        let bytes = [IoSlice::new(line)];
        let sent = rustix::net::sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL)?;
        socket.write_all(line.get(sent..).unwrap_or(&[]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_that_drips_is_not_waited_for() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut client = Client {
            socket: BufReader::new(ours),
        };
        theirs.write_all(b"one\ntw").unwrap();
        let soon = || Instant::now() + Duration::from_millis(200);
        assert_eq!(client.receive(soon()).unwrap(), b"one\n");
        let dripping = std::thread::spawn(move || {
            while theirs.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let error = client.receive(soon()).unwrap_err();
        let late = [io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock];
        assert!(late.contains(&error.kind()), "{error}");
        drop(client);
        dripping.join().unwrap();
    }
}
