// SPDX-License-Identifier: Apache-2.0
//! What is saved of a pod: a directory with four files, which its caller owns.
//!
//! ```text
//! manifest.json   what the pod and its containers were, and what they were made from; written last
//! state           the VM's vCPUs and devices, as the VMM writes them
//! memory          the guest's memory; what is zero there is a hole here
//! scratch         its scratch disk, likewise
//! ```
//! A directory without a manifest is no checkpoint. Bringing a pod back reads these files and never writes them. [`fit`]
//! compares what the pod is to be with what it was.

pub mod fit;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bulkhead_host::control::{ControlError, Extent};
use bulkhead_host::saved::Saved as VmFiles;
use bulkhead_records::Sum;
use bulkhead_vmm::config::KernelSum;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::life::record::{ContainerRecord, PodRecord};
use crate::scratch::ScratchError;

/// The version of this format. Another one is refused.
const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";
const SCRATCH: &str = "scratch";
/// The longest manifest that is read. A pod with a thousand containers has less.
const MANIFEST_BYTES: u64 = 64 << 20;

/// Why a pod was not saved or not brought back.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("the checkpoint's directory {path} {what}")]
    Directory { path: PathBuf, what: &'static str },
    #[error("container_ids {0}")]
    Containers(String),
    #[error("pod {id} cannot be checkpointed: {why}")]
    Refused { id: String, why: String },
    #[error("the checkpoint's file {path}")]
    File { path: PathBuf, source: io::Error },
    #[error("{path} is no checkpoint that this version can bring back: {why}")]
    Unknown { path: PathBuf, why: String },
    /// What it is to be brought back as, or this node, is not as what was saved.
    #[error("the checkpoint does not fit: {0}")]
    Unlike(String),
    #[error("copy the scratch disk of the checkpoint")]
    Scratch(#[source] ScratchError),
    #[error("save the VM")]
    Save(#[source] ControlError),
    #[error("no space is left in {path} for the checkpoint")]
    Full { path: PathBuf, source: ControlError },
    #[error("the checkpoint was not complete when its time was over; the pod goes on")]
    Late,
    #[error("this node keeps no warmed pods (sandbox.warmed)")]
    NoneWarmed,
    #[error("a warmed pod is in DIRECTORY/NAMESPACE/NAME, and {0:?} is no DNS label")]
    NoLabel(String),
    #[error("a background task of the checkpoint panicked; see the daemon's log")]
    Panicked,
}

/// A checkpoint that was asked for.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub directory: PathBuf,
    /// The ids of its containers, in full.
    pub containers: Vec<String>,
    pub until: Instant,
}

/// What is known of a checkpoint beside its large files.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    format: u32,
    /// The version of Bulkhead that wrote it, for people.
    bulkhead: String,
    pub kernel: KernelSum,
    pub modules: Sum,
    pub pod: PodRecord,
    /// The containers that ran.
    pub containers: Vec<ContainerRecord>,
    /// All that was on the image disk after the modules.
    pub layers: Vec<SavedLayer>,
}

/// A layer of an image, and its place on the image disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SavedLayer {
    pub diff_id: String,
    pub extent: Extent,
    pub sum: Option<Sum>,
}

impl Manifest {
    pub fn new(
        kernel: KernelSum,
        modules: Sum,
        pod: PodRecord,
        containers: Vec<ContainerRecord>,
        layers: Vec<SavedLayer>,
    ) -> Self {
        Self {
            format: FORMAT,
            bulkhead: env!("CARGO_PKG_VERSION").to_owned(),
            kernel,
            modules,
            pod,
            containers,
            layers,
        }
    }
}

/// The files of a checkpoint that is written. Unless [`Self::complete`] has succeeded, its drop removes them.
#[derive(Debug)]
pub struct Draft {
    directory: PathBuf,
    pub state: File,
    pub memory: File,
    pub scratch: File,
    is_complete: bool,
}

