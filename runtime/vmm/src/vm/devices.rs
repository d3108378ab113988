// SPDX-License-Identifier: Apache-2.0
//! The eight devices of a VM before it runs, each created from its part of the configuration and its backend on the
//! host. [`Slot`] defines the order in which the guest finds them.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use super::observed::Observed;
use super::resources::Backends;
use crate::config::{MacAddress, Start, VmConfig};
use crate::devices::balloon::Balloon;
use crate::devices::blk::Blk;
use crate::devices::blk::disk::{ImageDisk, ScratchDisk, VolumeDisk};
use crate::devices::fs::Fs;
use crate::devices::mmio::SharedDevice;
use crate::devices::net::Net;
use crate::devices::rng::{HostRandom, Rng};
use crate::devices::vsock::Vsock;
use crate::devices::vsock::muxer::Muxer;
use crate::slot::Slot;

const DEFAULT_MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
const DEFAULT_MTU: u16 = 1500;

/// A device, or a part of one, could not be created.
#[derive(Debug, thiserror::Error)]
#[error("create {what}")]
pub struct DeviceError {
    what: &'static str,
    source: io::Error,
}

impl DeviceError {
    pub fn of(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self { what, source }
    }
}

type Shared<D> = Arc<Mutex<D>>;

fn shared<D>(device: D) -> Shared<D> {
    Arc::new(Mutex::new(device))
}

/// The devices, which are shared by their transports, their workers and, for some, the control socket.
#[allow(missing_debug_implementations)]
pub struct Devices {
    vsock: Shared<Vsock>,
    net: Shared<Net>,
    image: Shared<Blk<ImageDisk>>,
    scratch: Shared<Blk<ScratchDisk>>,
    rng: Shared<Rng<HostRandom>>,
    pub balloon: Shared<Balloon>,
    pub files: Shared<Fs>,
    volumes: Shared<Blk<VolumeDisk>>,
    /// The disks that the control socket changes. It must not lock their devices, because a request that hangs does.
    pub image_disk: ImageDisk,
    pub volume_disk: VolumeDisk,
    /// The disk that a checkpoint copies, while its device is locked.
    pub scratch_disk: ScratchDisk,
}

impl Devices {
    pub fn new(
        config: &VmConfig,
        backends: Backends,
        observed: &Observed,
    ) -> Result<Self, DeviceError> {
        let (mac, mtu) = match &config.net {
            Some(net) => (net.mac, net.mtu),
            None => (DEFAULT_MAC, DEFAULT_MTU),
        };
        let net = Net::new(backends.tap, mac, mtu, Arc::clone(&observed.net));
        let image_disk = backends.image;
        let image = Arc::clone(&observed.image_disk);
        let image = Blk::new(image_disk.clone(), Slot::ImageDisk.name(), image);
        let scratch = Arc::clone(&observed.scratch_disk);
        let scratch_disk = backends.scratch;
        let scratch = Blk::new(scratch_disk.clone(), Slot::ScratchDisk.name(), scratch);
        let volume_disk = VolumeDisk::default();
        let volumes = Arc::clone(&observed.volume_disk);
        let volumes = Blk::new(volume_disk.clone(), Slot::VolumeDisk.name(), volumes);
        let files = Fs::new(Arc::clone(&observed.files));
        let files = files.map_err(DeviceError::of(Slot::Files.name()))?;
        Ok(Self {
            vsock: shared(vsock(config, backends.vsock, backends.ready, observed)?),
            net: shared(net),
            image: shared(image),
            scratch: shared(scratch),
            rng: shared(Rng::new(HostRandom, Arc::clone(&observed.rng))),
            balloon: shared(Balloon::new(Arc::clone(&observed.balloon))),
            files: shared(files),
            volumes: shared(volumes),
            image_disk,
            volume_disk,
            scratch_disk,
        })
    }

    /// The device at a place in the order.
    pub fn at(&self, slot: Slot) -> SharedDevice {
        match slot {
            Slot::Vsock => Arc::clone(&self.vsock) as SharedDevice,
            Slot::Net => Arc::clone(&self.net) as SharedDevice,
            Slot::ImageDisk => Arc::clone(&self.image) as SharedDevice,
            Slot::ScratchDisk => Arc::clone(&self.scratch) as SharedDevice,
            Slot::Rng => Arc::clone(&self.rng) as SharedDevice,
            Slot::Balloon => Arc::clone(&self.balloon) as SharedDevice,
            Slot::Files => Arc::clone(&self.files) as SharedDevice,
            Slot::VolumeDisk => Arc::clone(&self.volumes) as SharedDevice,
        }
    }
}

fn vsock(
    config: &VmConfig,
    listener: UnixListener,
    ready: Option<UnixStream>,
    observed: &Observed,
) -> Result<Vsock, DeviceError> {
    let muxer = Muxer::new(
        config.vsock.guest_cid,
        listener,
        ready.map(|ready| (config.vsock.ready_port, ready)),
        Arc::clone(&observed.vsock),
        Arc::clone(&observed.first_stream),
    );
    let failed = || DeviceError::of(Slot::Vsock.name());
    let mut vsock = Vsock::new(
        config.vsock.guest_cid,
        muxer.map_err(failed())?,
        Arc::clone(&observed.vsock),
        Arc::clone(&observed.vsock_ready),
    );
    if let Start::Restore { .. } = config.start {
        vsock.begin_with_reset().map_err(failed())?;
    }
    Ok(vsock)
}
