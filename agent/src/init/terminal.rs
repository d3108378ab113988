// SPDX-License-Identifier: Apache-2.0
//! A terminal in the container's own devpts, so that its name there (`/dev/pts/0`) is the right one; the
//! controlling side goes to the agent, the other becomes descriptors 0, 1, 2 and, for the container's
//! first process, `/dev/console`.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::process::ioctl_tiocsctty;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::config::{Failure, Stage};
use super::report::Reporter;
use super::{Role, mounts, paths};

/// Call in a fresh session.
pub fn attach(role: Role, reporter: &Reporter) -> Result<(), Failure> {
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
    let controller = paths::open(Path::new("/dev/pts/ptmx"), flags).stage("open a terminal")?;
    unlockpt(&controller).stage("unlock the terminal")?;
    let terminal = ioctl_tiocgptpeer(
        &controller,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )
    .stage("open the terminal")?;
    reporter
        .terminal(controller.as_fd())
        .stage("hand the terminal over")?;
    ioctl_tiocsctty(&terminal).stage("take the terminal")?;
    if role == Role::Container {
        let console = paths::ensure_file(Path::new("/dev/console")).stage("make /dev/console")?;
        let view = mounts::clone_fd(&terminal, false).stage("clone the terminal")?;
        mounts::attach(view, console).stage("mount /dev/console")?;
    }
    dup2_stdin(&terminal).stage("set standard input")?;
    dup2_stdout(&terminal).stage("set standard output")?;
    dup2_stderr(&terminal).stage("set standard error")
}
