// SPDX-License-Identifier: Apache-2.0
//! The client of the agent in a pod's guest.
//!
//! [`agent`] makes the agent's calls, [`watch`] receives its stream of [`news`], [`connect`] opens connections through
//! the VMM's vsock socket, and [`streams`] carries the byte streams of exec, attach and port-forward. [`clock`]
//! compares the guest's clock with the host's. What a guest sends cannot be trusted. So this crate limits its size and
//! time, and checks it ([`news`], [`statistics`], [`user`], [`text`]), and [`remarks`] bounds what the log says of it.
//! [`exit`] is how a container ended.
//!
//! This crate depends only on the protocol and on the path of a socket. It knows no processes, cgroups or VMMs: what
//! the host does for a guest is in `bulkhead-host`, which depends on this crate.

#![forbid(unsafe_code)]

pub mod agent;
pub mod clock;
pub mod connect;
pub mod exit;
pub mod news;
pub mod pace;
pub mod remarks;
pub mod statistics;
pub mod streams;
pub mod text;
pub mod user;
pub mod watch;

/// The agent's messages, which pods also use to describe containers.
pub use bulkhead_proto::agent as protocol;
