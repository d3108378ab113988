// SPDX-License-Identifier: Apache-2.0
//! The control socket: newline-delimited JSON over a unix stream socket, one reply per request. This
//! file has the messages and the client; [`server`] is the other end.
//!
//! File descriptors are sent together with the bytes of their request (SCM_RIGHTS): as many as the request needs, and no more.

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

use crate::config::KernelSum;
use crate::extent::Extent;
use crate::statistics::Statistics;

/// The longest request or reply, including its newline.
pub const LINE_BYTES: usize = 16 << 10;
/// The most descriptors that a request carries.
const MOST_DESCRIPTORS: usize = 3;
/// How long a request may take until its whole reply is there.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A request to a VMM. None of them waits for a disk or volume of the host that hangs, but for a checkpoint, which reads the
/// scratch disk and writes files.
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
    /// Carries three descriptors: of empty regular files, open for writing, for the VM's state, its memory, and its scratch
    /// disk. Writes them ([`crate::memory::save`] says how), while the VM does nothing, and lets it go on in every case,
    /// unless it was paused before. Not for a template. Until the reply, no other request is answered.
    Checkpoint {
        kernel_sum: KernelSum,
        /// How long the VM may stand still. A checkpoint that takes longer fails.
        limit_ms: u32,
    },
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
    Checkpointed(Checkpointed),
    Failed { message: String },
}

/// What was written for a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpointed {
    /// How long the VM stood still.
    pub paused_us: u64,
    /// What was written of memory and disk: neither holes nor pages of zeroes.
    pub memory_bytes: u64,
    pub scratch_bytes: u64,
}

/// The files of a checkpoint, empty and open for writing.
#[derive(Debug)]
pub struct CheckpointFiles {
    pub state: File,
    pub memory: File,
    pub scratch: File,
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
    limit: Duration,
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
            limit: TIMEOUT,
        })
    }

    /// The same connection, with another time limit for each request.
    #[must_use]
    pub fn with_limit(self, limit: Duration) -> Self {
        Self { limit, ..self }
    }

    /// Appends a file to the image disk.
    pub fn attach_extent(&mut self, file: &File) -> Result<Extent, ClientError> {
        match self.call(Request::AttachExtent, &[file.as_fd()])? {
            Reply::Extent(extent) => Ok(extent),
            _ => Err(ClientError::WrongReply),
        }
    }

    /// Puts a block device, or a file with a file system, on the volume disk.
    pub fn attach_volume(&mut self, device: &File) -> Result<Extent, ClientError> {
        match self.call(Request::AttachVolume, &[device.as_fd()])? {
            Reply::Extent(extent) => Ok(extent),
            _ => Err(ClientError::WrongReply),
        }
    }

    /// Asks where a file is on the volume disk. An error if it is not there.
    pub fn find_volume(&mut self, file: &File) -> Result<Extent, ClientError> {
        match self.call(Request::FindVolume, &[file.as_fd()])? {
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
        match self.call(Request::ConnectFiles, &[server])? {
            Reply::Done => Ok(()),
            _ => Err(ClientError::WrongReply),
        }
    }

    /// Asks the guest to put this many pages of 4 KiB into its balloon.
    pub fn balloon(&mut self, pages: u32) -> Result<(), ClientError> {
        self.expect_done(Request::Balloon { pages })
    }

    pub fn statistics(&mut self) -> Result<Statistics, ClientError> {
        match self.call(Request::Statistics, &[])? {
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

    /// Writes a checkpoint of the VM, which stands still meanwhile, but not longer than `limit`, and goes on.
    pub fn checkpoint(
        &mut self,
        kernel_sum: KernelSum,
        limit: Duration,
        files: &CheckpointFiles,
    ) -> Result<Checkpointed, ClientError> {
        let limit_ms = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
        let request = Request::Checkpoint {
            kernel_sum,
            limit_ms,
        };
        let CheckpointFiles {
            state,
            memory,
            scratch,
        } = files;
        let before = self.limit;
        self.limit = Duration::from_millis(limit_ms.into()).saturating_add(TIMEOUT);
        let answer = self.call(request, &[state.as_fd(), memory.as_fd(), scratch.as_fd()]);
        self.limit = before;
        match answer? {
            Reply::Checkpointed(done) => Ok(done),
            _ => Err(ClientError::WrongReply),
        }
    }

    /// Saves a template, which ends then. Refused as long as somebody is connected to its guest.
    pub fn save(&mut self) -> Result<(), ClientError> {
        self.expect_done(Request::Save)
    }

    pub fn stop(&mut self) -> Result<(), ClientError> {
        self.expect_done(Request::Stop)
    }

    fn expect_done(&mut self, request: Request) -> Result<(), ClientError> {
        match self.call(request, &[])? {
            Reply::Done => Ok(()),
            _ => Err(ClientError::WrongReply),
        }
    }

    fn call(&mut self, request: Request, files: &[BorrowedFd<'_>]) -> Result<Reply, ClientError> {
        let mut line = serde_json::to_vec(&request).map_err(ClientError::Parse)?;
        line.push(b'\n');
        let deadline = Instant::now().checked_add(self.limit);
        let deadline = deadline.unwrap_or_else(|| Instant::now() + TIMEOUT);
        self.send(&line, files).map_err(ClientError::Send)?;
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

    fn send(&mut self, line: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(io::ErrorKind::InvalidInput.into());
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
            limit: TIMEOUT,
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
