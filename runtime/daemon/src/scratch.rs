// SPDX-License-Identifier: Apache-2.0
//! Makes the disks that a pod writes to. Each is an empty ext4 file system in a sparse file.
//!
//! mke2fs makes a file system once for each size, which is kept as a template. A pod gets a reflink of the template or,
//! if the host's file system has no reflinks, a copy of its data without its holes. A scratch disk has no journal,
//! because it is deleted with its VM. The disk of an emptyDir has one, because it outlives VMs. It also takes very
//! little space while it is empty, because kubelet counts that space. A template whose sum has changed is damaged and is
//! made anew. All functions block, so call them through `spawn_blocking`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::SystemTime;

use bulkhead_records::{Intact, Sum};
use rustix::fs::SeekFrom;

/// How much is copied at a time.
const COPY_BYTES: usize = 1 << 20;
const MIB: u64 = 1 << 20;
/// How many templates are kept. There is a limit because pods choose the sizes, and each template takes space.
const MAX_TEMPLATES: usize = 16;
/// The extension of a template's name.
const TEMPLATE: &str = "ext4";

/// An error about a scratch disk.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    #[error("make the template {path}")]
    Template { path: PathBuf, source: io::Error },
    #[error("run mke2fs (Debian package e2fsprogs)")]
    Mke2fs(#[source] io::Error),
    #[error("mke2fs failed on {path}: {message}")]
    Format { path: PathBuf, message: String },
    #[error("copy a disk to {path}")]
    Copy { path: PathBuf, source: io::Error },
}

/// What a disk is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Scratch,
    EmptyDir,
}

/// The size of the journal of an emptyDir's disk. It is small because written blocks of the journal take space on the
/// host.
const JOURNAL_MIB: u64 = 8;

impl Purpose {
    fn name(self) -> &'static str {
        match self {
            Self::Scratch => "scratch",
            Self::EmptyDir => "empty-dir",
        }
    }

    /// Options for mke2fs, in addition to those of all disks.
    fn options(self) -> Vec<String> {
        let options: &[&str] = match self {
            Self::Scratch => &["-O", "^has_journal"],
            // No copies of the superblock and no room to grow: these would be most of the space of an empty disk.
            Self::EmptyDir => &[
                "-O",
                "^resize_inode,sparse_super2",
                "-E",
                "num_backup_sb=0,packed_meta_blocks=1,lazy_itable_init=1,lazy_journal_init=1",
            ],
        };
        let mut options: Vec<_> = options.iter().map(ToString::to_string).collect();
        if self == Self::EmptyDir {
            options.extend(["-J".to_owned(), format!("size={JOURNAL_MIB}")]);
        }
        options
    }

    fn mib(self, bytes: u64) -> u64 {
        let mib = bytes.div_ceil(MIB).max(16);
        match self {
            Self::Scratch => mib,
            Self::EmptyDir => mib.saturating_add(JOURNAL_MIB),
        }
    }
}

/// Makes disks.
#[derive(Debug)]
pub struct Scratch {
    templates: PathBuf,
    /// Held while a template is made or checked, so that only one is made at a time.
    making: Mutex<()>,
    intact: Intact,
}

impl Scratch {
    /// Keeps templates in the directory `templates`.
    pub fn new(templates: PathBuf) -> Self {
        Self {
            templates,
            making: Mutex::new(()),
            intact: Intact::default(),
        }
    }

    /// Makes the disk `path` of `bytes`, rounded up to whole MiB.
    pub fn make(&self, purpose: Purpose, path: &Path, bytes: u64) -> Result<(), ScratchError> {
        let template = self.template(purpose, purpose.mib(bytes))?;
        copied(&template, path)
    }

    /// Makes the disk `path` as `saved` is.
    pub fn bring_back(&self, saved: &File, path: &Path) -> Result<(), ScratchError> {
        copied(saved, path)
    }

