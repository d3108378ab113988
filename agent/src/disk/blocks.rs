// SPDX-License-Identifier: Apache-2.0
//! Block volumes: extents of the volume disk. Each is a device of the guest while a container uses it. Containers with
//! the same extent share one device, and so its page cache.
//!
//! Everything here blocks, so it must be called from a thread that may block.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::agent::{self as proto, disk};

use super::dm::Access;
use super::extent::{BadExtent, Extent};
use super::window::{self, WindowError};

#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error("block volume")]
    Extent(#[from] BadExtent),
    #[error("block volume")]
    Window(#[from] WindowError),
    #[error("get the device number of {path}")]
    Device { path: String, source: io::Error },
}

/// A device in use. Dropping it ends the use.
#[derive(Debug)]
pub struct MappedBlock {
    /// The device number, as in `st_rdev`.
    pub number: u64,
    extent: Extent,
    blocks: Blocks,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    users: usize,
}

/// The block volumes in use, each with the number of its users. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Blocks {
    mapped: Arc<Mutex<HashMap<Extent, Entry>>>,
}

impl Blocks {
    pub fn acquire(
        &self,
        wanted: proto::Extent,
        access: Access,
    ) -> Result<MappedBlock, BlockError> {
        let extent = Extent::try_from(wanted)?;
        let mut mapped = self.lock();
        let number = match mapped.get_mut(&extent) {
            Some(entry) => {
                entry.users += 1;
                entry.number
            }
            None => {
                let number = map(extent, access)?;
                mapped.insert(extent, Entry { number, users: 1 });
                number
            }
        };
        Ok(MappedBlock {
            number,
            extent,
            blocks: self.clone(),
        })
    }

    fn release(&self, extent: Extent) {
        let mut mapped = self.lock();
        let Some(entry) = mapped.get_mut(&extent) else {
            return;
        };
        entry.users -= 1;
        if entry.users == 0 {
            mapped.remove(&extent);
            window::unmap(&device_name(extent));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Extent, Entry>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for MappedBlock {
    fn drop(&mut self) {
        self.blocks.release(self.extent);
    }
}

fn map(extent: Extent, access: Access) -> Result<u64, BlockError> {
    let name = device_name(extent);
    let minor = window::map(disk::VOLUMES, &name, extent, access)?;
    // Writes are on the host's device when they complete, so no flush is needed. A flush would also wait for the
    // files on the volume disk.
    let cache = format!("/sys/block/dm-{minor}/queue/write_cache");
    let _ = fs::write(cache, "write through");
    let path = format!("/dev/dm-{minor}");
    match fs::metadata(&path) {
        Ok(metadata) => Ok(metadata.rdev()),
        Err(source) => {
            window::unmap(&name);
            Err(BlockError::Device { path, source })
        }
    }
}

fn device_name(extent: Extent) -> String {
    format!("volume-{}-{}", extent.first_sector(), extent.sectors())
}
