// SPDX-License-Identifier: Apache-2.0
//! virtio-blk (virtio 1.2, 5.2) over any [`Disk`]. Runs on the disk worker, which does the I/O
//! itself: one request at a time per VM, directly between file and guest memory.

pub mod disk;
mod shared;
#[cfg(test)]
mod tests;
pub mod window;

use std::sync::Arc;

use super::budget::BYTES as STEP_BYTES;
use super::chain::{Buffers, Chain, ChainError};
use super::ring::{RingError, Served};
use super::{Active, Budget, Turn, VirtioDevice};
use crate::extent::SECTOR_BYTES;
use crate::statistics::DeviceCounters;
use disk::{Disk, DiskRange};

const DEVICE_ID: u32 = 2;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const ID_BYTES: usize = 20;
const QUEUE_SIZE: u16 = 128;
/// Data buffers per request. Header and status take two more descriptors of the chain.
const SEG_MAX: u32 = 126;
const CHAIN_MAX: usize = 128;
/// Ranges per discard request, and how large each of them may be.
const RANGES_MAX: u32 = 16;
const RANGE_SECTORS_MAX: u32 = 1 << 22;
/// The size of `struct virtio_blk_discard_write_zeroes`.
const RANGE_BYTES: usize = 16;
const BUDGET: Budget = Budget::of_chains(32);

