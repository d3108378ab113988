// SPDX-License-Identifier: Apache-2.0
//! Block requests through a mock driver: valid ones, and what a hostile driver may try.
#![allow(clippy::arithmetic_side_effects)]

use std::fs::File;
use std::io::Write;

use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::disk::{ImageDisk, ScratchDisk, Volume, VolumeDisk};
use super::*;
use crate::devices::driver::{self, INDIRECT, NEXT, Piece, WRITE};

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STATUS: u64 = 0x30_0000;

/// A driver of a block device.
struct Driver(driver::Driver);

impl Driver {
    fn new() -> Self {
        Self(driver::Driver::new())
    }

    fn activate<D: Disk>(&self, blk: &mut Blk<D>) {
        self.0.activate(blk, 0);
    }

    fn header(&self, kind: u32, sector: u64) {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.0.write(HEADER, &bytes);
        self.0.write(STATUS, &[0xff]);
    }

    /// Lets the device serve one chain. Returns the length in the used ring.
    fn offer<D: Disk>(&self, blk: &mut Blk<D>, chain: &[Piece]) -> u32 {
        self.0.offer(0, 0, chain);
        assert_eq!(blk.queue_ready(0).unwrap(), Turn::Idle);
        let used = self.0.used(0);
        assert_eq!(used.len(), 1, "the chain came back");
        used[0].1
    }

    /// A well-formed request with a data buffer.
    fn request<D: Disk>(
        &self,
        blk: &mut Blk<D>,
        kind: u32,
        sector: u64,
        len: u32,
        write: bool,
    ) -> u8 {
        self.header(kind, sector);
        let flags = if write { NEXT | WRITE } else { NEXT };
        let chain = [
            (HEADER, 16, NEXT, 1),
            (DATA, len, flags, 2),
            (STATUS, 1, WRITE, 0),
        ];
        self.offer(blk, &chain);
        self.status()
    }

    fn status(&self) -> u8 {
        self.0.read(STATUS, 1)[0]
    }

    fn data(&self, len: usize) -> Vec<u8> {
        self.0.read(DATA, len)
    }
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn scratch() -> Blk<ScratchDisk> {
    let disk = ScratchDisk::new(Some(file(&[7; 8192])), 8192);
    Blk::new(disk, "scratch", Arc::default())
}

#[test]
fn scratch_reads_writes_and_frees() {
    let (driver, mut blk) = (Driver::new(), scratch());
    driver.activate(&mut blk);
    driver.0.write(DATA, &[9; 1024]);
    assert_eq!(driver.request(&mut blk, T_OUT, 1, 1024, false), S_OK);
    assert_eq!(driver.request(&mut blk, T_FLUSH, 0, 0, false), S_OK);
    assert_eq!(driver.request(&mut blk, T_IN, 0, 2048, true), S_OK);
    let data = driver.data(2048);
    assert_eq!((data[511], data[512], data[1535], data[1536]), (7, 9, 9, 7));
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        let mut range = [0; 16];
        range[0] = 8;
        range[8] = 8;
        driver.0.write(DATA, &range);
        assert_eq!(driver.request(&mut blk, kind, 0, 16, false), S_OK);
        assert_eq!(driver.request(&mut blk, T_IN, 8, 4096, true), S_OK);
        assert_eq!(driver.data(4096), [0; 4096]);
        range[12] = 2;
        driver.0.write(DATA, &range);
        assert_eq!(driver.request(&mut blk, kind, 0, 16, false), S_UNSUPP);
        range[12] = 0;
        range[10] = 1;
        driver.0.write(DATA, &range);
        assert_eq!(driver.request(&mut blk, kind, 0, 16, false), S_IOERR);
    }
    assert_eq!(driver.request(&mut blk, T_GET_ID, 0, 20, true), S_OK);
    assert_eq!(&driver.data(8), b"scratch\0");
    assert_eq!(driver.0.interrupt_status(), 1);
}

