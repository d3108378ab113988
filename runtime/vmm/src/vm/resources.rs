// SPDX-License-Identifier: Apache-2.0
//! Opens every file of the configuration before any guest code runs, while the process still has the
//! right to do so. The result holds descriptors, not paths.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::config::{NetConfig, VmConfig};
use crate::devices::blk::disk::{ImageDisk, ScratchDisk};
use crate::devices::blk::window::WindowError;
use crate::extent::SECTOR_BYTES;
use crate::sys;

/// The size of `struct virtio_net_hdr_v1`.
const TAP_HEADER_BYTES: i32 = 12;

/// What part of the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    #[error("open {what} {path}")]
    Open {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path} is not a regular file of at least one byte")]
    NotAFile { path: PathBuf },
    #[error("add extent {path}")]
    Extent { path: PathBuf, source: WindowError },
    #[error("listen on {path}")]
    Listen { path: PathBuf, source: io::Error },
    #[error("take over TAP descriptor {fd}")]
    Tap { fd: i32, source: io::Error },
}

/// Everything that the VM needs from the host.
#[derive(Debug)]
pub struct Resources {
    pub kernel: File,
    pub initramfs: File,
    pub console: File,
    pub control: UnixListener,
    pub backends: Backends,
}

/// The host side of the devices.
#[derive(Debug)]
pub struct Backends {
    pub vsock: UnixListener,
    pub tap: Option<File>,
    pub image: ImageDisk,
    pub scratch: ScratchDisk,
}

impl Resources {
    pub fn open(config: &VmConfig) -> Result<Self, ResourceError> {
        // First, before another descriptor can get the number of the inherited one.
        let tap = config.net.as_ref().map(open_tap).transpose()?;
        let image = ImageDisk::default();
        for path in &config.image_disk.extents {
            let file = open("image extent", path, OpenOptions::new().read(true))?;
            let bytes = regular_size(&file)
                .ok_or_else(|| ResourceError::NotAFile { path: path.clone() })?;
            let appended = image.append(file, bytes);
            appended.map_err(|source| ResourceError::Extent {
                path: path.clone(),
                source,
            })?;
        }
        let mut log = OpenOptions::new();
        log.write(true).create(true).truncate(true).mode(0o600);
        Ok(Self {
            kernel: open("kernel", &config.kernel, OpenOptions::new().read(true))?,
            initramfs: open(
                "initramfs",
                &config.initramfs,
                OpenOptions::new().read(true),
            )?,
            console: open("console log", &config.console_log, &log)?,
            control: listen(&config.control_socket)?,
            backends: Backends {
                vsock: listen(&config.vsock.socket)?,
                tap,
                image,
                scratch: open_scratch(config.scratch_disk.as_deref())?,
            },
        })
    }
}

fn open(what: &'static str, path: &Path, options: &OpenOptions) -> Result<File, ResourceError> {
    options.open(path).map_err(|source| ResourceError::Open {
        what,
        path: path.to_owned(),
        source,
    })
}

/// The size of a regular file. `None` for an empty file and for anything else.
pub(super) fn regular_size(file: &File) -> Option<u64> {
    let metadata = file.metadata().ok()?;
    Some(metadata.len()).filter(|&len| metadata.is_file() && len > 0)
}

/// The size of a block device, rounded down to whole sectors. `None` if it is empty or no block device.
pub(super) fn device_size(device: &File) -> Option<u64> {
    let is_block = device.metadata().ok()?.file_type().is_block_device();
    let mut end = device;
    let bytes = end.seek(SeekFrom::End(0)).ok().filter(|_| is_block)?;
    Some(bytes - bytes % SECTOR_BYTES).filter(|&bytes| bytes > 0)
}

fn open_scratch(path: Option<&Path>) -> Result<ScratchDisk, ResourceError> {
    let Some(path) = path else {
        return Ok(ScratchDisk::new(None, 0));
    };
    let what = "scratch disk";
    let mut file = open(what, path, OpenOptions::new().read(true).write(true))?;
    // The end is the size, for block devices as well.
    let bytes = file
        .seek(SeekFrom::End(0))
        .map_err(|source| ResourceError::Open {
            what,
            path: path.to_owned(),
            source,
        })?;
    let bytes = bytes - bytes % SECTOR_BYTES;
    Ok(ScratchDisk::new(Some(file), bytes))
}

fn open_tap(net: &NetConfig) -> Result<File, ResourceError> {
    let fd = net.tap_fd;
    let failed = |source| ResourceError::Tap { fd, source };
    let tap = bulkhead_share::inherited(fd).map_err(failed)?;
    if !tap.metadata().is_ok_and(|m| m.file_type().is_char_device()) {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    let flags = rustix::fs::fcntl_getfl(&tap).map_err(|e| failed(e.into()))?;
    rustix::fs::fcntl_setfl(&tap, flags | OFlags::NONBLOCK).map_err(|e| failed(e.into()))?;
    use std::os::fd::AsFd;
    sys::set_tap_header_size(tap.as_fd(), TAP_HEADER_BYTES).map_err(failed)?;
    Ok(tap)
}

/// Listens on a socket that only our user may use. Replaces a socket that a dead VMM left behind.
fn listen(path: &Path) -> Result<UnixListener, ResourceError> {
    let failed = |source| ResourceError::Listen {
        path: path.to_owned(),
        source,
    };
    if std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        std::fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}
