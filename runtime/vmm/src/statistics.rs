// SPDX-License-Identifier: Apache-2.0
//! Counters: atomics to which vCPUs and devices add, and the snapshot that the control socket returns.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

/// Relaxed, because these are sums; no thread relies on them to see what another has done.
const ORDER: Ordering = Ordering::Relaxed;

/// Requests and bytes of one device, from the guest's point of view.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatistics {
    pub requests: u64,
    /// Bytes that went to the guest.
    pub read_bytes: u64,
    /// Bytes that came from the guest.
    pub written_bytes: u64,
    /// Requests that were malformed or that the host could not serve.
    pub failures: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatistics {
    /// How many pages of 4 KiB are in the balloon, as the guest says.
    pub actual_pages: u64,
    /// How many bytes were taken back because the guest inflated the balloon, in total.
    pub inflated_bytes: u64,
    /// How many bytes were taken back because the guest reported them free, in total.
    pub reported_bytes: u64,
}

/// VM exits that reached the VMM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitStatistics {
    pub io_in: u64,
    pub io_out: u64,
    pub mmio_read: u64,
    pub mmio_write: u64,
    pub other: u64,
}

impl ExitStatistics {
    #[must_use]
    pub fn total(&self) -> u64 {
        let sums = [self.io_in, self.io_out, self.mmio_read, self.mmio_write];
        sums.iter()
            .fold(self.other, |sum, n| sum.saturating_add(*n))
    }
}

/// The reply to `statistics` on the control socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// All VM exits, including those that KVM handles itself. Absent if the host does not count them.
    pub exits_total: Option<u64>,
    pub exits_userspace: ExitStatistics,
    pub vsock: DeviceStatistics,
    pub net: DeviceStatistics,
    pub image_disk: DeviceStatistics,
    pub scratch_disk: DeviceStatistics,
    /// The volume disk: block devices and files of the host.
    #[serde(default)]
    pub volume_disk: DeviceStatistics,
    pub rng: DeviceStatistics,
    pub balloon: BalloonStatistics,
    /// The virtio-fs device: shared directories.
    #[serde(default)]
    pub files: DeviceStatistics,
    /// Microseconds since the VMM's process began. The events below are absent until they happen.
    pub uptime_us: u64,
    /// The process had entered its jail, except for the filters of system calls, which each thread applies when it starts.
    #[serde(default)]
    pub jailed_us: Option<u64>,
    pub vcpus_started_us: Option<u64>,
    /// The guest's vsock driver was ready.
    pub vsock_ready_us: Option<u64>,
    /// The first stream between host and guest was opened, by either side.
    pub first_stream_us: Option<u64>,
}

/// The counters behind [`DeviceStatistics`].
#[derive(Debug, Default)]
pub struct DeviceCounters {
    requests: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    failures: AtomicU64,
}

fn add(counter: &AtomicU64, bytes: usize) {
    counter.fetch_add(u64::try_from(bytes).unwrap_or(0), ORDER);
}

impl DeviceCounters {
    /// Counts a request that gave `bytes` to the guest.
    pub fn read(&self, bytes: usize) {
        self.requests.fetch_add(1, ORDER);
        add(&self.read_bytes, bytes);
    }

    /// Counts a request that took `bytes` from the guest.
    pub fn written(&self, bytes: usize) {
        self.requests.fetch_add(1, ORDER);
        add(&self.written_bytes, bytes);
    }

    /// Counts a request that failed. Returns 0, the number of bytes that were written to its chain.
    pub fn fail(&self) -> usize {
        self.failures.fetch_add(1, ORDER);
        0
    }

    #[must_use]
    pub fn snapshot(&self) -> DeviceStatistics {
        DeviceStatistics {
            requests: self.requests.load(ORDER),
            read_bytes: self.read_bytes.load(ORDER),
            written_bytes: self.written_bytes.load(ORDER),
            failures: self.failures.load(ORDER),
        }
    }
}

/// The counters behind [`BalloonStatistics`].
#[derive(Debug, Default)]
pub struct BalloonCounters {
    actual_pages: AtomicU64,
    inflated_bytes: AtomicU64,
    reported_bytes: AtomicU64,
}