#[test]
fn image_reads_across_extents_and_grows() {
    let (driver, disk) = (Driver::new(), ImageDisk::default());
    let mut blk = Blk::new(disk.clone(), "image", Arc::default());
    driver.activate(&mut blk);
    assert_eq!(driver.request(&mut blk, T_IN, 0, 512, true), S_IOERR);
    disk.append(file(&[1; 4096]), 4096).unwrap();
    disk.append(file(&[2; 100]), 100).unwrap();
    assert_eq!(driver.0.interrupt_status() & 2, 2);
    let shown = |offset| driver.0.registers.word_at(offset);
    assert_eq!(shown(0xfc), 2, "the generation");
    assert_eq!(shown(0x100), 16, "the capacity");
    assert_eq!(driver.request(&mut blk, T_IN, 7, 1024, true), S_OK);
    let data = driver.data(1024);
    assert_eq!((data[511], data[512], data[611], data[612]), (1, 2, 2, 0));
    assert_eq!(driver.request(&mut blk, T_OUT, 0, 512, false), S_IOERR);
    assert_eq!(driver.request(&mut blk, T_FLUSH, 0, 0, false), S_UNSUPP);
    assert_eq!(driver.request(&mut blk, T_DISCARD, 0, 16, false), S_UNSUPP);
}

#[test]
fn volumes_are_written_each_alone_and_a_gap_is_an_error() {
    let (driver, disk) = (Driver::new(), VolumeDisk::default());
    let mut blk = Blk::new(disk.clone(), "volumes", Arc::default());
    driver.activate(&mut blk);
    let readonly = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(readonly.path(), [3; 4096]).unwrap();
    let first = file(&[1; 4096]);
    disk.append(Volume::Device(first.try_clone().unwrap()), 4096)
        .unwrap();
    let second = File::open(readonly.path()).unwrap();
    disk.append(Volume::Device(second), 4096).unwrap();
    let odd = Volume::File(file(&[2; 4608]));
    let odd = disk.append(odd, 4608).unwrap();
    assert_eq!((odd.first_sector, odd.sectors), (16, 9));
    assert_ne!(blk.features() & F_FLUSH, 0, "the file has a cache");

    driver.0.write(DATA, &[9; 512]);
    assert_eq!(driver.request(&mut blk, T_OUT, 7, 512, false), S_OK);
    let mut end = [0; 513];
    std::os::unix::fs::FileExt::read_exact_at(&first, &mut end, 3583).unwrap();
    assert_eq!((end[0], end[1]), (1, 9));
    assert_eq!(driver.request(&mut blk, T_OUT, 8, 512, false), S_IOERR);
    let mut range = [0; 16];
    (range[0], range[8]) = (8, 8);
    driver.0.write(DATA, &range);
    assert_eq!(driver.request(&mut blk, T_DISCARD, 0, 16, false), S_IOERR);
    assert_eq!(std::fs::read(readonly.path()).unwrap(), [3; 4096]);
    assert_eq!(driver.request(&mut blk, T_IN, 8, 1024, true), S_OK);
    assert_eq!(driver.request(&mut blk, T_FLUSH, 0, 0, false), S_OK);

    drop(disk.remove(8).unwrap());
    assert!(disk.remove(8).is_none());
    for (kind, sector, write) in [(T_IN, 8, true), (T_OUT, 15, false), (T_IN, 7, true)] {
        let status = driver.request(&mut blk, kind, sector, 1024, write);
        assert_eq!(status, S_IOERR, "{kind} {sector}");
    }
    assert_eq!(driver.request(&mut blk, T_IN, 7, 512, true), S_OK);
    assert_eq!(driver.request(&mut blk, T_IN, 16, 4096, true), S_OK);
    // After the file's end the last page has no data, and neither has a device that shrank.
    assert_eq!(driver.request(&mut blk, T_IN, 25, 512, true), S_IOERR);
    first.set_len(512).unwrap();
    assert_eq!(driver.request(&mut blk, T_IN, 1, 512, true), S_IOERR);
    assert_eq!(driver.request(&mut blk, T_IN, 0, 512, true), S_OK);
    disk.remove(16).unwrap();
    assert_eq!(driver.request(&mut blk, T_IN, 16, 512, true), S_IOERR);
}

