// SPDX-License-Identifier: Apache-2.0
//! Serves the control socket on the main thread until the VM ends or has to end.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sys::signalfd::SignalFd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};

use super::{LINE_BYTES, Reply, Request};
use crate::extent::Extent;
use crate::statistics::Statistics;

/// How many clients may be connected. One more replaces the oldest.
const MAX_CLIENTS: usize = 16;

/// What requests act on.
pub trait Target {
    fn attach_extent(&self, file: File) -> Result<Extent, String>;
    fn attach_volume(&self, device: File) -> Result<Extent, String>;
    fn find_volume(&self, file: &File) -> Result<Extent, String>;
    fn detach_volume(&self, first_sector: u64) -> Result<(), String>;
    fn connect_files(&self, server: OwnedFd) -> Result<(), String>;
    fn balloon(&self, pages: u32);
    fn statistics(&self) -> Statistics;
    fn pause(&self) -> Result<(), String>;
    fn resume(&self);
    fn save(&self) -> Result<(), NotSaved>;
}

/// Why a VM was not saved.
#[derive(Debug, PartialEq, Eq)]
pub enum NotSaved {
    /// It goes on.
    Refused(String),
    /// It cannot go on.
    Failed(String),
}

/// Why serving ended.
#[derive(Debug)]
pub enum Ended {
    /// A client or a signal asked for it.
    Stopped,
    /// The VM ended without being asked to.
    ByItself,
    Failed(io::Error),
}

struct Client {
    socket: UnixStream,
    /// The bytes of a request whose newline has not arrived yet.
    line: Vec<u8>,
    /// The descriptor that came with it.
    file: Option<OwnedFd>,
}

/// What to do with a client after it was heard.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Keep,
    Drop,
    Stop,
}

/// Serves requests until a client, a signal or the VM itself ends the VM.
pub fn serve(
    listener: &UnixListener,
    ended: &OwnedFd,
    signals: &SignalFd,
    target: &dyn Target,
) -> Ended {
    let mut clients: Vec<Client> = Vec::new();
    loop {
        let mut fds = vec![
            PollFd::new(ended, PollFlags::IN),
            PollFd::new(signals, PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        let sockets = clients
            .iter()
            .map(|c| PollFd::new(&c.socket, PollFlags::IN));
        fds.extend(sockets);
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Ended::Failed(e.into()),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let (base, of_clients) = ready.split_at(3);
        if base[0] {
            return Ended::ByItself;
        }
        if base[1] {
            return Ended::Stopped;
        }
        let mut stop = false;
        let mut flags = of_clients.iter();
        clients.retain_mut(|client| {
            if !flags.next().is_some_and(|&ready| ready) {
                return true;
            }
            let next = client.hear(target);
            stop |= next == Next::Stop;
            next == Next::Keep
        });
        if stop {
            return Ended::Stopped;
        }
        if base[2] {
            accept(listener, &mut clients);
        }
    }
}

fn accept(listener: &UnixListener, clients: &mut Vec<Client>) {
    let Ok((socket, _)) = listener.accept() else {
        return;
    };
    if socket.set_nonblocking(true).is_err() {
        return;
    }
    if clients.len() >= MAX_CLIENTS {
        clients.remove(0);
    }
    clients.push(Client {
        socket,
        line: Vec::new(),
        file: None,
    });
}

impl Client {
    /// Reads the bytes that have arrived and answers each complete request.
    fn hear(&mut self, target: &dyn Target) -> Next {
        let mut bytes = [0; 1024];
        let count = match self.receive(&mut bytes) {
            Ok(0) => return Next::Drop,
            Ok(count) => count,
            Err(e) if e == rustix::io::Errno::AGAIN => return Next::Keep,
            Err(_) => return Next::Drop,
        };
        for &byte in bytes.iter().take(count) {
            if byte != b'\n' {
                if self.line.len() >= LINE_BYTES {
                    return Next::Drop;
                }
                self.line.push(byte);
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let (reply, next) = self.answer(&line, target);
            if !self.send(&reply) {
                return if next == Next::Stop { next } else { Next::Drop };
            }
            if next != Next::Keep {
                return next;
            }
        }
        Next::Keep
    }

    fn receive(&mut self, bytes: &mut [u8]) -> rustix::io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let message = rustix::net::recvmsg(&self.socket, &mut slices, &mut control, flags)?;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = part {
                // A request carries at most one descriptor. Dropping the iterator closes all others.
                self.file = fds.last();
            }
        }
        Ok(message.bytes)
    }

    /// Carries out one request.
    fn answer(&mut self, line: &[u8], target: &dyn Target) -> (Reply, Next) {
        let file = self.file.take();
        let failed = |message: String| Reply::Failed { message };
        let request = match serde_json::from_slice(line) {
            Ok(request) => request,
            Err(e) => return (failed(format!("parse request: {e}")), Next::Keep),
        };
        let reply = match (request, file) {
            (
                Request::AttachExtent
                | Request::AttachVolume
                | Request::FindVolume
                | Request::ConnectFiles,
                None,
            ) => failed("request came without the file descriptor that it needs".to_owned()),
            (Request::AttachExtent, Some(file)) => target
                .attach_extent(File::from(file))
                .map_or_else(failed, Reply::Extent),
            (Request::AttachVolume, Some(device)) => target
                .attach_volume(File::from(device))
                .map_or_else(failed, Reply::Extent),
            (Request::FindVolume, Some(file)) => target
                .find_volume(&File::from(file))
                .map_or_else(failed, Reply::Extent),
            (Request::DetachVolume { first_sector }, _) => target
                .detach_volume(first_sector)
                .map_or_else(failed, |()| Reply::Done),
            (Request::ConnectFiles, Some(server)) => target
                .connect_files(server)
                .map_or_else(failed, |()| Reply::Done),
            (Request::Balloon { pages }, _) => {
                target.balloon(pages);
                Reply::Done
            }
            (Request::Statistics, _) => Reply::Statistics(Box::new(target.statistics())),
            (Request::Pause, _) => target.pause().map_or_else(failed, |()| Reply::Done),
            (Request::Resume, _) => {
                target.resume();
                Reply::Done
            }
            (Request::Save, _) => match target.save() {
                Ok(()) => return (Reply::Done, Next::Stop),
                Err(NotSaved::Failed(message)) => return (failed(message), Next::Stop),
                Err(NotSaved::Refused(message)) => failed(message),
            },
            (Request::Stop, _) => return (Reply::Done, Next::Stop),
        };
        (reply, Next::Keep)
    }

    /// Sends a reply without waiting. False: the client does not read its replies and has to be dropped.
    fn send(&self, reply: &Reply) -> bool {
        let Ok(mut line) = serde_json::to_vec(reply) else {
            return false;
        };
        line.push(b'\n');
        rustix::net::send(&self.socket, &line, SendFlags::NOSIGNAL) == Ok(line.len())
    }
}
