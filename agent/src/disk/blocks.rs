// SPDX-License-Identifier: Apache-2.0
//! Block volumes: ranges of the volume disk, each a device of the guest's while a container has it. Containers that
//! have the same range have the same device, and so one cache of it.
//!
//! Everything here blocks; call it from a thread that may.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::window::{self, Access, Range, WindowError};

const DISK: &str = "vdc";

#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error("block volume")]
    Window(#[from] WindowError),
    #[error("look at {path}")]
    Device { path: String, source: io::Error },
}

/// A device in use. Dropping it gives it back.
#[derive(Debug)]
pub struct MappedBlock {
    /// As `st_rdev` has it.
    pub number: u64,
    range: Range,
    blocks: Blocks,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    users: usize,
}

#[derive(Clone, Debug, Default)]
pub struct Blocks {
    mapped: Arc<Mutex<HashMap<Range, Entry>>>,
}

impl Blocks {
    pub fn acquire(&self, range: Range, access: Access) -> Result<MappedBlock, BlockError> {
        let mut mapped = self.lock();
        let number = match mapped.get_mut(&range) {
            Some(entry) => {
                entry.users += 1;
                entry.number
            }
            None => {
                let number = map(range, access)?;
                mapped.insert(range, Entry { number, users: 1 });
                number
            }
        };
        Ok(MappedBlock {
            number,
            range,
            blocks: self.clone(),
        })
    }

    fn release(&self, range: Range) {
        let mut mapped = self.lock();
        let Some(entry) = mapped.get_mut(&range) else {
            return;
        };
        entry.users -= 1;
        if entry.users == 0 {
            mapped.remove(&range);
            window::unmap(&device_name(range));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Range, Entry>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for MappedBlock {
    fn drop(&mut self) {
        self.blocks.release(self.range);
    }
}

fn map(range: Range, access: Access) -> Result<u64, BlockError> {
    let name = device_name(range);
    let minor = window::map(DISK, &name, range, access)?;
    // Its writes are on the device when they are done. Flushes would wait for the files on the same disk.
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

fn device_name(range: Range) -> String {
    format!("volume-{}-{}", range.first, range.sectors)
}