/// Why a request is answered with an error.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("request is malformed")]
    Malformed(#[from] ChainError),
    #[error("{len} bytes at sector {sector} do not fit a disk of {sectors} sectors")]
    OutOfRange { sector: u64, len: u64, sectors: u64 },
    #[error("{0} bytes are not a list of 1 to {RANGES_MAX} ranges")]
    Ranges(usize),
    #[error("range of {0} sectors is larger than {RANGE_SECTORS_MAX}")]
    LargeRange(u64),
    #[error("request type {0} is not offered")]
    Unsupported(u32),
    #[error("read or write on the host")]
    Io(#[from] std::io::Error),
}

impl RequestError {
    fn status(&self) -> u8 {
        match self {
            Self::Unsupported(_) => S_UNSUPP,
            Self::Malformed(_)
            | Self::OutOfRange { .. }
            | Self::Ranges(_)
            | Self::LargeRange(_)
            | Self::Io(_) => S_IOERR,
        }
    }
}

impl DiskRange {
    /// Checks a sector and a length that the guest chose.
    pub fn parse(sector: u64, len: u64, sectors: u64) -> Result<Self, RequestError> {
        let out_of_range = RequestError::OutOfRange {
            sector,
            len,
            sectors,
        };
        let start = sector.checked_mul(SECTOR_BYTES);
        let end = start.and_then(|s| s.checked_add(len));
        let size = sectors.saturating_mul(SECTOR_BYTES);
        match (start, end) {
            (Some(start), Some(end)) if end <= size && len.is_multiple_of(SECTOR_BYTES) => {
                Ok(Self { start, len })
            }
            _ => Err(out_of_range),
        }
    }
}

/// A disk as the guest sees it.
#[derive(Debug)]
pub struct Blk<D> {
    disk: D,
    /// The answer to GET_ID.
    id: &'static str,
    active: Option<Active>,
    counters: Arc<DeviceCounters>,
}

impl<D: Disk> Blk<D> {
    #[must_use]
    pub fn new(disk: D, id: &'static str, counters: Arc<DeviceCounters>) -> Self {
        Self {
            disk,
            id,
            active: None,
            counters,
        }
    }

    /// Serves one descriptor chain, of which earlier turns have served `done` bytes.
    fn serve(&self, chain: Chain<'_>, done: usize, budget: &mut Budget) -> Served {
        let Some(data_len) = chain.writable.len().checked_sub(1) else {
            // No space for the status byte: the driver cannot be told anything.
            return Served::Whole(self.counters.fail());
        };
        let data = chain.writable.part(0, data_len);
        let (status, written) = match self.execute(chain.readable, &data, done, budget) {
            Ok(Served::Until(done)) => return Served::Until(done),
            Ok(Served::Whole(written)) => (S_OK, written),
            Err(e) => {
                self.counters.fail();
                (e.status(), 0)
            }
        };
        chain.writable.part(data_len, 1).copy_from(&[status]);
        // The status is the last byte of the chain, so all bytes before it count as written, too.
        Served::Whole(if written == data_len {
            written.saturating_add(1)
        } else {
            chain.writable.len()
        })
    }

    fn execute(
        &self,
        mut from: Buffers<'_>,
        to: &Buffers<'_>,
        done: usize,
        budget: &mut Budget,
    ) -> Result<Served, RequestError> {
        let [kind, sector] = header(from.take()?);
        let kind = u32::try_from(kind & 0xffff_ffff).unwrap_or(u32::MAX);
        match kind {
            T_IN => {
                let step = self.step(sector, to, done, budget)?;
                self.disk.read(step.range, &step.data)?;
                self.counters.read(step.data.len());
                Ok(step.end.map_or(Served::Whole(to.len()), Served::Until))
            }
            T_GET_ID => {
                let mut id = [0; ID_BYTES];
                for (to, from) in id.iter_mut().zip(self.id.bytes()) {
                    *to = from;
                }
                Ok(Served::Whole(to.copy_from(&id)))
            }
            T_OUT if D::WRITABLE => {
                let step = self.step(sector, &from, done, budget)?;
                self.disk.write(step.range, &step.data)?;
                self.counters.written(step.data.len());
                Ok(step.end.map_or(Served::Whole(0), Served::Until))
            }
            // A write to a read-only disk is an I/O error, not an unknown request (5.2.6.2).
            T_OUT => Err(std::io::Error::from(std::io::ErrorKind::ReadOnlyFilesystem).into()),
            T_FLUSH if D::WRITE_CACHE => {
                self.disk.flush()?;
                self.counters.written(0);
                Ok(Served::Whole(0))
            }
            T_DISCARD | T_WRITE_ZEROES if D::WRITABLE => self.discard(kind, &from, done, budget),
            other => Err(RequestError::Unsupported(other)),
        }
    }

    /// Checks a whole request, then returns its next step after `done` bytes.
    fn step<'m>(
        &self,
        sector: u64,
        data: &Buffers<'m>,
        done: usize,
        budget: &mut Budget,
    ) -> Result<Step<'m>, RequestError> {
        let whole = self.range(sector, data)?;
        let done = done.min(data.len());
        let data_now = data.part(done, STEP_BYTES);
        budget.spend_bytes(data_now.len());
        let number = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
        let end = done.saturating_add(data_now.len());
        Ok(Step {
            range: DiskRange {
                start: whole.start.saturating_add(number(done)),
                len: number(data_now.len()),
            },
            data: data_now,
            end: Some(end).filter(|&end| end < data.len()),
        })
    }

    fn range(&self, sector: u64, data: &Buffers<'_>) -> Result<DiskRange, RequestError> {
        let len = u64::try_from(data.len()).unwrap_or(u64::MAX);
        DiskRange::parse(sector, len, self.disk.sectors())
    }

    /// Serves DISCARD and WRITE_ZEROES. Both free the range, which reads as zeroes afterwards.
    /// WRITE_ZEROES requires that; DISCARD would allow any content.
    fn discard(
        &self,
        kind: u32,
        list: &Buffers<'_>,
        done: usize,
        budget: &mut Budget,
    ) -> Result<Served, RequestError> {
        const F_UNMAP: u32 = 1;
        let most = usize::try_from(RANGES_MAX).unwrap_or(0);
        let count = list.len() / RANGE_BYTES;
        if count == 0 || count > most || !list.len().is_multiple_of(RANGE_BYTES) {
            return Err(RequestError::Ranges(list.len()));
        }
        let mut done = done;
        while done < list.len() {
            if budget.bytes_left() == 0 {
                return Ok(Served::Until(done));
            }
            let [sector, rest] = header(list.part(done, RANGE_BYTES).take()?);
            let sectors = rest & 0xffff_ffff;
            let flags = u32::try_from(rest >> 32).unwrap_or(u32::MAX);
            let allowed = if kind == T_WRITE_ZEROES { F_UNMAP } else { 0 };
            if flags & !allowed != 0 {
                return Err(RequestError::Unsupported(kind));
            }
            if sectors > RANGE_SECTORS_MAX.into() {
                return Err(RequestError::LargeRange(sectors));
            }
            let len = sectors.saturating_mul(SECTOR_BYTES);
            let range = DiskRange::parse(sector, len, self.disk.sectors())?;
            self.disk.discard(range)?;
            budget.spend_bytes(usize::try_from(len).unwrap_or(usize::MAX));
            done = done.saturating_add(RANGE_BYTES);
        }
        self.counters.written(0);
        Ok(Served::Whole(0))
    }
}