#[test]
fn a_file_gives_back_to_the_host_what_is_freed_and_a_flush_that_fails_says_so() {
    use std::os::unix::fs::MetadataExt;
    let (driver, disk) = (Driver::new(), VolumeDisk::default());
    let mut blk = Blk::new(disk.clone(), "volumes", Arc::default());
    driver.activate(&mut blk);
    let sparse = file(&[1; 64 << 10]);
    disk.append(Volume::File(sparse.try_clone().unwrap()), 64 << 10)
        .unwrap();
    let other = file(&[1; 4096]);
    assert_eq!(disk.find(&other).unwrap(), None);
    let found = disk.find(&sparse).unwrap().unwrap();
    assert_eq!((found.first_sector, found.sectors), (0, 128));
    let before = sparse.metadata().unwrap();
    let mut range = [0; 16];
    range[8] = 64;
    driver.0.write(DATA, &range);
    assert_eq!(driver.request(&mut blk, T_DISCARD, 0, 16, false), S_OK);
    let after = sparse.metadata().unwrap();
    assert_eq!(after.len(), before.len());
    assert_eq!(before.blocks() - after.blocks(), 64);
    assert_eq!(driver.request(&mut blk, T_IN, 0, 512, true), S_OK);
    assert_eq!(driver.data(512), [0; 512]);
    // A pipe cannot be synced. The file is synced all the same.
    let (pipe, _other) = std::io::pipe().unwrap();
    let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
    disk.append(Volume::File(pipe), 4096).unwrap();
    assert_eq!(driver.request(&mut blk, T_FLUSH, 0, 0, false), S_IOERR);
}

#[test]
fn bad_requests_fail_alone() {
    let (driver, mut blk) = (Driver::new(), scratch());
    driver.activate(&mut blk);
    let cases = [
        (T_IN, 16, 512, true, S_IOERR),       // beyond the end
        (T_IN, 15, 1024, true, S_IOERR),      // across the end
        (T_IN, u64::MAX, 512, true, S_IOERR), // overflow of bytes
        (T_IN, u64::MAX / 512, 512, true, S_IOERR),
        (T_IN, 0, 100, true, S_IOERR), // not a whole sector
        (T_OUT, 16, 512, false, S_IOERR),
        (99, 0, 512, true, S_UNSUPP),
    ];
    for (kind, sector, len, write, expected) in cases {
        let status = driver.request(&mut blk, kind, sector, len, write);
        assert_eq!(status, expected, "{kind} {sector} {len}");
    }
    // The buffer of this read is device-readable only: nothing is read, nothing breaks.
    driver.0.write(DATA, &[5; 512]);
    assert_eq!(driver.request(&mut blk, T_IN, 0, 512, false), S_OK);
    assert_eq!(driver.data(512), [5; 512]);
    assert_eq!(driver.request(&mut blk, T_IN, 0, 512, true), S_OK);
}

