// SPDX-License-Identifier: Apache-2.0
//! The new process's end of the report channel. [`super::config`] describes the messages.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use bulkhead_proto::agent as protocol;
use prost::Message;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, send, sendmsg};

use super::config::{Event, Failure, Report};
use super::user::Identity;

/// A program's name may be longer than this, but a message about it need not be.
const MAX_MESSAGE_BYTES: usize = 4096;
/// The most groups in a report. The process itself has all of its groups.
const MAX_GROUPS: usize = 1024;

#[derive(Debug)]
pub struct Reporter {
    socket: OwnedFd,
}

impl Reporter {
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Sends the controlling side of the container's terminal to the agent.
    pub fn terminal(&self, controller: BorrowedFd<'_>) -> io::Result<()> {
        let message = encode(Event::Terminal(true));
        let fds = [controller];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(
            &self.socket,
            &[IoSlice::new(&message)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// Reports that the next step is the exec.
    pub fn executing(&self, identity: &Identity) -> io::Result<()> {
        let groups = identity.groups.iter().take(MAX_GROUPS);
        let event = Event::Executing(protocol::Identity {
            uid: identity.uid,
            gid: identity.gid,
            groups: groups.copied().collect(),
        });
        send(&self.socket, &encode(event), SendFlags::NOSIGNAL)?;
        Ok(())
    }

    pub fn failed(&self, mut failure: Failure) {
        let longest = failure.message.floor_char_boundary(MAX_MESSAGE_BYTES);
        failure.message.truncate(longest);
        let _ = send(
            &self.socket,
            &encode(Event::Failed(failure)),
            SendFlags::NOSIGNAL,
        );
    }
}

fn encode(event: Event) -> Vec<u8> {
    Report { event: Some(event) }.encode_to_vec()
}
