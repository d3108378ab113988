// SPDX-License-Identifier: Apache-2.0
//! Takes over every descriptor that the VMM was started with, and checks what each one is.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::fs::OFlags;

use crate::config::{KernelSum, Start, VmConfig};
use crate::devices::blk::disk::{ImageDisk, ScratchDisk};
use crate::extent::SECTOR_BYTES;
use crate::foreseen::Foreseen;
use crate::inherited::Inherited;
use crate::sys;

/// The size of `struct virtio_net_hdr_v1`.
const TAP_HEADER_BYTES: i32 = 12;

/// Which descriptor cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("take over the {} as descriptor {}", .what.name(), .what.number())]
pub struct ResourceError {
    what: Inherited,
    source: io::Error,
}

/// Everything that the VM needs from the host.
#[derive(Debug)]
pub struct Resources {
    pub kvm: File,
    pub origin: Origin,
    pub console: File,
    pub control: UnixListener,
    pub backends: Backends,
}

/// What the guest begins with.
#[derive(Debug)]
pub enum Origin {
    Boot {
        image: BootImage,
        /// If it will be a template.
        template: Option<Saved>,
    },
    Fork {
        template: Saved,
        /// `None`: the parent learns from this one.
        foreseen: Option<Foreseen>,
    },
    Restore {
        checkpoint: Saved,
        maps_memory: bool,
    },
}

/// What a kernel boots from.
#[derive(Debug)]
pub struct BootImage {
    pub kernel: File,
    pub initramfs: File,
}

/// The files of a template or of a checkpoint.
#[derive(Debug)]
pub struct Saved {
    pub kernel_sum: KernelSum,
    pub memory: File,
    pub state: File,
}

/// The host side of the devices.
#[derive(Debug)]
pub struct Backends {
    pub vsock: UnixListener,
    /// `None` in a VM that goes on, whose agent is ready from the start.
    pub ready: Option<UnixStream>,
    pub tap: Option<File>,
    pub image: ImageDisk,
    pub scratch: ScratchDisk,
}

impl Resources {
    pub fn take(config: &VmConfig) -> Result<Self, ResourceError> {
        Ok(Self {
            kvm: device(Inherited::Kvm)?,
            origin: Origin::take(&config.start)?,
            console: take(Inherited::Console)?,
            control: listener(Inherited::Control)?,
            backends: Backends {
                vsock: listener(Inherited::Vsock)?,
                ready: ready(&config.start)?,
                tap: config.net.as_ref().map(|_| tap()).transpose()?,
                image: image(config.modules)?,
                scratch: scratch(config.scratch_disk)?,
            },
        })
    }
}

impl Origin {
    fn take(start: &Start) -> Result<Self, ResourceError> {
        let template = match start {
            Start::Boot => None,
            Start::Template { kernel_sum } => Some(Saved::take(*kernel_sum)?),
            Start::Fork {
                kernel_sum,
                foreseen,
            } => {
                return Ok(Self::Fork {
                    template: Saved::take(*kernel_sum)?,
                    foreseen: foreseen.clone(),
                });
            }
            Start::Restore {
                kernel_sum,
                maps_memory,
            } => {
                let checkpoint = Saved::take(*kernel_sum)?;
                let flags = rustix::fs::fcntl_getfl(&checkpoint.memory);
                let flags = flags.map_err(failed(Inherited::Memory))?;
                if flags & OFlags::RWMODE != OFlags::RDONLY {
                    let wrong = io::Error::other("it is not open for reading only");
                    return Err(failed(Inherited::Memory)(wrong));
                }
                return Ok(Self::Restore {
                    checkpoint,
                    maps_memory: *maps_memory,
                });
            }
        };
        let image = BootImage {
            kernel: take(Inherited::Kernel)?,
            initramfs: take(Inherited::Initramfs)?,
        };
        Ok(Self::Boot { image, template })
    }
}

impl Saved {
    fn take(kernel_sum: KernelSum) -> Result<Self, ResourceError> {
        Ok(Self {
            kernel_sum,
            memory: take(Inherited::Memory)?,
            state: take(Inherited::State)?,
        })
    }
}

fn ready(start: &Start) -> Result<Option<UnixStream>, ResourceError> {
    match start {
        Start::Fork { .. } | Start::Restore { .. } => Ok(None),
        Start::Boot | Start::Template { .. } => {
            let socket = nonblocking(Inherited::Ready)?;
            Ok(Some(UnixStream::from(OwnedFd::from(socket))))
        }
    }
}

fn failed<E: Into<io::Error>>(what: Inherited) -> impl Fn(E) -> ResourceError {
    move |source| ResourceError {
        what,
        source: source.into(),
    }
}

fn take(what: Inherited) -> Result<File, ResourceError> {
    what.take().map_err(failed(what))
}

/// A character device.
fn device(what: Inherited) -> Result<File, ResourceError> {
    let device = take(what)?;
    match device.metadata().map_err(failed(what))?.file_type() {
        kind if kind.is_char_device() => Ok(device),
        _ => Err(failed(what)(io::Error::other("it is no character device"))),
    }
}

fn nonblocking(what: Inherited) -> Result<File, ResourceError> {
    let file = take(what)?;
    let flags = rustix::fs::fcntl_getfl(&file).map_err(failed(what))?;
    rustix::fs::fcntl_setfl(&file, flags | OFlags::NONBLOCK).map_err(failed(what))?;
    Ok(file)
}

fn listener(what: Inherited) -> Result<UnixListener, ResourceError> {
    let socket = nonblocking(what)?;
    match rustix::net::sockopt::socket_acceptconn(&socket).map_err(failed(what))? {
        true => Ok(UnixListener::from(OwnedFd::from(socket))),
        false => Err(failed(what)(io::Error::other("nobody listens on it"))),
    }
}

/// The image disk as the guest finds it at its boot.
fn image(has_modules: bool) -> Result<ImageDisk, ResourceError> {
    let disk = ImageDisk::default();
    if has_modules {
        let failed = failed(Inherited::Modules);
        let file = take(Inherited::Modules)?;
        let bytes = regular_size(&file);
        let bytes = bytes.ok_or_else(|| failed(io::Error::other("it is no file with contents")))?;
        let appended = disk.append(file, bytes);
        appended.map_err(|e| failed(io::Error::other(e)))?;
    }
    Ok(disk)
}

fn scratch(is_there: bool) -> Result<ScratchDisk, ResourceError> {
    if !is_there {
        return Ok(ScratchDisk::new(None, 0));
    }
    let mut file = take(Inherited::Scratch)?;
    // The end is the size, for block devices as well.
    let bytes = file
        .seek(SeekFrom::End(0))
        .map_err(failed(Inherited::Scratch))?;
    let bytes = bytes - bytes % SECTOR_BYTES;
    Ok(ScratchDisk::new(Some(file), bytes))
}

fn tap() -> Result<File, ResourceError> {
    let tap = nonblocking(Inherited::Tap)?;
    let sized = sys::set_tap_header_size(tap.as_fd(), TAP_HEADER_BYTES);
    sized.map_err(failed(Inherited::Tap))?;
    Ok(tap)
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
