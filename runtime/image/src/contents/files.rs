// SPDX-License-Identifier: Apache-2.0
//! The files of layers, finished and unfinished.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bulkhead_faults::{self as faults, Step};

use super::{StoreError, Usage};
use crate::digest::Digest;

const SUFFIX: &str = ".erofs";
/// The unit of `st_blocks`.
const STAT_BLOCK_BYTES: u64 = 512;

/// The directories of finished and of unfinished layers.
#[derive(Debug)]
pub struct LayerFiles {
    layers: PathBuf,
    partial: PathBuf,
    next_partial: AtomicU64,
}

/// The file of an unfinished layer. It is removed when this is dropped, unless it was kept.
#[derive(Debug)]
pub struct PartialLayer {
    path: PathBuf,
    file: File,
}

impl LayerFiles {
    /// Creates the directories, and empties the one of unfinished layers.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        let files = Self {
            layers: root.join("layers"),
            partial: root.join("partial"),
            next_partial: AtomicU64::new(0),
        };
        match fs::remove_dir_all(&files.partial) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(failed("empty", &files.partial)(e))
            }
            _ => Ok(()),
        }?;
        for directory in [&files.layers, &files.partial] {
            make_directory(directory)?;
        }
        Ok(files)
    }

    pub fn path(&self, layer: &Digest) -> PathBuf {
        self.layers.join(format!("{}{SUFFIX}", layer.hex()))
    }

    pub fn has(&self, layer: &Digest) -> bool {
        self.path(layer).exists()
    }

    /// How many bytes a layer takes on disk. 0 if it has just been removed, so that a list of images does not fail.
    pub fn size(&self, layer: &Digest) -> Result<u64, StoreError> {
        let path = self.path(layer);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(metadata.blocks() * STAT_BLOCK_BYTES),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(e) => Err(failed("read the size of", &path)(e)),
        }
    }

    /// Creates a file for a new layer.
    pub fn create(&self) -> Result<PartialLayer, StoreError> {
        let number = self.next_partial.fetch_add(1, Ordering::Relaxed);
        let path = self.partial.join(number.to_string());
        faults::before(Step::MakeLayerFile)?;
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        let layer = PartialLayer {
            file: file.map_err(failed("create", &path))?,
            path,
        };
        faults::after(Step::MakeLayerFile)?;
        Ok(layer)
    }

    /// Gives a finished layer its name. Its data must be on disk already.
    pub fn keep(&self, partial: PartialLayer, layer: &Digest) -> Result<(), StoreError> {
        let path = self.path(layer);
        faults::within(Step::NameLayer, || {
            fs::rename(&partial.path, &path).map_err(failed("rename a layer to", &path))
        })?;
        let directory = File::open(&self.layers).map_err(failed("open", &self.layers))?;
        directory.sync_all().map_err(failed("sync", &self.layers))
    }

    /// Removes a layer. It is no error if it does not exist.
    pub fn remove(&self, layer: &Digest) -> Result<(), StoreError> {
        let path = self.path(layer);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    /// Removes the layers for which `is_named` returns false.
    pub fn retain(&self, is_named: impl Fn(&Digest) -> bool) -> Result<(), StoreError> {
        retain(&self.layers, SUFFIX, is_named)
    }

    pub fn usage(&self) -> Result<Usage, StoreError> {
        let mut usage = Usage {
            directory: self.layers.clone(),
            used_bytes: 0,
            inodes: 0,
        };
        for directory in [&self.layers, &self.partial] {
            for (path, _) in entries(directory)? {
                // A file that was removed in the meantime takes no space.
                if let Ok(metadata) = fs::symlink_metadata(&path) {
                    usage.used_bytes += metadata.blocks() * STAT_BLOCK_BYTES;
                    usage.inodes += 1;
                }
            }
        }
        Ok(usage)
    }
}

impl PartialLayer {
    pub fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }
}

impl Drop for PartialLayer {
    fn drop(&mut self) {
        // There is no file any more if the layer was kept.
        let _ = fs::remove_file(&self.path);
    }
}

/// Makes a directory, or takes over one that exists. Only its owner may use it: images may contain secrets.
pub fn make_directory(directory: &Path) -> Result<(), StoreError> {
    let made = fs::create_dir_all(directory);
    made.and_then(|()| fs::set_permissions(directory, Permissions::from_mode(0o700)))
        .map_err(failed("create", directory))
}

/// Removes the files named by a digest and `suffix` for whose digest `is_named` returns false.
pub fn retain(
    directory: &Path,
    suffix: &str,
    is_named: impl Fn(&Digest) -> bool,
) -> Result<(), StoreError> {
    for (path, name) in entries(directory)? {
        let hex = name.to_str().and_then(|name| name.strip_suffix(suffix));
        let layer = hex.and_then(|hex| format!("sha256:{hex}").parse().ok());
        // Other files were not put there by us, so they stay.
        if layer.is_some_and(|layer| !is_named(&layer)) {
            fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
    }
    Ok(())
}

fn entries(directory: &Path) -> Result<Vec<(PathBuf, std::ffi::OsString)>, StoreError> {
    let listed = fs::read_dir(directory).and_then(|entries| {
        let named = |entry: fs::DirEntry| (entry.path(), entry.file_name());
        entries.map(|entry| entry.map(named)).collect()
    });
    listed.map_err(failed("list", directory))
}

pub fn failed(
    operation: &'static str,
    path: &(impl AsRef<OsStr> + ?Sized),
) -> impl FnOnce(io::Error) -> StoreError {
    let path = PathBuf::from(path.as_ref());
    move |source| StoreError::Files {
        operation,
        path,
        source,
    }
}
