// SPDX-License-Identifier: Apache-2.0
//! Image layers: ranges of the image disk that hold one EROFS file system each, mounted once however
//! many containers use them, and unmounted after the last.
//!
//! Everything here blocks; call it from a thread that may.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_proto::agent::Layer;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::window::{self, Access, Range, WindowError};

/// Short, because an overlay names all its layers in one page.
pub const MOUNTS: &str = "/run/l";
const DISK: &str = "vda";

#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("image disk")]
    Window(#[from] WindowError),
    #[error("mount the layer of {sectors} sectors at {first}")]
    Mount {
        first: u64,
        sectors: u64,
        source: io::Error,
    },
}

/// A layer in use. Dropping it gives it back.
#[derive(Debug)]
pub struct MountedLayer {
    pub path: PathBuf,
    range: Range,
    layers: Layers,
}

#[derive(Debug)]
struct Entry {
    path: PathBuf,
    users: usize,
}

#[derive(Clone, Debug, Default)]
pub struct Layers {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    mounted: HashMap<Range, Entry>,
    made: u64,
}

impl Layers {
    /// Mounts what is not mounted yet; the result is in the order of `wanted`.
    pub fn acquire(&self, wanted: &[Layer]) -> Result<Vec<MountedLayer>, LayerError> {
        // On an error the ones before it are dropped, and so given back.
        wanted.iter().map(|layer| self.acquire_one(layer)).collect()
    }

    fn acquire_one(&self, layer: &Layer) -> Result<MountedLayer, LayerError> {
        let range = Range {
            first: layer.first_sector,
            sectors: layer.sectors,
        };
        let mut state = self.lock();
        if let Some(entry) = state.mounted.get_mut(&range) {
            entry.users += 1;
            return Ok(MountedLayer {
                path: entry.path.clone(),
                range,
                layers: self.clone(),
            });
        }
        let path = PathBuf::from(format!("{MOUNTS}/{:x}", state.made));
        state.made += 1;
        mount_layer(range, &path)?;
        state.mounted.insert(
            range,
            Entry {
                path: path.clone(),
                users: 1,
            },
        );
        Ok(MountedLayer {
            path,
            range,
            layers: self.clone(),
        })
    }

    fn release(&self, range: Range) {
        let mut state = self.lock();
        let Some(entry) = state.mounted.get_mut(&range) else {
            return;
        };
        entry.users -= 1;
        if entry.users > 0 {
            return;
        }
        let path = state
            .mounted
            .remove(&range)
            .map(|entry| entry.path)
            .unwrap_or_default();
        let _ = unmount(&path, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&path);
        window::unmap(&device_name(range));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for MountedLayer {
    fn drop(&mut self) {
        self.layers.release(self.range);
    }
}

fn device_name(range: Range) -> String {
    format!("layer-{}-{}", range.first, range.sectors)
}

fn mount_layer(range: Range, path: &PathBuf) -> Result<(), LayerError> {
    let Range { first, sectors } = range;
    let minor = window::map(DISK, &device_name(range), range, Access::ReadOnly)?;
    let mounted = fs::create_dir_all(path).and_then(|()| {
        let flags = MountFlags::RDONLY | MountFlags::NOATIME;
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
        window::unmap(&device_name(range));
        LayerError::Mount {
            first,
            sectors,
            source,
        }
    })
}
