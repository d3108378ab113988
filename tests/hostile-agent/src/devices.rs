// SPDX-License-Identifier: Apache-2.0
//! What a root user of the guest does to its devices, through the guest's own kernel, without a pause.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use bulkhead_proto::agent::READY_PORT;
use rustix::mount::MountFlags;
use tokio::runtime;
use tokio_vsock::{VsockAddr, VsockStream};

use crate::HOST_CID;
use crate::sys::{self, Erase};

const SCRATCH: &str = "/dev/vdb";
const SCRATCH_BYTES: u64 = 256 << 20;
const SHARED: &str = "/shared";
const THREADS: u64 = 4;
/// More connections than that are ended at once.
const MOST_SOCKETS: usize = 1000;

/// How often all attacks were ended. A thread ends when this changes.
static CALM: AtomicU64 = AtomicU64::new(0);

#[derive(Clone, Copy, Debug)]
pub enum Device {
    /// Raw frames, with headers for offloads that make no sense.
    Frames,
    /// Discards and zeroes on the scratch disk.
    Disk,
    Random,
    /// Connections to ports of the host, most of which do not exist.
    Sockets,
    /// Names and attributes in a shared directory.
    Files,
}

impl Device {
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "frames" => Self::Frames,
            "disk" => Self::Disk,
            "random" => Self::Random,
            "sockets" => Self::Sockets,
            "files" => Self::Files,
            _ => return None,
        })
    }
}

/// Begins to attack a device, in threads of its own.
pub fn attack(device: Device) {
    let began = CALM.load(Ordering::SeqCst);
    for number in 0..THREADS {
        thread::spawn(move || {
            let mut step = match device {
                Device::Frames => frames(number),
                Device::Disk => disk(number),
                Device::Random => random(),
                Device::Sockets => sockets(number),
                Device::Files => files(number),
            };
            if let Err(error) = &step {
                eprintln!("hostile agent: {device:?}: {error}");
            }
            while let Ok(step) = &mut step
                && CALM.load(Ordering::SeqCst) == began
            {
                step();
            }
        });
    }
}

pub fn calm() {
    CALM.fetch_add(1, Ordering::SeqCst);
}

/// One step of an attack.
type Step = Box<dyn FnMut() + Send>;

/// Numbers that repeat only after very long.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn frames(seed: u64) -> io::Result<Step> {
    let socket = sys::frames(c"eth0")?;
    let mut dice = Dice(seed + 1);
    Ok(Box::new(move || {
        let dice_now = dice.roll();
        let [flags, kind, size, start, offset, sum, length, ..] = dice_now.to_le_bytes();
        let mut frame = vec![0; 10 + 14 + usize::from(length) * 16 + 40];
        frame[0] = flags & 1;
        // No offload, TCP or UDP over IPv4, or something that is neither.
        frame[1] = [0, 1, 3, 4, 5, 0x81, kind][usize::from(kind % 7)];
        frame[2] = start;
        frame[4] = size % 4;
        frame[5] = if size & 0x80 == 0 { 0 } else { kind };
        frame[6] = offset % 64;
        frame[8] = sum % 32;
        frame[22] = 8;
        frame[24] = 0x45;
        frame[33] = 6;
        let _ = rustix::net::send(&socket, &frame, rustix::net::SendFlags::DONTWAIT);
    }))
}

fn disk(seed: u64) -> io::Result<Step> {
    let mut options = OpenOptions::new();
    let mut disk = options
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed())
        .open(SCRATCH)?;
    let mut dice = Dice(seed + 1);
    // One block for O_DIRECT, which wants an address that is a multiple of 512.
    let block = Box::leak(vec![0u8; 8192].into_boxed_slice());
    let aligned = block.as_ptr().align_offset(4096);
    Ok(Box::new(move || {
        let number = dice.roll();
        let start = number % SCRATCH_BYTES / 4096 * 4096;
        let _ = match number >> 60 {
            0..4 => sys::erase(
                &disk,
                Erase::Discard,
                start,
                (number >> 32) % 64 * 4096 + 4096,
            ),
            4..6 => sys::erase(&disk, Erase::Zero, start, 4096),
            _ => disk
                .seek(SeekFrom::Start(start))
                .and_then(|_| disk.write_all(&block[aligned..aligned + 4096])),
        };
    }))
}

fn random() -> io::Result<Step> {
    let mut source = File::open("/dev/hwrng")?;
    let mut bytes = vec![0; 64 << 10];
    Ok(Box::new(move || {
        let _ = source.read(&mut bytes);
    }))
}

fn sockets(seed: u64) -> io::Result<Step> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut open, mut dice) = (Vec::new(), Dice(seed + 1));
    Ok(Box::new(move || {
        let number = dice.roll();
        let port = if number.is_multiple_of(2) {
            READY_PORT
        } else {
            u32::try_from(number >> 33).unwrap_or(0)
        };
        let connected = VsockStream::connect(VsockAddr::new(HOST_CID, port));
        open.extend(runtime.block_on(connected));
        if open.len() > MOST_SOCKETS {
            open.clear();
        }
    }))
}

fn files(seed: u64) -> io::Result<Step> {
    static MOUNTED: std::sync::Once = std::sync::Once::new();
    MOUNTED.call_once(|| {
        let made = fs::create_dir_all(SHARED);
        let mounted = rustix::mount::mount("bulkhead", SHARED, "virtiofs", MountFlags::NODEV, None);
        if made.is_err() || mounted.is_err() {
            eprintln!("hostile agent: mount shared files: {made:?} {mounted:?}");
        }
    });
    let shares = fs::read_dir(SHARED)?.flatten().next();
    let share = shares.ok_or(io::ErrorKind::NotFound)?.path();
    let mut dice = Dice(seed + 1);
    Ok(Box::new(move || {
        let name = share.join(format!("{:016x}", dice.roll()));
        let longer = share.join("x".repeat(255));
        let _ = fs::write(&name, "x");
        let _ = fs::rename(&name, share.join(format!("{seed}")));
        let _ = fs::symlink_metadata(longer);
        let _ = fs::read_dir(&share).map(|entries| entries.take(100).count());
        let _ = fs::remove_file(share.join(format!("{seed}")));
        if dice.roll().is_multiple_of(1000) {
            thread::sleep(Duration::from_millis(1));
        }
    }))
}
