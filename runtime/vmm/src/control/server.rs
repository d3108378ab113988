// SPDX-License-Identifier: Apache-2.0
//! Serves the control socket on the main thread until the VM ends or has to end.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nix::sys::signalfd::SignalFd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};

use super::{CheckpointFiles, Checkpointed, LINE_BYTES, MOST_DESCRIPTORS, Reply, Request};
use crate::config::KernelSum;
use crate::extent::Extent;
use crate::statistics::Statistics;

/// How many clients may be connected. One more replaces the oldest.
const MAX_CLIENTS: usize = 16;
/// One more than a request may carry, so that one too many is noticed.
const RECEIVED_DESCRIPTORS: usize = MOST_DESCRIPTORS + 1;

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
    fn checkpoint(
        &self,
        kernel_sum: KernelSum,
        limit: Duration,
        files: CheckpointFiles,
    ) -> Result<Checkpointed, String>;
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
    /// The descriptors that came with it, of those too many only the first.
    files: Vec<OwnedFd>,
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
        files: Vec::new(),
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
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(RECEIVED_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let message = rustix::net::recvmsg(&self.socket, &mut slices, &mut control, flags)?;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = part {
                let room = RECEIVED_DESCRIPTORS.saturating_sub(self.files.len());
                // Dropping the iterator closes all others.
                self.files.extend(fds.take(room));
            }
        }
        Ok(message.bytes)
    }

    /// Carries out one request.
    fn answer(&mut self, line: &[u8], target: &dyn Target) -> (Reply, Next) {
        let files = std::mem::take(&mut self.files);
        let failed = |message: String| Reply::Failed { message };
        let request = match serde_json::from_slice(line) {
            Ok(request) => request,
            Err(e) => return (failed(format!("parse request: {e}")), Next::Keep),
        };
        let done = |()| Reply::Done;
        let reply = match request {
            Request::AttachExtent => exactly(files)
                .and_then(|[file]| target.attach_extent(File::from(file)))
                .map(Reply::Extent),
            Request::AttachVolume => exactly(files)
                .and_then(|[device]| target.attach_volume(File::from(device)))
                .map(Reply::Extent),
            Request::FindVolume => exactly(files)
                .and_then(|[file]| target.find_volume(&File::from(file)))
                .map(Reply::Extent),
            Request::DetachVolume { first_sector } => exactly(files)
                .and_then(|[]| target.detach_volume(first_sector))
                .map(done),
            Request::ConnectFiles => exactly(files)
                .and_then(|[server]| target.connect_files(server))
                .map(done),
            Request::Balloon { pages } => exactly(files).map(|[]| target.balloon(pages)).map(done),
            Request::Statistics => {
                exactly(files).map(|[]| Reply::Statistics(Box::new(target.statistics())))
            }
            Request::Pause => exactly(files).and_then(|[]| target.pause()).map(done),
            Request::Resume => exactly(files).map(|[]| target.resume()).map(done),
            Request::Checkpoint {
                kernel_sum,
                limit_ms,
            } => exactly(files)
                .and_then(|[state, memory, scratch]| {
                    let files = CheckpointFiles {
                        state: state.into(),
                        memory: memory.into(),
                        scratch: scratch.into(),
                    };
                    let limit = Duration::from_millis(limit_ms.into());
                    target.checkpoint(kernel_sum, limit, files)
                })
                .map(Reply::Checkpointed),
            Request::Save => {
                match exactly(files)
                    .map_err(NotSaved::Refused)
                    .and_then(|[]| target.save())
                {
                    Ok(()) => return (Reply::Done, Next::Stop),
                    Err(NotSaved::Failed(message)) => return (failed(message), Next::Stop),
                    Err(NotSaved::Refused(message)) => Err(message),
                }
            }
            Request::Stop => match exactly(files) {
                Ok([]) => return (Reply::Done, Next::Stop),
                Err(message) => Err(message),
            },
        };
        (reply.unwrap_or_else(failed), Next::Keep)
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

/// The descriptors of a request, which needs so many.
fn exactly<const COUNT: usize>(files: Vec<OwnedFd>) -> Result<[OwnedFd; COUNT], String> {
    files.try_into().map_err(|files: Vec<OwnedFd>| {
        let found = match files.len() {
            RECEIVED_DESCRIPTORS => format!("more than {MOST_DESCRIPTORS}"),
            count => count.to_string(),
        };
        format!("the request needs {COUNT} file descriptors and came with {found}")
    })
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::os::fd::{AsFd, BorrowedFd};

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage};

    use super::*;

    /// Notes what it was asked.
    #[derive(Default)]
    struct Asked(RefCell<Vec<String>>);

    impl Asked {
        fn note(&self, what: impl Into<String>) {
            self.0.borrow_mut().push(what.into());
        }
    }

    const EXTENT: Extent = Extent {
        first_sector: 8,
        sectors: 16,
    };
    const DONE: Checkpointed = Checkpointed {
        paused_us: 1,
        memory_bytes: 2,
        scratch_bytes: 3,
    };

    impl Target for Asked {
        fn attach_extent(&self, _file: File) -> Result<Extent, String> {
            self.note("attach extent");
            Ok(EXTENT)
        }
        fn attach_volume(&self, _device: File) -> Result<Extent, String> {
            self.note("attach volume");
            Ok(EXTENT)
        }
        fn find_volume(&self, _file: &File) -> Result<Extent, String> {
            self.note("find volume");
            Err("not there".to_owned())
        }
        fn detach_volume(&self, first_sector: u64) -> Result<(), String> {
            self.note(format!("detach {first_sector}"));
            Ok(())
        }
        fn connect_files(&self, _server: OwnedFd) -> Result<(), String> {
            self.note("connect files");
            Ok(())
        }
        fn balloon(&self, pages: u32) {
            self.note(format!("balloon {pages}"));
        }
        fn statistics(&self) -> Statistics {
            unreachable!()
        }
        fn pause(&self) -> Result<(), String> {
            self.note("pause");
            Ok(())
        }
        fn resume(&self) {
            self.note("resume");
        }
        fn checkpoint(
            &self,
            kernel_sum: KernelSum,
            limit: Duration,
            files: CheckpointFiles,
        ) -> Result<Checkpointed, String> {
            let CheckpointFiles {
                state,
                memory,
                scratch,
            } = files;
            let lens = [state, memory, scratch].map(|file| file.metadata().unwrap().len());
            self.note(format!("{} {limit:?} {lens:?}", kernel_sum[0]));
            Ok(DONE)
        }
        fn save(&self) -> Result<(), NotSaved> {
            Err(NotSaved::Refused("no template".to_owned()))
        }
    }

    fn send(socket: &UnixStream, line: &str, files: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(files)));
        }
        let bytes = [std::io::IoSlice::new(line.as_bytes())];
        rustix::net::sendmsg(socket, &bytes, &mut control, SendFlags::empty()).unwrap();
    }

    fn pair() -> (Client, UnixStream) {
        let (socket, theirs) = UnixStream::pair().unwrap();
        let (line, files) = (Vec::new(), Vec::new());
        let client = Client {
            socket,
            line,
            files,
        };
        (client, theirs)
    }

    #[test]
    fn a_request_comes_with_just_the_descriptors_that_it_needs() {
        let (mut client, theirs) = pair();
        let target = Asked::default();
        let files = [0, 1, 2, 3, 4, 5].map(|len| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(len).unwrap();
            file
        });
        let sum = format!("{:?}", [9; 32]);
        let checkpoint =
            format!(r#"{{"request":"checkpoint","kernel_sum":{sum},"limit_ms":2500}}"#);
        let mut answer = |line: &str, count: usize| {
            let fds: Vec<_> = files.iter().take(count).map(AsFd::as_fd).collect();
            send(&theirs, &format!("{line}\n"), &fds);
            assert_eq!(client.hear(&target), Next::Keep);
            let mut bytes = [0; 1024];
            let count = rustix::io::read(&theirs, &mut bytes).unwrap();
            let reply = serde_json::from_slice(&bytes[..count]).unwrap();
            match reply {
                Reply::Failed { message } => Err(message),
                reply => Ok(reply),
            }
        };
        let wrong = |needs, found| {
            let text = format!("the request needs {needs} file descriptors and came with {found}");
            Err(text)
        };
        let plain = |name: &str| format!(r#"{{"request":"{name}"}}"#);
        for (line, needs) in [
            (plain("attach_extent"), 1),
            (plain("attach_volume"), 1),
            (plain("find_volume"), 1),
            (plain("connect_files"), 1),
            (plain("statistics"), 0),
            (plain("pause"), 0),
            (plain("resume"), 0),
            (plain("save"), 0),
            (plain("stop"), 0),
            (r#"{"request":"balloon","pages":1}"#.to_owned(), 0),
            (
                r#"{"request":"detach_volume","first_sector":1}"#.to_owned(),
                0,
            ),
            (checkpoint.clone(), 3),
        ] {
            for found in (0..=3).filter(|found| *found != needs) {
                let found_text = found.to_string();
                assert_eq!(answer(&line, found), wrong(needs, found_text), "{line}");
            }
            for found in [4, 6] {
                let found_text = "more than 3".to_owned();
                assert_eq!(answer(&line, found), wrong(needs, found_text), "{line}");
            }
        }
        assert!(target.0.borrow().is_empty(), "{:?}", target.0.borrow());
        assert_eq!(answer(&checkpoint, 3), Ok(Reply::Checkpointed(DONE)));
        assert_eq!(
            answer(&plain("attach_extent"), 1),
            Ok(Reply::Extent(EXTENT))
        );
        assert_eq!(answer(&plain("resume"), 0), Ok(Reply::Done));
        assert_eq!(answer(&plain("save"), 0), Err("no template".to_owned()));
        assert_eq!(
            answer(&plain("find_volume"), 1),
            Err("not there".to_owned())
        );
        let asked = target.0.into_inner();
        let expected = ["9 2.5s [0, 1, 2]", "attach extent", "resume", "find volume"];
        assert_eq!(asked, expected);
    }

    #[test]
    fn the_client_asks_for_a_checkpoint_as_the_server_hears_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        let serving = std::thread::spawn(move || {
            let target = Asked::default();
            let mut clients = Vec::new();
            accept(&listener, &mut clients);
            clients[0].socket.set_nonblocking(false).unwrap();
            while clients[0].hear(&target) == Next::Keep {}
            target.0.into_inner()
        });
        let file = |len| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(len).unwrap();
            file
        };
        let files = CheckpointFiles {
            state: file(1),
            memory: file(2),
            scratch: file(3),
        };
        let mut client = super::super::Client::connect(&path).unwrap();
        let limit = Duration::from_secs(7);
        assert_eq!(client.checkpoint([4; 32], limit, &files).unwrap(), DONE);
        client.resume().unwrap();
        drop(client);
        assert_eq!(serving.join().unwrap(), ["4 7s [1, 2, 3]", "resume"]);
    }
}
