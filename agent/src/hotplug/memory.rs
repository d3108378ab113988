// SPDX-License-Identifier: Apache-2.0
//! Hot-adds blocks of memory, one by one, through the kernel's probe file (Linux, admin-guide/mm/memory-hotplug).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_proto::agent::SizeSandboxRequest;

use super::HotplugError;

const DIRECTORY: &str = "/sys/devices/system/memory";
/// More blocks than any VM has: 1 TiB in blocks of the smallest size.
const MAX_BLOCKS: u64 = 8192;

/// The memory that the guest has, and the memory that it can get.
#[derive(Debug)]
pub struct Memory {
    directory: PathBuf,
    block_bytes: u64,
    present: u64,
    /// Addresses of blocks that can be added. The next one is the last element.
    blocks: Vec<u64>,
}

impl Memory {
    pub fn new(request: &SizeSandboxRequest) -> Result<Self, HotplugError> {
        Self::of(Path::new(DIRECTORY), request)
    }

    fn of(directory: &Path, request: &SizeSandboxRequest) -> Result<Self, HotplugError> {
        let text = fs::read_to_string(directory.join("block_size_bytes"));
        let text = text.map_err(HotplugError::Unable)?;
        let block_bytes = u64::from_str_radix(text.trim(), 16).ok();
        let block_bytes = block_bytes.filter(|bytes| bytes.is_power_of_two());
        let block_bytes =
            block_bytes.ok_or_else(|| HotplugError::Unable(io::ErrorKind::InvalidData.into()))?;
        let ranges: Vec<(u64, u64)> = request.memory.iter().map(|r| (r.start, r.bytes)).collect();
        let mut blocks =
            blocks(&ranges, request.boot_bytes, block_bytes).ok_or(HotplugError::Ranges)?;
        blocks.reverse();
        Ok(Self {
            directory: directory.to_owned(),
            block_bytes,
            present: request.boot_bytes,
            blocks,
        })
    }

    pub fn present(&self) -> u64 {
        self.present
    }

    /// The most memory that the guest can have.
    pub fn most(&self) -> u64 {
        let more = self.blocks.len() as u64;
        self.present
            .saturating_add(more.saturating_mul(self.block_bytes))
    }

