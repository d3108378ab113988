// SPDX-License-Identifier: Apache-2.0
//! What requests of the control socket do to the VM, on the main thread. [`checkpoint`] writes the files of one.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bulkhead_text::chain;
use rustix::fs::OFlags;

use super::resources::{device_size, regular_size};
use super::{KICK_TIME, Running, STACK_BYTES, checkpoint, closing, kick};
use crate::config::KernelSum;
use crate::control::server::{NotSaved, Target};
use crate::control::{CheckpointFiles, Checkpointed};
use crate::devices::blk::disk::Volume;
use crate::devices::mmio::lock;
use crate::devices::saved::{Busy, Purpose};
use crate::extent::{Extent, SECTOR_BYTES};
use crate::slot::Slot;
use crate::statistics::Statistics;
use crate::vcpu::Gate;

/// How long a template waits for the ends of its devices' turns.
const TURN_TIME: Duration = Duration::from_secs(2);

/// While it is there, the vCPUs are parked. Then they go on, unless they were parked before.
struct Still<'a> {
    gate: &'a Gate,
    was_open: bool,
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        if self.was_open {
            self.gate.resume();
        }
    }
}

impl Running {
    fn stand_still(&self) -> Result<Still<'_>, String> {
        let still = Still {
            gate: &self.gate,
            was_open: self.gate.is_open(),
        };
        self.gate.pause();
        kick(&self.vcpus);
        match self.gate.wait_parked(self.vcpus.len(), KICK_TIME) {
            true => Ok(still),
            false => Err(format!(
                "a vCPU did not leave the guest within {KICK_TIME:?}"
            )),
        }
    }
}

impl Target for Running {
    fn attach_extent(&self, file: File) -> Result<Extent, String> {
        let flags = rustix::fs::fcntl_getfl(&file).map_err(|e| e.to_string())?;
        if flags & rustix::fs::OFlags::RWMODE != rustix::fs::OFlags::RDONLY {
            return Err("descriptor is not open for reading only".to_owned());
        }
        let bytes = regular_size(&file)
            .ok_or_else(|| "descriptor is not a regular file of at least one byte".to_owned())?;
        let appended = self.devices.image_disk.append(file, bytes);
        appended.map_err(|e| e.to_string())
    }

    fn attach_volume(&self, file: File) -> Result<Extent, String> {
        let flags = rustix::fs::fcntl_getfl(&file).map_err(|e| e.to_string())?;
        let access = flags & OFlags::RWMODE;
        let (volume, bytes) = if let Some(bytes) = device_size(&file) {
            if access != OFlags::RDONLY && !flags.contains(OFlags::DSYNC) {
                return Err("device is not open for synchronous writes (O_DSYNC)".to_owned());
            }
            (Volume::Device(file), bytes)
        } else {
            let bytes = regular_size(&file).filter(|bytes| bytes.is_multiple_of(SECTOR_BYTES));
            let bytes = bytes.ok_or_else(|| {
                "descriptor is neither a block device nor a file of at least a sector".to_owned()
            })?;
            if access != OFlags::RDWR {
                return Err("file is not open for reading and writing".to_owned());
            }
            (Volume::File(file), bytes)
        };
        let appended = self.devices.volume_disk.append(volume, bytes);
        appended.map_err(|e| e.to_string())
    }

    fn find_volume(&self, file: &File) -> Result<Extent, String> {
        let found = self.devices.volume_disk.find(file);
        let found = found.map_err(|e| e.to_string())?;
        found.ok_or_else(|| "file is not on the volume disk".to_owned())
    }

    fn detach_volume(&self, first_sector: u64) -> Result<(), String> {
        let Some(volume) = self.devices.volume_disk.remove(first_sector) else {
            return Ok(());
        };
        // Without a name of its own, because it has the main thread's list.
        let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
        closing::close(volume, thread, closing::LIMIT).map_err(|e| chain(&e))
    }

    fn connect_files(&self, server: OwnedFd) -> Result<(), String> {
        let kind = rustix::net::sockopt::socket_type(&server).map_err(|e| e.to_string())?;
        if kind != rustix::net::SocketType::STREAM {
            return Err("descriptor is not a stream socket".to_owned());
        }
        let connected = lock(&self.devices.files).connect(UnixStream::from(server));
        connected.map_err(|e| e.to_string())
    }

    fn balloon(&self, pages: u32) {
        lock(&self.devices.balloon).set_target(pages);
    }

    fn statistics(&self) -> Statistics {
        self.observed.snapshot()
    }

    fn checkpoint(
        &self,
        kernel_sum: KernelSum,
        limit: Duration,
        files: CheckpointFiles,
    ) -> Result<Checkpointed, String> {
        // First, because a template may not make the system calls of what follows.
        if self.saver.template.is_some() {
            return Err("this VM is a template".to_owned());
        }
        checkpoint::check(&files).map_err(|e| chain(&e))?;
        if self.devices.volume_disk.has_volumes() {
            let (device, what) = (Slot::VolumeDisk.name(), "a volume");
            return Err(Busy { device, what }.to_string());
        }
        let begun = Instant::now();
        let until = begun + limit;
        let still = self.stand_still()?;
        let frozen = self.bus.freeze(Purpose::Checkpoint, until);
        let (devices, frozen) = frozen.map_err(|busy| busy.to_string())?;
        let source = checkpoint::Source {
            saver: &self.saver,
            vm: &self.vm,
            kernel_sum,
            devices,
            memory: &self.memory,
            scratch: &self.devices.scratch_disk,
        };
        let written = checkpoint::write(source, &files, until);
        // The devices first: a vCPU might wait for one.
        drop(frozen);
        drop(still);
        let paused = begun.elapsed();
        let written = written.map_err(|e| chain(&e))?;
        Ok(Checkpointed {
            paused_us: u64::try_from(paused.as_micros()).unwrap_or(u64::MAX),
            memory_bytes: written.memory_bytes,
            scratch_bytes: written.scratch_bytes,
        })
    }

    fn save(&self) -> Result<(), NotSaved> {
        let Some((kernel_sum, file)) = &self.saver.template else {
            return Err(NotSaved::Refused("this VM is no template".to_owned()));
        };
        let still = self.stand_still().map_err(NotSaved::Refused)?;
        let frozen = self
            .bus
            .freeze(Purpose::Template, Instant::now() + TURN_TIME);
        let (devices, frozen) = frozen.map_err(|busy| NotSaved::Refused(busy.to_string()))?;
        // There is no way back from here.
        frozen.for_ever();
        std::mem::forget(still);
        let saved = self.saver.save(&self.vm, *kernel_sum, devices, file);
        saved.map_err(|e| NotSaved::Failed(chain(&e)))
    }

    fn pause(&self) -> Result<(), String> {
        self.stand_still().map(std::mem::forget)
    }

    fn resume(&self) {
        self.gate.resume();
    }
}
