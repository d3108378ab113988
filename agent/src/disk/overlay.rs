// SPDX-License-Identifier: Apache-2.0
//! A container's root file system: its image's layers below, a directory of the scratch disk above.
//!
//! Everything here blocks; call it from a thread that may.

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::layers::MountedLayer;
use super::lower::Lower;
use super::scratch;
use crate::users::PodUsers;

/// The kernel takes one page of options.
const MAX_OPTIONS_BYTES: usize = 4095;
/// Below an image without layers.
const EMPTY: &str = "/run/empty";

/// Where images that are volumes are mounted.
const VIEWS: &str = "/run/views";

#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    #[error("prepare {path}")]
    Prepare { path: PathBuf, source: io::Error },
    #[error("map the owners of a layer to the pod's users")]
    MapOwners(#[source] io::Error),
    #[error("{0} layers are too many for one overlay")]
    TooManyLayers(usize),
    #[error("mount the overlay of {layers} layers")]
    Mount { layers: usize, source: io::Error },
}

/// An image's content at a place of its own, read-only. Dropping it takes it away.
#[derive(Debug)]
pub struct ImageView {
    path: PathBuf,
    /// Held for as long as it is mounted.
    _lower: Lower,
}

impl ImageView {
    /// `layers` bottom first, owned by `users`; `name` is nobody else's.
    pub fn mount(
        name: &str,
        layers: Vec<MountedLayer>,
        users: &PodUsers,
    ) -> Result<Self, OverlayError> {
        let path = Path::new(VIEWS).join(name);
        for directory in [&path, Path::new(EMPTY)] {
            fs::create_dir_all(directory).map_err(|source| OverlayError::Prepare {
                path: directory.to_owned(),
                source,
            })?;
        }
        let view = Self {
            path,
            _lower: Lower::new(layers, users).map_err(OverlayError::MapOwners)?,
        };
        let count = view._lower.len();
        if count == 0 {
            return Ok(view);
        }
        // An overlay has at least two layers; the empty one also makes whiteouts of the lowest layer hide nothing.
        let mut names = view._lower.names();
        names.push(EMPTY.to_owned());
        let options = format!("lowerdir={},index=off,metacopy=off", names.join(":"));
        if options.len() > MAX_OPTIONS_BYTES {
            return Err(OverlayError::TooManyLayers(count));
        }
        let failed = |source| OverlayError::Mount {
            layers: count,
            source,
        };
        let options = CString::new(options).map_err(|e| failed(e.into()))?;
        mount(
            c"overlay",
            &view.path,
            c"overlay",
            MountFlags::RDONLY | MountFlags::NOATIME,
            Some(options.as_c_str()),
        )
        .map_err(|e| failed(e.into()))?;
        Ok(view)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ImageView {
    fn drop(&mut self) {
        let _ = unmount(&self.path, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.path);
    }
}

/// A mounted root file system. [`Overlay::remove`] undoes it.
#[derive(Debug)]
pub struct Overlay {
    directory: PathBuf,
    /// Held for as long as the overlay is mounted.
    lower: Lower,
}

impl Overlay {
    /// `layers` bottom first. What is in them and what is written belongs to `users`.
    pub fn mount(
        container_id: &str,
        layers: Vec<MountedLayer>,
        users: &PodUsers,
    ) -> Result<Self, OverlayError> {
        let directory = Path::new(scratch::CONTAINERS).join(container_id);
        let lower = Lower::new(layers, users).map_err(OverlayError::MapOwners)?;
        let overlay = Self { directory, lower };
        let prepared = overlay.prepare(users);
        let mounted = prepared.and_then(|()| overlay.mount_prepared());
        if mounted.is_err() {
            let _ = fs::remove_dir_all(&overlay.directory);
        }
        mounted.map(|()| overlay)
    }

    pub fn rootfs(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// Where what the container writes goes.
    pub fn upper(&self) -> PathBuf {
        self.directory.join("up")
    }

    fn prepare(&self, users: &PodUsers) -> Result<(), OverlayError> {
        // What an earlier attempt left is not this container's.
        let _ = fs::remove_dir_all(&self.directory);
        for path in [
            self.upper(),
            self.directory.join("work"),
            self.rootfs(),
            EMPTY.into(),
        ] {
            fs::create_dir_all(&path).map_err(|source| OverlayError::Prepare { path, source })?;
        }
        let upper = self.upper();
        let own = |(uid, gid)| std::os::unix::fs::chown(&upper, Some(uid), Some(gid));
        let owned = users.in_guest(0, 0).and_then(own);
        owned.map_err(|source| OverlayError::Prepare {
            path: upper,
            source,
        })
    }

    fn mount_prepared(&self) -> Result<(), OverlayError> {
        let layers = self.lower.len();
        let mut lower = self.lower.names();
        if lower.is_empty() {
            lower.push(EMPTY.to_owned());
        }
        let directory = self.directory.display();
        // volatile: nothing on the scratch disk outlives the guest, so nothing needs to be synced to it.
        let options = format!(
            "lowerdir={},upperdir={directory}/up,workdir={directory}/work,index=off,metacopy=off,volatile",
            lower.join(":"),
        );
        if options.len() > MAX_OPTIONS_BYTES {
            return Err(OverlayError::TooManyLayers(layers));
        }
        let failed = |source| OverlayError::Mount { layers, source };
        let options = CString::new(options).map_err(|e| failed(e.into()))?;
        mount(
            c"overlay",
            self.rootfs(),
            c"overlay",
            MountFlags::empty(),
            Some(options.as_c_str()),
        )
        .map_err(|e| failed(e.into()))
    }

    /// Unmounts it, deletes what the container wrote, and gives the layers back.
    pub fn remove(self) {
        let _ = unmount(self.rootfs(), UnmountFlags::DETACH);
        if let Err(e) = fs::remove_dir_all(&self.directory) {
            eprintln!("bulkhead-agent: remove {}: {e}", self.directory.display());
        }
    }
}