    /// Opens the template, and makes it if there is none. It is opened here, under the lock, so that it can still be
    /// copied if `prune` removes it meanwhile.
    fn template(&self, purpose: Purpose, mib: u64) -> Result<File, ScratchError> {
        let name = format!("{}-{mib}m.{TEMPLATE}", purpose.name());
        let path = self.templates.join(name);
        let _one = self
            .making
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let new = path.with_extension("new");
        let failed = |source| ScratchError::Template {
            path: path.clone(),
            source,
        };
        match self.known_template(&path) {
            Ok(Some(template)) => return Ok(template),
            Ok(None) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed(e)),
        }
        fs::create_dir_all(&self.templates).map_err(failed)?;
        self.prune();
        let file = File::create(&new).map_err(failed)?;
        file.set_len(mib.saturating_mul(MIB)).map_err(failed)?;
        format(purpose, &new)?;
        file.sync_all().map_err(failed)?;
        let sum = File::open(&new).and_then(|file| Sum::of(&file));
        let sum = serde_json::to_vec(&sum.map_err(failed)?).map_err(|e| failed(e.into()))?;
        fs::write(sum_of(&path), sum).map_err(failed)?;
        fs::rename(&new, &path).map_err(failed)?;
        self.intact.trust(&path).map_err(failed)?;
        File::open(&path).map_err(failed)
    }

    /// Opens a template that exists. `None` if it is not as it was when it was made.
    fn known_template(&self, path: &Path) -> io::Result<Option<File>> {
        let template = File::options().read(true).write(true).open(path)?;
        let sum = fs::read(sum_of(path)).unwrap_or_default();
        let is_intact = match serde_json::from_slice::<Sum>(&sum) {
            Ok(sum) => self.intact.is(path, &template, &sum)?,
            // An earlier version kept no sums.
            Err(_) => false,
        };
        if !is_intact {
            tracing::warn!(
                "{} has changed or has no sum; making it anew",
                path.display()
            );
            return Ok(None);
        }
        // For `prune`, the modification time is the time of the last use.
        template.set_modified(SystemTime::now())?;
        self.intact.trust(path)?;
        Ok(Some(template))
    }

    /// Removes the least recently used templates, until there is room for one more.
    fn prune(&self) {
        let entries = fs::read_dir(&self.templates)
            .into_iter()
            .flatten()
            .flatten();
        let mut templates: Vec<_> = entries
            .filter(|entry| entry.path().extension().is_some_and(|end| end == TEMPLATE))
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        templates.sort();
        let surplus = (templates.len() + 1).saturating_sub(MAX_TEMPLATES);
        for (_, path) in templates.into_iter().take(surplus) {
            let _ = fs::remove_file(sum_of(&path));
            self.intact.forget(&path);
            if let Err(e) = fs::remove_file(&path) {
                tracing::warn!("remove {}: {e}", path.display());
            }
        }
    }
}

/// The file with the sum of a template.
fn sum_of(template: &Path) -> PathBuf {
    template.with_extension("sum")
}

/// How many bytes (without holes) and files are in a directory.
pub fn disk_usage(directory: &Path) -> (u64, u64) {
    let mut sum = (0, 0);
    // A file that is removed meanwhile is not counted.
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        sum.0 += metadata.blocks() * 512;
        sum.1 += 1;
        if metadata.is_dir() {
            let (bytes, files) = disk_usage(&entry.path());
            sum.0 += bytes;
            sum.1 += files;
        }
    }
    sum
}

