// SPDX-License-Identifier: Apache-2.0
//! The PID namespace that the containers of a pod share. It is created when first needed and kept by a pause process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{Mode, OFlags, open};

use super::launch::pidfd;
use crate::pause;
use crate::reaper::Reaper;
use crate::sys::spawn::{Inside, PidNamespace, spawn_self};
use crate::users::PodUsers;

/// The pause process of the shared PID namespace, while there is one. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct PodPids {
    pause: Arc<Mutex<Option<Arc<OwnedFd>>>>,
}

impl PodPids {
    /// A pidfd of the pause process. If that has died, a new one with a new namespace is started.
    pub fn get(&self, reaper: &Reaper, users: &PodUsers) -> io::Result<Arc<OwnedFd>> {
        let mut pause = self.lock();
        if let Some(pidfd) = pause.as_ref() {
            return Ok(Arc::clone(pidfd));
        }
        let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let stdio = [null.as_fd(), null.as_fd(), null.as_fd()];
        let inside = users.namespace().map(|users| Inside {
            users,
            cgroup: None,
        });
        let pid = spawn_self(pause::ROLE_ARG, &stdio, PidNamespace::New, inside)?;
        let exit = reaper.register(pid);
        let pidfd = Arc::new(pidfd(pid)?);
        *pause = Some(Arc::clone(&pidfd));
        drop(pause);
        let pods = self.clone();
        tokio::spawn(async move {
            let _ = exit.await;
            *pods.lock() = None;
        });
        Ok(pidfd)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<OwnedFd>>> {
        self.pause.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