impl BalloonCounters {
    pub fn set_actual(&self, pages: u32) {
        self.actual_pages.store(u64::from(pages), ORDER);
    }

    pub fn inflated(&self, bytes: u64) {
        self.inflated_bytes.fetch_add(bytes, ORDER);
    }

    pub fn reported(&self, bytes: u64) {
        self.reported_bytes.fetch_add(bytes, ORDER);
    }

    #[must_use]
    pub fn snapshot(&self) -> BalloonStatistics {
        BalloonStatistics {
            actual_pages: self.actual_pages.load(ORDER),
            inflated_bytes: self.inflated_bytes.load(ORDER),
            reported_bytes: self.reported_bytes.load(ORDER),
        }
    }
}

/// The counters behind [`ExitStatistics`].
#[derive(Debug, Default)]
pub struct ExitCounters {
    pub io_in: AtomicU64,
    pub io_out: AtomicU64,
    pub mmio_read: AtomicU64,
    pub mmio_write: AtomicU64,
    pub other: AtomicU64,
}

impl ExitCounters {
    pub fn count(counter: &AtomicU64) {
        counter.fetch_add(1, ORDER);
    }

    #[must_use]
    pub fn snapshot(&self) -> ExitStatistics {
        ExitStatistics {
            io_in: self.io_in.load(ORDER),
            io_out: self.io_out.load(ORDER),
            mmio_read: self.mmio_read.load(ORDER),
            mmio_write: self.mmio_write.load(ORDER),
            other: self.other.load(ORDER),
        }
    }
}

/// The time of an event that happens once, in microseconds since the process began.
#[derive(Debug)]
pub struct Milestone {
    origin: Instant,
    /// Zero as long as it has not happened.
    micros: AtomicU64,
}

impl Milestone {
    #[must_use]
    pub fn new(origin: Instant) -> Self {
        Self {
            origin,
            micros: AtomicU64::new(0),
        }
    }

    /// Remembers the time of the first call.
    pub fn reached(&self) {
        if self.micros.load(ORDER) == 0 {
            let now = micros_since(self.origin).max(1);
            let _ = self.micros.compare_exchange(0, now, ORDER, ORDER);
        }
    }

    #[must_use]
    pub fn get(&self) -> Option<u64> {
        Some(self.micros.load(ORDER)).filter(|&micros| micros > 0)
    }
}

#[must_use]
pub fn micros_since(origin: Instant) -> u64 {
    u64::try_from(origin.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// The counter `exits` in the binary statistics of one vCPU, which KVM provides
/// (Documentation/virt/kvm/api.rst, 4.133).
#[derive(Debug)]
pub struct KvmExits {
    file: File,
    offset: u64,
}

impl KvmExits {
    /// Finds the counter. `None` if this host has none.
    #[must_use]
    pub fn find(file: File) -> Option<Self> {
        let word = |at: u64| -> Option<u32> {
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, at).ok()?;
            Some(u32::from_ne_bytes(bytes))
        };
        let name_size = word(4)?;
        let descriptors = word(8)?;
        let first = u64::from(word(16)?);
        let data = u64::from(word(20)?);
        // A descriptor is flags (4), exponent (2), size (2), offset (4), bucket size (4), name.
        let stride = u64::from(name_size).checked_add(16)?;
        for index in 0..u64::from(descriptors.min(1024)) {
            let at = first.checked_add(index.checked_mul(stride)?)?;
            let mut name = [0; 6];
            file.read_exact_at(&mut name, at.checked_add(16)?).ok()?;
            if name == *b"exits\0" {
                let offset = data.checked_add(u64::from(word(at.checked_add(8)?)?))?;
                return Some(Self { file, offset });
            }
        }
        None
    }

    #[must_use]
    pub fn read(&self) -> Option<u64> {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, self.offset).ok()?;
        Some(u64::from_ne_bytes(bytes))
    }

    /// The exits of all vCPUs. `None` if this host does not count them.
    #[must_use]
    pub fn sum(all: &[Self]) -> Option<u64> {
        let exits = all.iter().filter_map(Self::read);
        (!all.is_empty()).then(|| exits.sum())
    }
}