    pub fn is_full(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Adds blocks until there are `bytes`. After an error, the blocks added before it stay.
    pub fn grow_to(&mut self, bytes: u64) -> Result<(), HotplugError> {
        if bytes > self.most() {
            return Err(HotplugError::Full {
                wanted: bytes,
                most: self.most(),
            });
        }
        while self.present < bytes {
            self.add_block()?;
        }
        Ok(())
    }

    /// Adds a quarter of the present memory, at least one block, but not more than there is.
    pub fn grow(&mut self) -> Result<(), HotplugError> {
        let step = (self.present / 4).max(self.block_bytes);
        self.grow_to(self.present.saturating_add(step).min(self.most()))
    }

    fn add_block(&mut self) -> Result<(), HotplugError> {
        let Some(&address) = self.blocks.last() else {
            return Ok(());
        };
        let probe = self.directory.join("probe");
        let added = fs::File::options()
            .write(true)
            .open(&probe)
            .map_err(HotplugError::Unable)
            .map(|mut file| io::Write::write_all(&mut file, format!("{address:#x}").as_bytes()))?;
        match added {
            // An earlier attempt added the block but did not bring it online.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(HotplugError::Add { address, source }),
            Ok(()) => {}
        }
        self.bring_online(address)?;
        self.blocks.pop();
        self.present = self.present.saturating_add(self.block_bytes);
        Ok(())
    }

    /// Brings a block online. A kernel that is configured as ours does it itself.
    fn bring_online(&self, address: u64) -> Result<(), HotplugError> {
        let number = address / self.block_bytes;
        let path = self.directory.join(format!("memory{number}/state"));
        let state = fs::read_to_string(&path).unwrap_or_default();
        if state.trim() == "online" {
            return Ok(());
        }
        fs::write(&path, "online_kernel").map_err(|source| HotplugError::Online { path, source })
    }
}

/// The addresses of whole blocks in `ranges` after the first `boot` bytes, in order. `None` if the numbers cannot be
/// right.
fn blocks(ranges: &[(u64, u64)], boot: u64, block: u64) -> Option<Vec<u64>> {
    let mut blocks = Vec::new();
    let mut left_of_boot = boot;
    for &(start, bytes) in ranges {
        let end = start.checked_add(bytes)?;
        let at_boot = left_of_boot.min(bytes);
        left_of_boot -= at_boot;
        let mut address = start
            .checked_add(at_boot)?
            .checked_next_multiple_of(block)?;
        while address.checked_add(block)? <= end {
            if blocks.len() as u64 >= MAX_BLOCKS {
                return None;
            }
            blocks.push(address);
            address += block;
        }
    }
    (left_of_boot == 0).then_some(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_proto::agent::MemoryRange;

    const MIB: u64 = 1 << 20;
    const BLOCK: u64 = 128 * MIB;

    #[test]
    fn blocks_lie_beyond_the_boots_memory_and_around_the_gap() {
        let all = [(0, 3072 * MIB), (4096 * MIB, 300 * MIB)];
        for (boot, expected) in [
            (2816 * MIB, vec![2816, 2944, 4096, 4224]),
            (2817 * MIB, vec![2944, 4096, 4224]),
            (3072 * MIB, vec![4096, 4224]),
            (3073 * MIB, vec![4224]),
            (3372 * MIB, vec![]),
        ] {
            let expected: Vec<u64> = expected.into_iter().map(|at: u64| at * MIB).collect();
            assert_eq!(blocks(&all, boot, BLOCK), Some(expected), "{}", boot / MIB);
        }
        assert_eq!(blocks(&all, 4000 * MIB, BLOCK), None, "more than there is");
        assert_eq!(blocks(&[(u64::MAX - 5, 10)], 0, BLOCK), None);
        assert_eq!(blocks(&[(0, u64::MAX / 2)], 0, BLOCK), None, "too many");
    }

    /// A guest of 256 MiB that can have 1 GiB. A directory plays the kernel.
    fn memory(directory: &Path) -> Memory {
        fs::write(directory.join("block_size_bytes"), "8000000\n").unwrap();
        fs::write(directory.join("probe"), "").unwrap();
        for number in 2..8 {
            let block = directory.join(format!("memory{number}"));
            fs::create_dir(&block).unwrap();
            fs::write(block.join("state"), "offline\n").unwrap();
        }
        let request = SizeSandboxRequest {
            memory: vec![MemoryRange {
                start: 0,
                bytes: 1024 * MIB,
            }],
            boot_bytes: 256 * MIB,
            ..Default::default()
        };
        Memory::of(directory, &request).unwrap()
    }

    #[test]
    fn memory_grows_by_blocks_up_to_all_there_is() {
        let directory = tempfile::tempdir().unwrap();
        let mut memory = memory(directory.path());
        assert_eq!((memory.present(), memory.most()), (256 * MIB, 1024 * MIB));
        memory.grow_to(100 * MIB).unwrap();
        assert_eq!(memory.present(), 256 * MIB);
        memory.grow_to(257 * MIB).unwrap();
        assert_eq!(memory.present(), 384 * MIB);
        let probed = fs::read_to_string(directory.path().join("probe")).unwrap();
        assert_eq!(probed, "0x10000000");
        let state = fs::read_to_string(directory.path().join("memory2/state")).unwrap();
        assert_eq!(state, "online_kernel");
        let error = memory.grow_to(1025 * MIB).unwrap_err();
        assert!(matches!(error, HotplugError::Full { most, .. } if most == 1024 * MIB));
        while !memory.is_full() {
            memory.grow().unwrap();
        }
        memory.grow().unwrap();
        assert_eq!((memory.present(), memory.most()), (1024 * MIB, 1024 * MIB));
    }

    #[test]
    fn a_block_that_does_not_come_online_is_not_counted() {
        let directory = tempfile::tempdir().unwrap();
        let mut memory = memory(directory.path());
        fs::remove_dir_all(directory.path().join("memory3")).unwrap();
        let error = memory.grow_to(1024 * MIB).unwrap_err();
        assert!(error.to_string().contains("memory3"), "{error}");
        assert_eq!(memory.present(), 384 * MIB);
    }
}