impl Draft {
    /// Makes the files in a directory, which must be there and empty.
    pub fn begin(directory: &Path) -> Result<Self, CheckpointError> {
        let wrong = |what| CheckpointError::Directory {
            path: directory.to_owned(),
            what,
        };
        if !directory.is_absolute() {
            return Err(wrong("must be an absolute path"));
        }
        match fs::symlink_metadata(directory) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(wrong("is no directory")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(wrong("does not exist: the caller makes it"));
            }
            Err(source) => return Err(failed(directory)(source)),
        }
        let mut entries = fs::read_dir(directory).map_err(failed(directory))?;
        if entries.next().is_some() {
            return Err(wrong("is not empty"));
        }
        let mut made = Vec::new();
        let mut make = |name| {
            let path = directory.join(name);
            let file = new_file(&path).map_err(failed(&path))?;
            made.push(path);
            Ok(file)
        };
        let files = (|| Ok((make(STATE)?, make(MEMORY)?, make(SCRATCH)?)))();
        match files {
            Ok((state, memory, scratch)) => Ok(Self {
                directory: directory.to_owned(),
                state,
                memory,
                scratch,
                is_complete: false,
            }),
            Err(error) => {
                for path in made {
                    let _ = fs::remove_file(path);
                }
                Err(error)
            }
        }
    }

    /// Writes the manifest when all else is on the disk. Then the checkpoint is whole.
    pub fn complete(mut self, manifest: &Manifest) -> Result<(), CheckpointError> {
        for (file, name) in [
            (&self.state, STATE),
            (&self.memory, MEMORY),
            (&self.scratch, SCRATCH),
        ] {
            file.sync_all()
                .map_err(failed(&self.directory.join(name)))?;
        }
        let path = self.directory.join(MANIFEST);
        let written = self.write_manifest(&path, manifest);
        written.map_err(failed(&path))?;
        self.is_complete = true;
        Ok(())
    }

    fn write_manifest(&self, path: &Path, manifest: &Manifest) -> io::Result<()> {
        let new = path.with_extension("new");
        let mut file = new_file(&new)?;
        file.write_all(&serde_json::to_vec(manifest)?)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(&self.directory)?.sync_all()
    }

    /// Whether its file system has no room for more.
    pub fn is_full(&self) -> bool {
        rustix::fs::fstatvfs(&self.memory).is_ok_and(|found| found.f_bavail == 0)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.is_complete {
            return;
        }
        let manifest = Path::new(MANIFEST).with_extension("new");
        for name in [STATE, MEMORY, SCRATCH, MANIFEST].map(Path::new) {
            let _ = fs::remove_file(self.directory.join(name));
        }
        let _ = fs::remove_file(self.directory.join(manifest));
    }
}

/// A checkpoint that is read.
#[derive(Debug)]
pub struct Saved {
    pub manifest: Manifest,
    pub state: File,
    pub memory: File,
    pub scratch: File,
}

impl Saved {
    /// What the VMM takes of it. `maps_memory`: it shares the pages of the file with others that do.
    pub fn for_vmm(&self, maps_memory: bool) -> Result<VmFiles, CheckpointError> {
        let both = || Ok((self.memory.try_clone()?, self.state.try_clone()?));
        let (memory, state) = both().map_err(failed(Path::new(MEMORY)))?;
        Ok(VmFiles {
            kernel_sum: self.manifest.kernel,
            memory,
            state,
            maps_memory,
        })
    }

