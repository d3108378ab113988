// SPDX-License-Identifier: Apache-2.0
//! Watches host paths for changes, by inotify(7). The daemon has one inotify instance, because the kernel limits them
//! to about a hundred for each user. One task reads its events and wakes the watchers.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_host::register;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::sync::Notify;

/// Events that change the names in a directory, the content of a file, or the owner or mode of either.
const CHANGES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF);
const BUFFER_BYTES: usize = 8 << 10;

/// Watches any number of paths. Clones share one inotify instance.
#[derive(Clone, Debug, Default)]
pub struct Watcher {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Made when the first path is watched.
    inotify: Option<Arc<OwnedFd>>,
    /// The watchers by watch descriptor. The kernel gives one descriptor for an inode, even if several watch it.
    watched: HashMap<i32, Vec<Arc<Notify>>>,
}

/// Watches one path until it is dropped.
#[derive(Debug)]
pub struct Watch {
    changed: Arc<Notify>,
    descriptor: i32,
    shared: Arc<Shared>,
}

impl Watcher {
    /// Watches the file or directory that is at `path` now. Call this inside a tokio runtime.
    pub fn watch(&self, path: &Path) -> io::Result<Watch> {
        let mut state = self.shared.lock();
        let inotify = match &state.inotify {
            Some(inotify) => Arc::clone(inotify),
            None => {
                let made = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
                let readable = register(made.try_clone()?)?;
                tokio::spawn(read(readable, Arc::clone(&self.shared)));
                let made = Arc::new(made);
                state.inotify = Some(Arc::clone(&made));
                made
            }
        };
        let descriptor = inotify::add_watch(&*inotify, path, CHANGES)?;
        let changed = Arc::new(Notify::new());
        let watchers = state.watched.entry(descriptor).or_default();
        watchers.push(Arc::clone(&changed));
        Ok(Watch {
            changed,
            descriptor,
            shared: Arc::clone(&self.shared),
        })
    }
}

impl Watch {
    /// Waits for a change. Returns at once if something has changed since the last call.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        let Some(watchers) = state.watched.get_mut(&self.descriptor) else {
            return;
        };
        watchers.retain(|one| !Arc::ptr_eq(one, &self.changed));
        if watchers.is_empty() {
            state.watched.remove(&self.descriptor);
            if let Some(inotify) = &state.inotify {
                // An error is expected if the watched file was deleted: then the kernel has removed the watch already.
                let _ = inotify::remove_watch(&**inotify, self.descriptor);
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, descriptor: i32, events: ReadFlags) {
        let mut state = self.lock();
        if events.contains(ReadFlags::QUEUE_OVERFLOW) {
            // The kernel has dropped events of unknown watches, so wake all watchers.
            state
                .watched
                .values()
                .flatten()
                .for_each(|one| one.notify_one());
            return;
        }
        if let Some(watchers) = state.watched.get(&descriptor) {
            watchers.iter().for_each(|one| one.notify_one());
        }
        if events.contains(ReadFlags::IGNORED) {
            // The watch is gone, and the kernel may reuse its number for another inode.
            state.watched.remove(&descriptor);
        }
    }
}

async fn read(inotify: tokio::io::unix::AsyncFd<OwnedFd>, shared: Arc<Shared>) {
    let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
    loop {
        let Ok(mut ready) = inotify.readable().await else {
            return;
        };
        let mut reader = Reader::new(inotify.get_ref(), &mut buffer);
        loop {
            match reader.next() {
                Ok(event) => shared.wake(event.wd(), event.events()),
                Err(Errno::AGAIN) => break,
                Err(e) => {
                    tracing::error!("read changes of mirrored volumes: {e}");
                    break;
                }
            }
        }
        ready.clear_ready();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn hears(watch: &Watch) -> bool {
        let limit = Duration::from_millis(500);
        tokio::time::timeout(limit, watch.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn all_who_watch_a_directory_hear_of_a_change_and_a_dropped_one_ends_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let watcher = Watcher::default();
        let first = watcher.watch(directory.path()).unwrap();
        let second = watcher.watch(directory.path()).unwrap();
        std::fs::write(directory.path().join("x"), "").unwrap();
        assert!(hears(&first).await && hears(&second).await);
        drop(first);
        std::fs::rename(directory.path().join("x"), directory.path().join("y")).unwrap();
        assert!(hears(&second).await);
    }

    #[tokio::test]
    async fn a_file_written_in_place_and_a_directory_that_goes_are_heard() {
        let directory = tempfile::tempdir().unwrap();
        let watcher = Watcher::default();
        let file = directory.path().join("hosts");
        std::fs::write(&file, "a").unwrap();
        let watch = watcher.watch(&file).unwrap();
        std::fs::write(&file, "b").unwrap();
        assert!(hears(&watch).await);
        let sub = directory.path().join("sub");
        std::fs::create_dir(&sub).unwrap();
        let watch = watcher.watch(&sub).unwrap();
        std::fs::remove_dir(&sub).unwrap();
        assert!(hears(&watch).await);
        assert!(watcher.watch(&sub).is_err());
    }
}
