// SPDX-License-Identifier: Apache-2.0
//! What speaks to the agent in a pod's guest.
//!
//! [`agent`] is the client of the agent's calls, [`watch`] its stream of [`news`], [`connect`] the way through the VM's vsock
//! socket, and [`streams`] the byte streams that go there. What a guest says is a stranger's word: it is bounded in size
//! and time here, and checked ([`news`], [`statistics`], [`user`], [`text`]). [`exit`] is how a
//! container ended.
//!
//! This crate knows the protocol and a path of a socket. It knows no processes, no cgroups and no VMM: what the host does
//! for a guest is in `bulkhead-host`, above this.

#![forbid(unsafe_code)]

pub mod agent;
pub mod connect;
pub mod exit;
pub mod news;
pub mod statistics;
pub mod streams;
pub mod text;
pub mod user;
pub mod watch;

/// The agent's vocabulary, as pods use it to say what a container is.
pub use bulkhead_proto::agent as protocol;
