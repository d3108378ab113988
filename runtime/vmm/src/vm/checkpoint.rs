// SPDX-License-Identifier: Apache-2.0
//! Writes a checkpoint: the files of a VM that stands still, from which another can go on. On the main thread; who calls this
//! has parked the vCPUs and frozen the devices, and lets them go on afterwards.
//!
//! Nothing is synced: who has made the files does that when the VM goes on.

use std::fs::File;
use std::io;
use std::time::Instant;

use kvm_ioctls::VmFd;
use rustix::fs::OFlags;

use super::saver::{SaveError, Saver};
use crate::bus::DeviceStates;
use crate::config::KernelSum;
use crate::control::CheckpointFiles;
use crate::devices::blk::disk::ScratchDisk;
use crate::memory::{self, Laid, Memory};
use crate::sparse::{Copier, CopyError};

/// Why there is no checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("look at the file for the {what}")]
    Look {
        what: &'static str,
        source: io::Error,
    },
    #[error("the file for the {what} is {wrong}")]
    File {
        what: &'static str,
        wrong: &'static str,
    },
    #[error(transparent)]
    State(#[from] SaveError),
    #[error("make the file for the {what} {bytes} bytes long")]
    Length {
        what: &'static str,
        bytes: u64,
        source: io::Error,
    },
    #[error("write the memory")]
    Memory(#[source] CopyError),
    #[error("write the scratch disk")]
    Scratch(#[source] CopyError),
}

const STATE: &str = "state";
const MEMORY: &str = "memory";
const SCRATCH: &str = "scratch disk";

/// What is written.
#[allow(missing_debug_implementations)]
pub struct Source<'a> {
    pub saver: &'a Saver,
    pub vm: &'a VmFd,
    pub kernel_sum: KernelSum,
    pub devices: DeviceStates,
    pub memory: &'a Memory,
    pub scratch: &'a ScratchDisk,
}

/// How many bytes were written, without holes and pages of zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    pub memory_bytes: u64,
    pub scratch_bytes: u64,
}

/// Checks that the files can be written, before the VM stands still for them.
pub fn check(files: &CheckpointFiles) -> Result<(), CheckpointError> {
    let CheckpointFiles {
        state,
        memory,
        scratch,
    } = files;
    for (what, file) in [(STATE, state), (MEMORY, memory), (SCRATCH, scratch)] {
        let metadata = file.metadata();
        let metadata = metadata.map_err(|source| CheckpointError::Look { what, source })?;
        let flags = rustix::fs::fcntl_getfl(file).map_err(|e| CheckpointError::Look {
            what,
            source: e.into(),
        })?;
        let wrong = if !metadata.is_file() {
            "no regular file"
        } else if metadata.len() > 0 {
            "not empty"
        } else if flags & OFlags::RWMODE == OFlags::RDONLY {
            "not open for writing"
        } else if flags.contains(OFlags::APPEND) {
            "open for appending"
        } else {
            continue;
        };
        return Err(CheckpointError::File { what, wrong });
    }
    Ok(())
}

/// Writes all of it, but fails if that is not done by `until`.
pub fn write(
    source: Source<'_>,
    files: &CheckpointFiles,
    until: Instant,
) -> Result<Written, CheckpointError> {
    let Source {
        saver,
        vm,
        kernel_sum,
        devices,
        memory,
        scratch,
    } = source;
    saver.save(vm, kernel_sum, devices, &files.state)?;
    let bytes = saver.memory_bytes;
    copy((memory, &saver.laid), bytes, scratch, files, until)
}

/// Copies memory and scratch disk.
fn copy(
    (memory, laid): (&Memory, &Laid),
    memory_bytes: u64,
    scratch: &ScratchDisk,
    files: &CheckpointFiles,
    until: Instant,
) -> Result<Written, CheckpointError> {
    set_length(MEMORY, &files.memory, memory_bytes)?;
    let mut copier = Copier::new(&files.memory, Some(until));
    memory::save(memory, laid, &mut copier).map_err(CheckpointError::Memory)?;
    let memory_bytes = copier.written();
    set_length(SCRATCH, &files.scratch, scratch.bytes())?;
    let mut copier = Copier::new(&files.scratch, Some(until));
    let copied = scratch.save(&mut copier);
    copied.map_err(CheckpointError::Scratch)?;
    Ok(Written {
        memory_bytes,
        scratch_bytes: copier.written(),
    })
}

