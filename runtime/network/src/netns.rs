// SPDX-License-Identifier: Apache-2.0
//! Makes network namespaces with a name in the file system, and runs code inside them.
//!
//! A thread can switch to another namespace. So each of these functions runs its work on a new thread, which then ends.

use std::fs::File;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, statfs};

use crate::failure::NetworkError;

const THIS_THREADS_NAMESPACE: &str = "/proc/thread-self/ns/net";
/// Settings for interfaces that are made later. CNI sets addresses and routes, so router advertisements are ignored.
/// And duplicate address detection is off, because it would take seconds.
const IPV6_DEFAULTS: [&str; 2] = [
    "/proc/sys/net/ipv6/conf/default/accept_ra",
    "/proc/sys/net/ipv6/conf/default/accept_dad",
];

/// Makes a namespace and mounts it at `path`. Its loopback interface stays down, because the pod's is in the guest.
pub async fn create(path: &Path) -> Result<(), NetworkError> {
    let path = path.to_owned();
    on_a_thread(path.clone(), move || {
        let failed = error(&path);
        File::create(&path).map_err(|e| failed("make the mount point", e))?;
        unshare(CloneFlags::CLONE_NEWNET).map_err(|e| failed("unshare", e.into()))?;
        for setting in IPV6_DEFAULTS {
            // A host without IPv6 does not have these files.
            let _ = std::fs::write(setting, "0");
        }
        mount(
            Some(THIS_THREADS_NAMESPACE),
            &path,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .map_err(|e| failed("mount", e.into()))
    })
    .await
}

/// Runs `work`, which blocks for a short time, in a namespace that nothing else is in. It has no name: it lasts as long as
/// something that was made in it.
pub async fn in_a_new_one<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    let path = PathBuf::from(THIS_THREADS_NAMESPACE);
    on_a_thread(path.clone(), move || {
        let failed = error(&path);
        unshare(CloneFlags::CLONE_NEWNET).map_err(|e| failed("unshare", e.into()))?;
        work()
    })
    .await
}

/// Unmounts and removes a namespace. It is no error if it does not exist.
pub async fn remove(path: &Path) -> Result<(), NetworkError> {
    let path = path.to_owned();
    on_a_thread(path.clone(), move || {
        let failed = error(&path);
        if exists(&path) {
            umount2(&path, MntFlags::MNT_DETACH).map_err(|e| failed("unmount", e.into()))?;
        }
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", e)),
            _ => Ok(()),
        }
    })
    .await
}

/// Whether a namespace is mounted at `path`. After a reboot there may be only the file.
pub fn exists(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == NSFS_MAGIC)
}

/// Runs `work` in the namespace at `path`.
pub async fn inside<T, F, W>(path: &Path, work: W) -> Result<T, NetworkError>
where
    T: Send + 'static,
    F: Future<Output = Result<T, NetworkError>>,
    W: FnOnce() -> F + Send + 'static,
{
    let failed = error(path);
    inside_blocking(path, move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| failed("start a runtime", e))?;
        runtime.block_on(work())
    })
    .await
}

/// The same for work that blocks for a short time.
pub async fn inside_blocking<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    let path = path.to_owned();
    on_a_thread(path.clone(), move || {
        let failed = error(&path);
        let namespace = File::open(&path).map_err(|e| failed("open", e))?;
        setns(namespace, CloneFlags::CLONE_NEWNET).map_err(|e| failed("enter", e.into()))?;
        work()
    })
    .await
}

async fn on_a_thread<T: Send + 'static>(
    path: PathBuf,
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    let (send, receive) = tokio::sync::oneshot::channel();
    let failed = error(&path);
    std::thread::Builder::new()
        .name("netns".into())
        .spawn(move || send.send(work()).is_ok())
        .map_err(|e| failed("start a thread", e))?;
    receive
        .await
        .map_err(|e| failed("run code in it", io::Error::other(e)))?
}

fn error(path: &Path) -> impl Fn(&'static str, io::Error) -> NetworkError + use<> {
    let path = path.to_owned();
    move |step, source| NetworkError::Namespace {
        path: path.clone(),
        step,
        source,
    }
}
