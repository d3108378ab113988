// SPDX-License-Identifier: Apache-2.0
//! A terminal in the container's own devpts, so that its name there (`/dev/pts/0`) is right. The controlling
//! side goes to the agent. The other side becomes descriptors 0, 1 and 2 and, for the container's first
//! process, `/dev/console`.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::process::ioctl_tiocsctty;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::config::{Failure, Stage};
use super::report::Reporter;
use super::{Role, mounts, paths};

/// Creates the terminal and makes it the controlling terminal. Call it in a new session.
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
        .stage("send the terminal to the agent")?;
    ioctl_tiocsctty(&terminal).stage("set the controlling terminal")?;
    if role == Role::Container {
        let console = paths::ensure_file(Path::new("/dev/console")).stage("create /dev/console")?;
        let view = mounts::clone_fd(&terminal, false).stage("clone the terminal")?;
        mounts::attach(view, console).stage("mount /dev/console")?;
    }
    dup2_stdin(&terminal).stage("set standard input")?;
    dup2_stdout(&terminal).stage("set standard output")?;
    dup2_stderr(&terminal).stage("set standard error")
}
