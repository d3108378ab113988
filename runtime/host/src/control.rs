// SPDX-License-Identifier: Apache-2.0
//! The client of the VMM's control socket, for async callers. Each request has its own connection, blocking thread and
//! time limit.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_faults::{self as faults, Fault, Step};
use bulkhead_proto::agent as protocol;
use bulkhead_vmm::config::KernelSum;
pub use bulkhead_vmm::control::{CheckpointFiles, Checkpointed};
use bulkhead_vmm::control::{Client, ClientError};
pub use bulkhead_vmm::extent::Extent;

use crate::guest::Guest;

const TIMEOUT: Duration = Duration::from_secs(10);
/// How much longer than the VM may stand still a checkpoint may take.
const CHECKPOINT_EXTRA: Duration = Duration::from_secs(10);

/// An error about the control socket of a VMM.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("open layer {path}")]
    Layer { path: PathBuf, source: io::Error },
    #[error("{request} at the VMM's control socket")]
    Request {
        request: &'static str,
        source: ClientError,
    },
    #[error("let the VMM write a file of {bytes} bytes")]
    FileSize { bytes: u64, source: io::Error },
    #[error("the VMM did not answer {request} within {limit:?}")]
    Timeout {
        request: &'static str,
        limit: Duration,
    },
    #[error(
        "the daemon's thread for {request} at the VMM's control socket panicked; the daemon's log says where"
    )]
    Panicked { request: &'static str },
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// Converts an extent to the agent's message.
pub fn told(extent: Extent) -> protocol::Extent {
    protocol::Extent {
        first_sector: extent.first_sector,
        sectors: extent.sectors,
    }
}

/// Appends the blob `path` to the image disk.
pub async fn attach(socket: &Path, path: &Path) -> Result<Extent, ControlError> {
    let file = File::open(path).map_err(|source| ControlError::Layer {
        path: path.to_owned(),
        source,
    })?;
    let asked = ask("attach", socket, move |client| client.attach_extent(&file));
    faults::around(Step::AttachLayer, asked).await
}

/// Attaches a file with a file system of the guest to the volume disk.
pub async fn attach_file(guest: &Guest, file: File) -> Result<Extent, ControlError> {
    let bytes = file.metadata().map_or(0, |metadata| metadata.len());
    let allowed = guest.process.allow_file_size(bytes);
    allowed.map_err(|source| ControlError::FileSize { bytes, source })?;
    attach_volume(&guest.files.control(), file).await
}

/// Attaches a block device to the volume disk.
pub async fn attach_volume(socket: &Path, device: File) -> Result<Extent, ControlError> {
    let request = "attach volume";
    let asked = ask(request, socket, move |client| client.attach_volume(&device));
    faults::around(Step::AttachVolume, asked).await
}

/// The extent of a file on the volume disk. `None` if it is not attached to this VM.
pub async fn find_volume(socket: &Path, file: File) -> Result<Option<Extent>, ControlError> {
    let request = "find volume";
    match ask(request, socket, move |client| client.find_volume(&file)).await {
        Ok(extent) => Ok(Some(extent)),
        Err(ControlError::Request {
            source: ClientError::Refused(_),
            ..
        }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Detaches a block device or file from the volume disk.
pub async fn detach_volume(socket: &Path, extent: Extent) -> Result<(), ControlError> {
    let first = extent.first_sector;
    let asked = ask("detach volume", socket, move |client| {
        client.detach_volume(first)
    });
    faults::around(Step::DetachVolume, asked).await
}

/// Connects a file server to the VM. `server` is the VMM's end of the connection.
pub async fn connect_files(socket: &Path, server: OwnedFd) -> Result<(), ControlError> {
    let request = "connect files";
    ask(request, socket, move |client| {
        client.connect_files(server.as_fd())
    })
    .await
}

/// Sets the size of the guest's balloon, in pages of 4 KiB. 0 gives all pages back to the guest.
pub async fn balloon(socket: &Path, pages: u64) -> Result<(), ControlError> {
    let pages = u32::try_from(pages).unwrap_or(u32::MAX);
    ask("balloon", socket, move |client| client.balloon(pages)).await
}

/// The VMM's counters as JSON.
pub async fn statistics(socket: &Path) -> Result<serde_json::Value, ControlError> {
    let statistics = ask("statistics", socket, |client| client.statistics()).await?;
    Ok(serde_json::to_value(statistics).unwrap_or_default())
}

/// Has a checkpoint of the VM written, whose kernel has this sum ([`crate::saved::kernel_sum`]). The VM stands still meanwhile,
/// but not longer than `limit`, and goes on in every case. Nothing is synced. After an error the files may have content.
pub async fn checkpoint(
    guest: &Guest,
    kernel_sum: KernelSum,
    files: CheckpointFiles,
    limit: Duration,
) -> Result<Checkpointed, ControlError> {
    let socket = guest.files.control();
    let whole = limit.saturating_add(CHECKPOINT_EXTRA);
    on_thread("checkpoint", whole, move || {
        Client::connect(&socket)?.checkpoint(kernel_sum, limit, &files)
    })
    .await
}

/// Asks the VMM of a template for its state, after which it ends. Refused while somebody is connected to its guest.
pub async fn save(socket: &Path) -> Result<(), ControlError> {
    ask("save", socket, Client::save).await
}

/// Asks the VMM to end.
pub async fn stop(socket: &Path) -> Result<(), ControlError> {
    ask("stop", socket, |client| client.stop()).await.map(drop)
}

async fn ask<T: Send + 'static>(
    request: &'static str,
    socket: &Path,
    work: impl FnOnce(&mut Client) -> Result<T, ClientError> + Send + 'static,
) -> Result<T, ControlError> {
    let socket = socket.to_owned();
    on_thread(request, TIMEOUT, move || {
        let mut client = Client::connect(&socket)?;
        work(&mut client)
    })
    .await
}

/// Does `work` on a blocking thread. The thread goes on when the time is up, because nothing can end it.
pub(crate) async fn on_thread<T: Send + 'static>(
    request: &'static str,
    limit: Duration,
    work: impl FnOnce() -> Result<T, ClientError> + Send + 'static,
) -> Result<T, ControlError> {
    match tokio::time::timeout(limit, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(answer)) => answer.map_err(|source| ControlError::Request { request, source }),
        Ok(Err(_)) => Err(ControlError::Panicked { request }),
        Err(_) => Err(ControlError::Timeout { request, limit }),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bulkhead_vmm::control::ClientError;
    use bulkhead_vmm::slot::Slot;

    use super::on_thread;
    use super::protocol::disk;

    #[tokio::test]
    async fn a_panic_a_failure_and_a_late_answer_are_told_apart() {
        let long = Duration::from_secs(60);
        let panics = || -> Result<(), ClientError> { panic!("a planted panic") };
        let fails = || Err::<(), _>(ClientError::Closed);
        let is_late = || {
            std::thread::sleep(Duration::from_millis(100));
            Ok(())
        };
        for (said, expected) in [
            (on_thread("attach", long, panics).await, "panicked"),
            (on_thread("attach", long, fails).await, "attach at the VMM"),
            (
                on_thread("attach", Duration::ZERO, is_late).await,
                "did not answer attach",
            ),
        ] {
            let said = said.unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
        }
    }

    #[test]
    fn the_agent_finds_disks_by_the_names_that_their_places_give_them() {
        assert_eq!(Slot::ImageDisk.disk(), Some(disk::IMAGE));
        assert_eq!(Slot::ScratchDisk.disk(), Some(disk::SCRATCH));
        assert_eq!(Slot::VolumeDisk.disk(), Some(disk::VOLUMES));
    }
}
