// SPDX-License-Identifier: Apache-2.0
//! The lower layers of an overlay, with the owners that the pod's users should see, and with the attributes that
//! directories have from layers further below ([`super::implied`]).

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mount::{UnmountFlags, unmount};

use super::implied::Restored;
use super::layers::{MOUNTS, MountedLayer};
use crate::init::mounts;
use crate::users::PodUsers;

/// Layers in use, the bottom one first. Dropping this ends the use.
#[derive(Debug)]
pub struct Lower {
    /// Idmapped mounts of the same layers. Empty if the pod has no user namespace.
    mapped: Vec<MappedLayer>,
    /// The top layer, if directories of the image need it.
    restored: Option<Restored>,
    layers: Vec<MountedLayer>,
}

/// An idmapped mount of a layer. Dropping it unmounts it.
#[derive(Debug)]
struct MappedLayer(PathBuf);

impl Lower {
    pub fn new(layers: Vec<MountedLayer>, users: &PodUsers) -> io::Result<Self> {
        let paths: Vec<&Path> = layers.iter().map(|layer| layer.path.as_path()).collect();
        let restored = Restored::make(&paths)?;
        let mut lower = Self {
            mapped: Vec::new(),
            restored,
            layers,
        };
        if users.namespace().is_some() {
            let mapped = lower.paths().map(|path| MappedLayer::mount(path, users));
            lower.mapped = mapped.collect::<io::Result<_>>()?;
        }
        Ok(lower)
    }

    pub fn len(&self) -> usize {
        self.paths().count()
    }

    fn paths(&self) -> impl Iterator<Item = &Path> {
        let layers = self.layers.iter().map(|layer| layer.path.as_path());
        layers.chain(self.restored.iter().map(Restored::path))
    }

    /// The paths of the layers, the top one first, as the options of an overlay need them.
    pub fn names(&self) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let mut names: Vec<String> = if self.mapped.is_empty() {
            self.paths().map(text).collect()
        } else {
            self.mapped.iter().map(|layer| text(&layer.0)).collect()
        };
        names.reverse();
        names
    }
}

impl MappedLayer {
    fn mount(layer: &Path, users: &PodUsers) -> io::Result<Self> {
        static MADE: AtomicU64 = AtomicU64::new(0);
        let view = mounts::clone_path(layer)?;
        users.map_owners(&view)?;
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let mapped = Self(format!("{MOUNTS}/u{number:x}").into());
        fs::create_dir(&mapped.0)?;
        let path = CString::new(mapped.0.as_os_str().as_bytes())?;
        mounts::attach_at(&view, &path)?;
        Ok(mapped)
    }
}

impl Drop for MappedLayer {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}