/// What of a request is served in one turn.
struct Step<'m> {
    range: DiskRange,
    data: Buffers<'m>,
    /// Where it ends, if that is not the end of the request.
    end: Option<usize>,
}

/// Reads sixteen bytes as two little-endian numbers.
fn header(bytes: [u8; 16]) -> [u64; 2] {
    let both = u128::from_le_bytes(bytes);
    let low = u64::try_from(both & u128::from(u64::MAX)).unwrap_or(0);
    let high = u64::try_from(both >> 64).unwrap_or(0);
    [low, high]
}

impl<D: Disk> VirtioDevice for Blk<D> {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        let common = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY;
        let flush = if D::WRITE_CACHE { F_FLUSH } else { 0 };
        if D::WRITABLE {
            common | flush | F_DISCARD | F_WRITE_ZEROES
        } else {
            common | F_RO
        }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        // The offsets are those of struct virtio_blk_config (virtio 1.2, 5.2.4).
        let mut space = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| {
            for (to, from) in space.iter_mut().skip(at).zip(bytes) {
                *to = *from;
            }
        };
        put(0, &self.disk.sectors().to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &512u32.to_le_bytes());
        // physical_block_exp: 2^3 logical blocks of 512 bytes make a physical block of 4 KiB.
        put(24, &[3]);
        if D::WRITABLE {
            put(36, &RANGE_SECTORS_MAX.to_le_bytes());
            put(40, &RANGES_MAX.to_le_bytes());
            put(44, &8u32.to_le_bytes());
            put(48, &RANGE_SECTORS_MAX.to_le_bytes());
            put(52, &RANGES_MAX.to_le_bytes());
            put(56, &[1]);
        }
        space
    }

    fn activate(&mut self, active: Active) {
        self.disk.set_driver(Some(Arc::clone(&active.interrupt)));
        self.active = Some(active);
    }

    fn deactivate(&mut self) {
        self.disk.set_driver(None);
        self.active = None;
    }

    fn active(&self) -> Option<&Active> {
        self.active.as_ref()
    }

    fn queue_ready(&mut self, index: usize) -> Result<Turn, RingError> {
        let Some(mut active) = self.active.take() else {
            return Ok(Turn::Idle);
        };
        let turn = self.drain(&mut active, index);
        self.active = Some(active);
        turn
    }
}

impl<D: Disk> Blk<D> {
    fn drain(&self, active: &mut Active, index: usize) -> Result<Turn, RingError> {
        let memory = &*active.memory;
        let ring = active.rings.get_mut(index);
        let ring = ring.ok_or(RingError::NoQueue(index))?;
        ring.serve(memory, BUDGET, |chain, done, budget| {
            match Chain::resolve(chain, memory, CHAIN_MAX, budget) {
                Ok(chain) => self.serve(chain, done, budget),
                Err(_) => Served::Whole(self.counters.fail()),
            }
        })
    }
}