fn set_length(what: &'static str, file: &File, bytes: u64) -> Result<(), CheckpointError> {
    file.set_len(bytes)
        .map_err(|source| CheckpointError::Length {
            what,
            bytes,
            source,
        })
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::io::Write;
    use std::sync::mpsc;
    use std::time::Duration;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::syscalls;

    #[test]
    fn files_that_a_checkpoint_cannot_be_written_to_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let empty = || tempfile::tempfile().unwrap();
        let files = |file: File| {
            let (state, scratch) = (empty(), empty());
            check(&CheckpointFiles {
                state,
                memory: file,
                scratch,
            })
        };
        files(empty()).unwrap();
        File::create(&path).unwrap();
        files(OpenOptions::new().write(true).open(&path).unwrap()).unwrap();
        let mut full = empty();
        full.write_all(b"x").unwrap();
        let device = OpenOptions::new().write(true).open("/dev/null").unwrap();
        for (file, expected) in [
            (full, "not empty"),
            (device, "no regular file"),
            (File::open(&path).unwrap(), "not open for writing"),
            (
                OpenOptions::new().append(true).open(&path).unwrap(),
                "open for appending",
            ),
        ] {
            let said = files(file).unwrap_err().to_string();
            assert_eq!(said, format!("the file for the memory is {expected}"));
        }
    }

    #[test]
    fn a_scratch_disk_is_copied_without_holes_and_zeroes() {
        use std::os::unix::fs::FileExt;
        let disk = empty_disk(64 << 20);
        disk.write_all_at(b"ext4", 1024).unwrap();
        disk.write_all_at(&[0; 1 << 20], 1 << 20).unwrap();
        disk.write_all_at(b"end", (64 << 20) - 512).unwrap();
        let disk = ScratchDisk::new(Some(disk), 64 << 20);
        let to = empty_disk(64 << 20);
        let mut copier = Copier::new(&to, None);
        disk.save(&mut copier).unwrap();
        assert_eq!(copier.written(), 8192);
        let mut bytes = [0; 4];
        to.read_exact_at(&mut bytes, 1024).unwrap();
        assert_eq!(&bytes, b"ext4");
        to.read_exact_at(&mut bytes, (64 << 20) - 512).unwrap();
        assert_eq!(&bytes, b"end\0");
        // Without a disk there is nothing to copy.
        let mut copier = Copier::new(&to, None);
        ScratchDisk::new(None, 0).save(&mut copier).unwrap();
        assert_eq!(copier.written(), 0);
    }

    /// A call that the list lacks ends this process.
    #[test]
    fn the_main_thread_may_make_the_calls_for_files_of_checkpoints() {
        let memory = memory::create(32 << 20).unwrap();
        memory.write_obj(7u8, GuestAddress(1 << 20)).unwrap();
        let disk = ScratchDisk::new(Some(empty_disk(1 << 20)), 1 << 20);
        let files = CheckpointFiles {
            state: empty_disk(0),
            memory: empty_disk(0),
            scratch: empty_disk(0),
        };
        let (sender, written) = mpsc::channel();
        std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            bulkhead_jail::syscalls::apply(&syscalls::MAIN, None).unwrap();
            let copied = check(&files).and_then(|()| {
                std::thread::sleep(Duration::from_millis(1));
                let until = Instant::now() + Duration::from_secs(60);
                let copied = copy((&memory, &Laid::new()), 32 << 20, &disk, &files, until)?;
                (&files.state).write_all(b"state").unwrap();
                Ok(copied)
            });
            sender.send(copied.map_err(|e| e.to_string())).unwrap();
            // The end of a thread takes calls that the list does not have.
            loop {
                std::thread::park();
            }
        });
        let expected = Written {
            memory_bytes: 4096,
            scratch_bytes: 0,
        };
        let written = written.recv_timeout(Duration::from_secs(60)).unwrap();
        assert_eq!(written, Ok(expected));
    }

    fn empty_disk(bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        file
    }
}