#[test]
fn bad_chains_come_back_unused() {
    let (driver, mut blk) = (Driver::new(), scratch());
    driver.activate(&mut blk);
    driver.header(T_IN, 0);
    type ChainCase = (&'static str, Vec<Piece>);
    let cases: [ChainCase; 8] = [
        ("no status", vec![(HEADER, 16, 0, 0)]),
        (
            "a loop",
            vec![(HEADER, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 1)],
        ),
        ("a loop to the head", vec![(HEADER, 16, NEXT, 0)]),
        ("next beyond the table", vec![(HEADER, 16, NEXT, 99)]),
        (
            "outside of memory",
            vec![(1 << 40, 16, NEXT, 1), (STATUS, 1, WRITE, 0)],
        ),
        (
            "end outside of memory",
            vec![(HEADER, u32::MAX, NEXT, 1), (STATUS, 1, WRITE, 0)],
        ),
        (
            "readable after writable",
            vec![(STATUS, 1, NEXT | WRITE, 1), (HEADER, 16, 0, 0)],
        ),
        ("indirect of indirect", vec![(DATA, 16, INDIRECT, 0)]),
    ];
    let nested = Descriptor::new(DATA, 16, INDIRECT, 0);
    driver
        .0
        .memory
        .write_obj(nested, GuestAddress(DATA))
        .unwrap();
    for (name, chain) in cases {
        assert_eq!(driver.offer(&mut blk, &chain), 0, "{name}");
        assert_eq!(driver.status(), 0xff, "{name}");
    }
    let short = [(HEADER, 8, NEXT, 1), (STATUS, 1, WRITE, 0)];
    assert_eq!(driver.offer(&mut blk, &short), 1);
    assert_eq!(driver.status(), S_IOERR);
}

#[test]
fn a_header_may_be_cut_anywhere() {
    let (driver, mut blk) = (Driver::new(), scratch());
    driver.activate(&mut blk);
    driver.header(T_IN, 1);
    let chain = [
        (HEADER, 5, NEXT, 1),
        (HEADER + 5, 11, NEXT, 2),
        (DATA, 100, NEXT | WRITE, 3),
        (DATA + 100, 413, WRITE, 0),
    ];
    assert_eq!(driver.offer(&mut blk, &chain), 513);
    let bytes = driver.data(513);
    assert_eq!((bytes[511], bytes[512]), (7, S_OK));
}

#[test]
fn a_broken_ring_is_reported() {
    let (driver, mut blk) = (Driver::new(), scratch());
    driver.activate(&mut blk);
    driver.0.claim(0, 1000);
    assert!(blk.queue_ready(0).is_err());
}

#[test]
fn a_request_of_gigabytes_takes_many_turns_and_reads_everything() {
    const PIECE: u32 = 8 << 20;
    let (driver, disk) = (Driver::new(), ImageDisk::default());
    let mut blk = Blk::new(disk.clone(), "image", Arc::default());
    driver.activate(&mut blk);
    let sparse = file(&[5; 4096]);
    sparse.set_len(1 << 40).unwrap();
    let end = u64::from(PIECE) * 12;
    std::os::unix::fs::FileExt::write_all_at(&sparse, &[6; 512], end - 512).unwrap();
    disk.append(sparse, 1 << 40).unwrap();
    driver.header(T_IN, 0);
    let data = |next| (DATA, PIECE, NEXT | WRITE, next);
    let header = (HEADER, 16, NEXT, 1);
    let chain: Vec<Piece> = [header]
        .into_iter()
        .chain((2..14).map(data))
        .chain([(0x1f_0000, 1, WRITE, 0)])
        .collect();
    driver.0.offer(0, 0, &chain);
    for _ in 1..end / (4 << 20) {
        assert_eq!(blk.queue_ready(0).unwrap(), Turn::More);
        assert!(driver.0.used(0).is_empty());
    }
    assert_eq!(blk.queue_ready(0).unwrap(), Turn::More);
    let len = u32::try_from(end).unwrap() + 1;
    assert_eq!(driver.0.used(0), [(0, len)]);
    assert_eq!(driver.0.read(0x1f_0000, 1), [S_OK]);
    let last = driver.0.read(DATA + u64::from(PIECE) - 512, 512);
    assert_eq!(last, [6; 512]);
}

#[test]
fn what_is_written_over_many_turns_arrives_and_others_wait_behind_it() {
    const LEN: u32 = 9 << 20;
    let disk = ScratchDisk::new(Some(file(&[])), 16 << 20);
    let (driver, mut blk) = (Driver::new(), Blk::new(disk, "scratch", Arc::default()));
    driver.activate(&mut blk);
    driver.header(T_OUT, 0);
    for (at, byte) in [(0, 1), (4 << 20, 2), (8 << 20, 3)] {
        driver.0.write(0x40_0000 + at, &[byte; 512]);
    }
    let status = |at: u64| (STATUS + at, 1, WRITE, 0);
    let large = [(HEADER, 16, NEXT, 1), (0x40_0000, LEN, NEXT, 2), status(0)];
    driver.0.offer(0, 0, &large);
    let flush = HEADER + 64;
    driver
        .0
        .write(flush, &[4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    driver.0.offer(0, 3, &[(flush, 16, NEXT, 4), status(1)]);
    for _ in 0..2 {
        assert_eq!(blk.queue_ready(0).unwrap(), Turn::More);
        assert_eq!(driver.0.used(0), []);
    }
    assert_eq!(blk.queue_ready(0).unwrap(), Turn::Idle);
    assert_eq!(driver.0.used(0), [(0, 1), (3, 1)]);
    for (sector, byte) in [(0, 1), (8 << 10, 2), (16 << 10, 3)] {
        assert_eq!(driver.request(&mut blk, T_IN, sector, 512, true), S_OK);
        assert_eq!(driver.data(512), [byte; 512]);
    }
}

#[test]
fn a_discard_with_too_many_or_too_large_ranges_is_an_error_and_frees_nothing() {
    let (driver, mut blk) = (Driver::new(), scratch());
    driver.activate(&mut blk);
    let range = |sectors: u32| [[0; 8].as_slice(), &sectors.to_le_bytes(), &[0; 4]].concat();
    for (case, list) in [
        ("17 ranges", range(1).repeat(17)),
        ("half a range", range(1)[..8].to_vec()),
        ("none", Vec::new()),
        ("too large", range(RANGE_SECTORS_MAX + 1)),
    ] {
        driver.0.write(DATA, &list);
        let len = u32::try_from(list.len()).unwrap();
        for kind in [T_DISCARD, T_WRITE_ZEROES] {
            let status = driver.request(&mut blk, kind, 0, len, false);
            assert_eq!(status, S_IOERR, "{case}");
        }
        assert_eq!(driver.request(&mut blk, T_IN, 0, 512, true), S_OK);
        assert_eq!(driver.data(512), [7; 512], "{case}");
    }
    driver.0.write(DATA, &range(1).repeat(16));
    assert_eq!(driver.request(&mut blk, T_DISCARD, 0, 256, false), S_OK);
}

#[test]
fn a_disk_changes_while_its_device_is_locked_by_a_request_that_hangs() {
    let (driver, disk) = (Driver::new(), VolumeDisk::default());
    let mut blk = Blk::new(disk.clone(), "volumes", Arc::default());
    driver.activate(&mut blk);
    disk.append(Volume::File(file(&[1; 4096])), 4096).unwrap();
    // As the worker does for as long as a request takes.
    let device = std::sync::Mutex::new(blk);
    let hangs = device.lock().unwrap();
    let second = file(&[2; 4096]);
    let clone = second.try_clone().unwrap();
    disk.append(Volume::File(second), 4096).unwrap();
    let capacity = || driver.0.registers.word_at(0x100);
    assert_eq!((capacity(), driver.0.interrupt_status() & 2), (16, 2));
    assert_eq!(disk.find(&clone).unwrap().unwrap().first_sector, 8);
    drop(disk.remove(8).unwrap());
    assert_eq!(capacity(), 8);
    drop(hangs);
    device.into_inner().unwrap().deactivate();
    disk.append(Volume::File(clone), 4096).unwrap();
    assert_eq!(capacity(), 8, "there is no driver to tell");
}

/// Numbers at which arithmetic may go wrong, and others.
fn number() -> impl Strategy<Value = u64> {
    let near =
        |middle: u64| (0u64..4).prop_map(move |away| middle.wrapping_add(away).wrapping_sub(2));
    prop_oneof![
        any::<u64>(),
        0u64..5000,
        near(0),
        near(1 << 32),
        near(u64::MAX / SECTOR_BYTES),
        (0u64..64).prop_flat_map(move |bit| near(1 << bit)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]
    #[test]
    fn for_all_numbers_a_disk_range_is_inside_its_disk_or_refused(
        sector in number(),
        len in number(),
        sectors in number(),
    ) {
        let wide = |number: u64| u128::from(number);
        let start = wide(sector) * wide(SECTOR_BYTES);
        let end = start + wide(len);
        // No disk is larger than the numbers of its bytes.
        let size = (wide(sectors) * wide(SECTOR_BYTES)).min(wide(u64::MAX));
        let is_good = end <= size && len % SECTOR_BYTES == 0;
        match DiskRange::parse(sector, len, sectors) {
            Ok(range) => {
                prop_assert!(is_good);
                prop_assert_eq!((wide(range.start), range.len), (start, len));
            }
            Err(_) => prop_assert!(!is_good),
        }
    }
}

#[test]
fn the_driver_of_a_restored_image_disk_finds_it_as_it_was_when_its_layers_are_back() {
    use crate::devices::mmio::{MmioTransport, SharedDevice, lock};
    use crate::devices::registers::RegisterPage;
    use crate::devices::saved::Purpose;

    const RING: [u32; 3] = [0x1000, 0x2000, 0x3000];
    let memory = Arc::new(crate::memory::create(4 << 20).unwrap());
    let modules = || file(&[1; 4096]);
    let layer = || file(&[2; 8192]);
    let transport = || {
        let disk = ImageDisk::default();
        disk.append(modules(), 4096).unwrap();
        let blk = Blk::new(disk.clone(), "image", Arc::default());
        let device: SharedDevice = Arc::new(std::sync::Mutex::new(blk));
        let transport = MmioTransport::new(device, Arc::clone(&memory), RegisterPage::alone());
        (disk, transport.unwrap())
    };
    let register = |transport: &MmioTransport, offset| {
        let mut bytes = [0; 4];
        transport.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    let (disk, mut first) = transport();
    driver::bring_up(&mut first, RING);
    let extent = disk.append(layer(), 8192).unwrap();
    // A read of the layer has not been served at the cut.
    memory.write_obj(8u64, GuestAddress(HEADER + 8)).unwrap();
    let chain = [
        (HEADER, 16, NEXT, 1),
        (DATA, 4096, NEXT | WRITE, 2),
        (STATUS, 1, WRITE, 0),
    ];
    for (number, (address, len, flags, next)) in (0u64..).zip(chain) {
        let descriptor = Descriptor::new(address, len, flags, next);
        let at = GuestAddress(u64::from(RING[0]) + number * 16);
        memory.write_obj(descriptor, at).unwrap();
    }
    memory
        .write_obj(1u16, GuestAddress(u64::from(RING[1]) + 2))
        .unwrap();
    let device = first.device();
    let state = first.save(&*lock(&device), Purpose::Checkpoint).unwrap();

    let (disk, mut second) = transport();
    second.restore(&state).unwrap();
    assert_eq!(disk.append(layer(), 8192).unwrap(), extent);
    assert_eq!(register(&second, 0x100), 24);
    assert_eq!(register(&second, 0x100), register(&first, 0x100));
    assert_ne!(
        register(&second, 0xfc),
        register(&first, 0xfc),
        "a driver that reads the capacity right now reads it again"
    );
    lock(&second.device()).queue_ready(0).unwrap();
    let mut read = [0; 2];
    memory.read_slice(&mut read, GuestAddress(DATA)).unwrap();
    let status: u8 = memory.read_obj(GuestAddress(STATUS)).unwrap();
    assert_eq!((read, status), ([2, 2], S_OK));
}
