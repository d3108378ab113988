// SPDX-License-Identifier: Apache-2.0
//! All counters of one VM in one place. Devices and vCPUs share them; the control socket and the exit
//! report read them.

use std::sync::Arc;
use std::time::Instant;

use crate::statistics::{
    BalloonCounters, DeviceCounters, ExitCounters, KvmExits, Milestone, Statistics, micros_since,
};

/// The shared counters of one VM.
#[derive(Debug)]
pub struct Observed {
    origin: Instant,
    pub exits: Arc<ExitCounters>,
    /// One per vCPU. Empty if the host does not count exits.
    pub kvm_exits: Arc<Vec<KvmExits>>,
    pub vsock: Arc<DeviceCounters>,
    pub net: Arc<DeviceCounters>,
    pub image_disk: Arc<DeviceCounters>,
    pub scratch_disk: Arc<DeviceCounters>,
    pub volume_disk: Arc<DeviceCounters>,
    pub rng: Arc<DeviceCounters>,
    pub balloon: Arc<BalloonCounters>,
    pub files: Arc<DeviceCounters>,
    pub jailed: Milestone,
    pub vcpus_started: Milestone,
    pub vsock_ready: Arc<Milestone>,
    pub first_stream: Arc<Milestone>,
}

impl Observed {
    /// `origin` is the time at which the process began.
    #[must_use]
    pub fn new(origin: Instant) -> Self {
        Self {
            origin,
            exits: Arc::default(),
            kvm_exits: Arc::default(),
            vsock: Arc::default(),
            net: Arc::default(),
            image_disk: Arc::default(),
            scratch_disk: Arc::default(),
            volume_disk: Arc::default(),
            rng: Arc::default(),
            balloon: Arc::default(),
            files: Arc::default(),
            jailed: Milestone::new(origin),
            vcpus_started: Milestone::new(origin),
            vsock_ready: Arc::new(Milestone::new(origin)),
            first_stream: Arc::new(Milestone::new(origin)),
        }
    }

    #[must_use]
    pub fn snapshot(&self) -> Statistics {
        Statistics {
            exits_total: KvmExits::sum(&self.kvm_exits),
            exits_userspace: self.exits.snapshot(),
            vsock: self.vsock.snapshot(),
            net: self.net.snapshot(),
            image_disk: self.image_disk.snapshot(),
            scratch_disk: self.scratch_disk.snapshot(),
            volume_disk: self.volume_disk.snapshot(),
            rng: self.rng.snapshot(),
            balloon: self.balloon.snapshot(),
            files: self.files.snapshot(),
            uptime_us: micros_since(self.origin),
            jailed_us: self.jailed.get(),
            vcpus_started_us: self.vcpus_started.get(),
            vsock_ready_us: self.vsock_ready.get(),
            first_stream_us: self.first_stream.get(),
        }
    }
}
