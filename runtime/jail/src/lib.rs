// SPDX-License-Identifier: Apache-2.0
//! What keeps a process in, for the two programs that serve a guest: the VMM, and the file server. Each is assumed to
//! be taken over by its guest. In the order in which a process uses them:
//!
//! - [`namespaces`]: it sees no process, network or mount of the host.
//! - [`root`]: an empty root, and Landlock behind it.
//! - [`limits`]: of what it may use up.
//! - [`privileges`]: a user of its own or a few capabilities, and no way to more.
//! - [`descriptors`]: it holds what it was given, and nothing else.
//! - [`syscalls`]: each of its threads may make a few system calls. Any other one ends the process.
//!
//! All but the last run while the process has one thread.

pub mod descriptors;
pub mod limits;
pub mod namespaces;
pub mod privileges;
pub mod root;
#[allow(unsafe_code)]
mod sys;
pub mod syscalls;

use std::io;

/// A step into the jail that failed. The process must end, because it is not kept in.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct JailError {
    pub step: &'static str,
    pub source: io::Error,
}

/// Names a step that failed.
fn failed<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> JailError {
    move |source| JailError {
        step,
        source: source.into(),
    }
}
