// SPDX-License-Identifier: Apache-2.0
//! EmptyDirs on disk: the owner attaches each to the volume disk of its VM, once.

use std::path::Path;
use std::sync::Arc;

use bulkhead_guest::protocol;
use bulkhead_host::{Guest, control};

use super::Owner;
use crate::pod::errors::PodError;
use crate::pod::life::record::DiskRecord;
use crate::pod::volumes::VolumeError;
use crate::pod::volumes::disk::{self, DiskError, Opened};

impl Owner {
    /// Attaches the emptyDir `name` to the volume disk, if it is not attached yet. Returns its extent. It stays
    /// attached until the VM ends.
    pub(super) async fn attach_disk(
        &mut self,
        guest: &Guest,
        name: &str,
        directory: &Path,
    ) -> Result<protocol::Extent, PodError> {
        let Some(disks) = &self.ledger.pod().disks else {
            // The VM of an earlier version has no such disk, and its agent ignores the extent.
            return Ok(protocol::Extent::default());
        };
        if let Some(known) = disks.get(name) {
            return Ok(control::told(known.extent));
        }
        let shared = Arc::clone(&self.shared);
        let bytes = self.ledger.pod().size.scratch_bytes;
        let opened =
            tokio::task::block_in_place(|| disk::open(&shared.host.scratch, directory, bytes));
        let socket = guest.files.control();
        let extent = match opened.map_err(VolumeError::from)? {
            Opened::Ours(file) => control::attach_file(guest, file).await?,
            // Perhaps this VM holds the lock: an earlier call attached the disk, and the daemon died before it was
            // stored.
            Opened::Locked(file) => {
                let found = control::find_volume(&socket, file).await?;
                found.ok_or_else(|| {
                    VolumeError::from(DiskError::InUse {
                        path: directory.join(disk::IMAGE),
                    })
                })?
            }
        };
        let record = DiskRecord {
            directory: directory.to_owned(),
            extent,
        };
        let stored = self.ledger.change_pod(|pod| {
            let disks = pod.disks.get_or_insert_default();
            disks.insert(name.to_owned(), record);
        });
        if let Err(error) = stored {
            // Otherwise the VMM keeps the lock, and nobody can use the disk.
            let _ = control::detach_volume(&socket, extent).await;
            return Err(error.into());
        }
        Ok(control::told(extent))
    }
}