    /// Opens a checkpoint for reading. Blocks.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        let unknown = |why: String| CheckpointError::Unknown {
            path: directory.to_owned(),
            why,
        };
        if !directory.is_absolute() {
            let path = directory.to_owned();
            let what = "must be an absolute path";
            return Err(CheckpointError::Directory { path, what });
        }
        // Another checkpoint may get the name meanwhile, and all files must be of one.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let inside = match rustix::fs::open(directory, flags | OFlags::DIRECTORY, Mode::empty()) {
            Ok(inside) => inside,
            Err(Errno::NOENT) => return Err(unknown("it does not exist".to_owned())),
            Err(e) => return Err(failed(directory)(e.into())),
        };
        let open = |name: &str| {
            let path = directory.join(name);
            // A pipe is not waited for.
            let opened = rustix::fs::openat(&inside, name, flags | OFlags::NONBLOCK, Mode::empty());
            match opened.map(File::from).map_err(io::Error::from) {
                Ok(file) if file.metadata().is_ok_and(|found| found.is_file()) => Ok(file),
                Ok(_) => Err(unknown(format!("{name} is no file"))),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    Err(unknown(format!("it has no {name}")))
                }
                Err(source) => Err(failed(&path)(source)),
            }
        };
        let mut text = Vec::new();
        let path = directory.join(MANIFEST);
        let read = open(MANIFEST)?.take(MANIFEST_BYTES).read_to_end(&mut text);
        read.map_err(failed(&path))?;
        let version: Version =
            serde_json::from_slice(&text).map_err(|e| unknown(format!("{MANIFEST}: {e}")))?;
        if version.format != FORMAT {
            let Version { format, bulkhead } = version;
            return Err(unknown(format!(
                "its format is {format}, written by Bulkhead {bulkhead}, and this one has format {FORMAT}"
            )));
        }
        Ok(Self {
            manifest: serde_json::from_slice(&text)
                .map_err(|e| unknown(format!("{MANIFEST}: {e}")))?,
            state: open(STATE)?,
            memory: open(MEMORY)?,
            scratch: open(SCRATCH)?,
        })
    }
}

/// What every version of the manifest has.
#[derive(Deserialize)]
struct Version {
    format: u32,
    bulkhead: String,
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::File { path, source }
}

fn new_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixtures;

    fn sum() -> Sum {
        Sum::of(&tempfile::tempfile().unwrap()).unwrap()
    }

    fn manifest() -> Manifest {
        let containers = vec![fixtures::container_record()];
        Manifest::new(
            [7; 32],
            sum(),
            fixtures::pod_record(),
            containers,
            Vec::new(),
        )
    }

    fn names(directory: &Path) -> usize {
        fs::read_dir(directory).unwrap().count()
    }

    #[test]
    fn a_checkpoint_is_whole_or_not_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        drop(Draft::begin(path).unwrap());
        assert_eq!(names(path), 0, "what was begun is removed");
        let why = Saved::open(path).unwrap_err().to_string();
        assert!(why.contains("it has no manifest.json"), "{why}");

        let draft = Draft::begin(path).unwrap();
        (&draft.memory).write_all(b"memory").unwrap();
        draft.complete(&manifest()).unwrap();
        assert_eq!(names(path), 4);
        let saved = Saved::open(path).unwrap();
        assert_eq!(saved.manifest.kernel, [7; 32]);
        assert_eq!(io::read_to_string(&saved.memory).unwrap(), "memory");
        let again = Draft::begin(path).unwrap_err().to_string();
        assert!(again.ends_with("is not empty"), "{again}");
        assert_eq!(names(path), 4, "a checkpoint that was there stays");
    }

    #[test]
    fn only_an_absolute_path_of_a_directory_is_written_to() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("/tmp", &link).unwrap();
        for (path, expected) in [
            (Path::new("relative"), "must be an absolute path"),
            (Path::new("/does/not/exist"), "does not exist"),
            (&file, "is no directory"),
            (&link, "is no directory"),
        ] {
            let said = Draft::begin(path).unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
        }
        let relative = Saved::open(Path::new("x")).unwrap_err().to_string();
        assert!(relative.ends_with("absolute path"), "{relative}");
    }

    #[test]
    fn another_format_and_nonsense_are_refused_in_words() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        Draft::begin(path).unwrap().complete(&manifest()).unwrap();
        for (text, expected) in [
            (r#"{"format":2,"bulkhead":"9.9"}"#, "its format is 2"),
            (r#"{"format":1,"bulkhead":"0"}"#, "missing field"),
            ("", "EOF"),
        ] {
            fs::write(path.join(MANIFEST), text).unwrap();
            let said = Saved::open(path).unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
        }
        fs::remove_file(path.join(SCRATCH)).unwrap();
        fs::create_dir(path.join(SCRATCH)).unwrap();
        let text = serde_json::to_vec(&manifest()).unwrap();
        fs::write(path.join(MANIFEST), text).unwrap();
        let said = Saved::open(path).unwrap_err().to_string();
        assert!(said.contains("scratch is no file"), "{said}");
    }
}