fn format(purpose: Purpose, path: &Path) -> Result<(), ScratchError> {
    let output = Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0"])
        .args(["-L", purpose.name()])
        .args(purpose.options())
        // A fixed UUID, so that all templates of a size are the same.
        .args(["-U", "00000000-0000-4000-8000-000000000001"])
        .arg(path)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .stdin(Stdio::null())
        .output()
        .map_err(ScratchError::Mke2fs)?;
    if output.status.success() {
        return Ok(());
    }
    Err(ScratchError::Format {
        path: path.to_owned(),
        message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// Makes a disk as another file is.
fn copied(source: &File, path: &Path) -> Result<(), ScratchError> {
    copy(source, path).map_err(|source| {
        // Leave no incomplete disk behind.
        let _ = fs::remove_file(path);
        ScratchError::Copy {
            path: path.to_owned(),
            source,
        }
    })
}

/// Copies a file by reflink or, if that is not possible, its data without its holes.
fn copy(source: &File, to: &Path) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let target = options.open(to)?;
    if rustix::fs::ioctl_ficlone(&target, source).is_ok() {
        return Ok(());
    }
    copy_extents(source, &target)
}

fn copy_extents(source: &File, target: &File) -> io::Result<()> {
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut at = 0;
    while at < length {
        let start = match rustix::fs::seek(source, SeekFrom::Data(at)) {
            Ok(start) => start,
            // There is only a hole up to the end.
            Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(source, SeekFrom::Hole(start))?;
        copy_range(source, target, start, end, &mut buffer)?;
        at = end;
    }
    Ok(())
}

fn copy_range(
    source: &File,
    target: &File,
    start: u64,
    end: u64,
    buffer: &mut [u8],
) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let left = usize::try_from(end - at).unwrap_or(usize::MAX);
        let part = buffer.len().min(left);
        let part = buffer.get_mut(..part).unwrap_or_default();
        source.read_exact_at(part, at)?;
        target.write_all_at(part, at)?;
        at += part.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_disk_is_a_clean_ext4_and_takes_little_space() {
        let directory = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(directory.path().join("templates"));
        let disk = directory.path().join("disk");
        for (purpose, bytes, most) in [
            (Purpose::Scratch, 1 << 30, 32 << 20),
            (Purpose::EmptyDir, (1 << 30) + (8 << 20), 256 << 10),
        ] {
            for _ in 0..2 {
                scratch.make(purpose, &disk, 1 << 30).unwrap();
            }
            let metadata = fs::metadata(&disk).unwrap();
            assert_eq!(metadata.len(), bytes);
            let taken = metadata.blocks() * 512;
            assert!(taken < most, "{purpose:?} takes {taken} bytes");
            let check = Command::new("/sbin/e2fsck")
                .args(["-f", "-n"])
                .arg(&disk)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&check.stdout);
            assert!(check.status.success(), "{purpose:?}: {said}");
        }
    }

    #[test]
    fn a_damaged_template_is_made_anew_by_this_daemon_and_by_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let templates = directory.path().join("templates");
        let template = templates.join("scratch-16m.ext4");
        let disk = directory.path().join("disk");
        let is_clean = || {
            let mut check = Command::new("/sbin/e2fsck");
            let checked = check.args(["-f", "-n"]).arg(&disk).output().unwrap();
            checked.status.success() && fs::metadata(&disk).unwrap().len() == 16 << 20
        };
        let mut scratch = Scratch::new(templates.clone());
        let flip = |at: usize| {
            let mut bytes = fs::read(&template).unwrap();
            bytes[at] ^= 0xff;
            fs::write(&template, bytes).unwrap();
        };
        let damages: [&dyn Fn(); 6] = [
            &|| {},
            &|| flip(1024 + 12),
            &|| fs::write(&template, "").unwrap(),
            &|| {
                File::options()
                    .write(true)
                    .open(&template)
                    .unwrap()
                    .set_len(1 << 20)
                    .unwrap()
            },
            &|| fs::write(sum_of(&template), "").unwrap(),
            &|| fs::remove_file(&template).unwrap(),
        ];
        for (number, damage) in damages.iter().enumerate() {
            for is_next in [false, true] {
                scratch.make(Purpose::Scratch, &disk, 0).unwrap();
                if is_next {
                    scratch = Scratch::new(templates.clone());
                }
                // The clock of a file system may tick only a hundred times in a second.
                std::thread::sleep(std::time::Duration::from_millis(20));
                damage();
                scratch.make(Purpose::Scratch, &disk, 0).unwrap();
                assert!(is_clean(), "damage {number}, next daemon: {is_next}");
            }
        }
        let before = fs::metadata(&template).unwrap().ino();
        scratch.make(Purpose::Scratch, &disk, 0).unwrap();
        assert_eq!(fs::metadata(&template).unwrap().ino(), before, "made once");
    }

    #[test]
    fn the_smallest_disks_can_be_made() {
        let directory = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(directory.path().join("templates"));
        for purpose in [Purpose::Scratch, Purpose::EmptyDir] {
            scratch
                .make(purpose, &directory.path().join("disk"), 0)
                .unwrap();
        }
    }

    #[test]
    fn few_templates_are_kept_whatever_sizes_pods_choose() {
        let directory = tempfile::tempdir().unwrap();
        let templates = directory.path().join("templates");
        fs::create_dir(&templates).unwrap();
        for number in 0..40 {
            let file = File::create(templates.join(format!("scratch-{number}m.ext4"))).unwrap();
            let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(number);
            file.set_modified(at).unwrap();
        }
        Scratch::new(templates.clone()).prune();
        let left = fs::read_dir(&templates).unwrap().count();
        assert_eq!(left, MAX_TEMPLATES - 1);
        assert!(templates.join("scratch-39m.ext4").exists());
        assert!(!templates.join("scratch-0m.ext4").exists());
    }

    #[test]
    fn copies_are_equal_with_holes_at_the_start_in_between_and_at_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let from = directory.path().join("from");
        let file = File::create(&from).unwrap();
        file.set_len(9 << 20).unwrap();
        file.write_all_at(b"one", 1 << 20).unwrap();
        file.write_all_at(&[7; 3 << 20], 3 << 20).unwrap();
        let to = directory.path().join("to");
        let target = File::create(&to).unwrap();
        copy_extents(&File::open(&from).unwrap(), &target).unwrap();
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 5 << 20);
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let scratch = Scratch::new(file.join("templates"));
        let disk = directory.path().join("disk");
        let error = scratch.make(Purpose::Scratch, &disk, 1).unwrap_err();
        assert!(error.to_string().contains("templates"), "{error}");
    }
}
