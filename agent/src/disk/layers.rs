// SPDX-License-Identifier: Apache-2.0
//! Image layers: extents of the image disk, each with one EROFS file system. A layer is mounted once for all its
//! containers and unmounted after the last one.
//!
//! Everything here blocks, so it must be called from a thread that may block.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::agent::{self as proto, disk};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::dm::Access;
use super::extent::{BadExtent, Extent};
use super::window::{self, WindowError};

/// Short, because the names of all layers of an overlay must fit one page.
pub const MOUNTS: &str = "/run/l";

#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("image disk")]
    Window(#[from] WindowError),
    #[error(transparent)]
    Extent(#[from] BadExtent),
    #[error("mount the layer of {extent}")]
    Mount { extent: Extent, source: io::Error },
}

/// A layer in use. Dropping it ends the use.
#[derive(Debug)]
pub struct MountedLayer {
    pub path: PathBuf,
    extent: Extent,
    layers: Layers,
}

#[derive(Debug)]
struct Entry {
    path: PathBuf,
    users: usize,
}

/// The mounted layers, each with the number of its users. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    mounted: HashMap<Extent, Entry>,
    made: u64,
}

impl Layers {
    /// Mounts those layers that are not mounted yet. The result has the order of `wanted`.
    pub fn acquire(&self, wanted: &[proto::Extent]) -> Result<Vec<MountedLayer>, LayerError> {
        // After an error, the layers before it are dropped and so released.
        let extents = wanted.iter().map(|&wanted| Extent::try_from(wanted));
        extents.map(|extent| self.acquire_one(extent?)).collect()
    }

    fn acquire_one(&self, extent: Extent) -> Result<MountedLayer, LayerError> {
        let mut state = self.lock();
        if let Some(entry) = state.mounted.get_mut(&extent) {
            entry.users += 1;
            return Ok(MountedLayer {
                path: entry.path.clone(),
                extent,
                layers: self.clone(),
            });
        }
        let path = PathBuf::from(format!("{MOUNTS}/{:x}", state.made));
        state.made += 1;
        mount_layer(extent, &path, MountFlags::empty())?;
        state.mounted.insert(
            extent,
            Entry {
                path: path.clone(),
                users: 1,
            },
        );
        Ok(MountedLayer {
            path,
            extent,
            layers: self.clone(),
        })
    }

    fn release(&self, extent: Extent) {
        let mut state = self.lock();
        let Some(entry) = state.mounted.get_mut(&extent) else {
            return;
        };
        entry.users -= 1;
        if entry.users > 0 {
            return;
        }
        let path = state
            .mounted
            .remove(&extent)
            .map(|entry| entry.path)
            .unwrap_or_default();
        let _ = unmount(&path, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&path);
        window::unmap(&device_name(extent));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for MountedLayer {
    fn drop(&mut self) {
        self.layers.release(self.extent);
    }
}

fn device_name(extent: Extent) -> String {
    format!("layer-{}-{}", extent.first_sector(), extent.sectors())
}

/// Mounts the EROFS file system of an extent of the image disk, with more flags than every layer has.
pub fn mount_layer(extent: Extent, path: &Path, more: MountFlags) -> Result<(), LayerError> {
    let minor = window::map(disk::IMAGE, &device_name(extent), extent, Access::ReadOnly)?;
    let mounted = fs::create_dir_all(path).and_then(|()| {
        let flags = MountFlags::RDONLY | MountFlags::NOATIME | more;
        Ok(mount(
            format!("/dev/dm-{minor}"),
            path,
            c"erofs",
            flags,
            None,
        )?)
    });
    mounted.map_err(|source| {
        let _ = fs::remove_dir(path);
        window::unmap(&device_name(extent));
        LayerError::Mount { extent, source }
    })
}
