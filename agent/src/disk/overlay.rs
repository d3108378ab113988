// SPDX-License-Identifier: Apache-2.0
//! A container's root file system: the layers of its image below, a directory of the scratch disk above.
//!
//! Everything here blocks, so it must be called from a thread that may block.

use std::ffi::CString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::layers::MountedLayer;
use super::lower::Lower;
use super::scratch;
use crate::users::PodUsers;

/// The kernel accepts one page of mount options.
const MAX_OPTIONS_BYTES: usize = 4095;
/// An empty directory, which is the only layer of an image without layers.
const EMPTY: &str = "/run/empty";

/// Where images that are volumes are mounted.
const VIEWS: &str = "/run/views";

#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    #[error("prepare {path}")]
    Prepare { path: PathBuf, source: io::Error },
    #[error("prepare the layers, and the owners that the pod's users should see")]
    Layers(#[source] io::Error),
    #[error("{0} layers are too many for one overlay")]
    TooManyLayers(usize),
    #[error("mount the overlay of {layers} layers")]
    Mount { layers: usize, source: io::Error },
}

/// A read-only mount of an image. Dropping it unmounts it.
#[derive(Debug)]
pub struct ImageView {
    path: PathBuf,
    /// Kept as long as the overlay is mounted.
    _lower: Lower,
}

impl ImageView {
    /// `layers` are in order, the bottom one first; their owners are mapped to `users`. `name` must be unique.
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
            _lower: Lower::new(layers, users).map_err(OverlayError::Layers)?,
        };
        let count = view._lower.len();
        if count == 0 {
            return Ok(view);
        }
        // An overlay needs at least two layers. With the empty one below, whiteouts of the image's lowest layer work,
        // too: they hide nothing.
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

/// A mounted root file system. [`Overlay::remove`] removes it.
#[derive(Debug)]
pub struct Overlay {
    directory: PathBuf,
    /// Kept as long as the overlay is mounted.
    lower: Lower,
}

impl Overlay {
    /// Mounts an overlay. `layers` are in order, the bottom one first. All files belong to `users`.
    pub fn mount(
        container_id: &str,
        layers: Vec<MountedLayer>,
        users: &PodUsers,
    ) -> Result<Self, OverlayError> {
        let directory = Path::new(scratch::CONTAINERS).join(container_id);
        let lower = Lower::new(layers, users).map_err(OverlayError::Layers)?;
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

    /// The directory with what the container writes to its root file system.
    fn upper(&self) -> PathBuf {
        self.directory.join("up")
    }

    /// The directory for the container's own volumes. It is removed with the rest.
    pub fn volumes(&self) -> PathBuf {
        self.directory.join("volumes")
    }

    /// The directories with everything that the container writes outside of the pod's volumes.
    pub fn written(&self) -> [PathBuf; 2] {
        [self.upper(), self.volumes()]
    }

    fn prepare(&self, users: &PodUsers) -> Result<(), OverlayError> {
        // An earlier attempt may have left files, which do not belong to this container.
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
        // volatile: nothing on the scratch disk outlives the guest, so overlayfs need not sync it.
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

    /// Unmounts the root file system, deletes what the container wrote, and releases the layers.
    pub fn remove(self) {
        let _ = unmount(self.rootfs(), UnmountFlags::DETACH);
        if let Err(e) = fs::remove_dir_all(&self.directory) {
            eprintln!("bulkhead-agent: remove {}: {e}", self.directory.display());
        }
    }
}
