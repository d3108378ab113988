// SPDX-License-Identifier: Apache-2.0
//! Environment files: a container leaves files in an emptyDir, and kubelet reads the environment of a later container
//! from them (`fileKeyRef`).
//!
//! kubelet reads them on the host. So when a container has exited, and before its exit is reported, the files in its
//! emptyDirs that have kubelet's format are copied to the host. The daemon does not know which of them the pod refers
//! to, so it copies all, up to the limits below.
//!
//! The guest chooses the names and contents of the files, but not where they are written: each name is checked, and
//! files are opened only beneath the volume's directory and never through links. Copies of files that are no longer in
//! the guest are removed.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use bulkhead_guest::protocol::EnvironmentFile;
use bulkhead_guest::remarks::Remarks;
use bulkhead_host::{Guest, open_without_links};
use bulkhead_text::chain;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, mkdirat, openat2, unlinkat};
use rustix::io::Errno;

use super::disk::IMAGE;

const MAX_FILES: usize = 256;
const MAX_FILE_BYTES: usize = 64 << 10;
const MAX_DEPTH: usize = 8;
const MAX_NAME_BYTES: usize = 255;

/// Copies the environment files of `volume`, an emptyDir of the guest, to kubelet's `directory` of it. Errors go only
/// to the log, because kubelet reports a file that is missing.
pub async fn copy_back(guest: &Guest, volume: &str, directory: &Path) {
    let files = match guest.agent.environment_files(volume).await {
        Ok(files) => files,
        Err(error) => {
            return guest.remarks.warn(format_args!(
                "read environment files of {volume}: {}",
                chain(&error)
            ));
        }
    };
    let (path, remarks) = (directory.to_owned(), guest.remarks.clone());
    let written = tokio::task::spawn_blocking(move || write(&path, files, &remarks)).await;
    if let Err(error) = written.unwrap_or_else(|e| Err(io::Error::other(e))) {
        guest.remarks.warn(format_args!(
            "copy environment files of {volume} to {}: {error}",
            directory.display()
        ));
    }
}

/// Writes `files` into `directory` and removes all other regular files, except the volume's disk.
fn write(directory: &Path, files: Vec<EnvironmentFile>, remarks: &Remarks) -> io::Result<()> {
    let files = checked(files)?;
    let root = OwnedFd::from(open_without_links(directory, DIRECTORY)?);
    remove_others(&root, &files)?;
    for (path, content) in &files {
        if let Err(e) = write_one(&root, path, content) {
            // A sub-path's directory or a mount may have the same name. The other files are written all the same.
            remarks.warn(format_args!("{}: {e}", directory.join(path).display()));
        }
    }
    Ok(())
}

/// Checks the names and sizes that the guest sent.
fn checked(files: Vec<EnvironmentFile>) -> io::Result<BTreeMap<PathBuf, Vec<u8>>> {
    let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    if files.len() > MAX_FILES {
        return Err(wrong(format!("{} files are too many", files.len())));
    }
    let mut known = BTreeMap::new();
    for EnvironmentFile { path, content } in files {
        if content.len() > MAX_FILE_BYTES {
            return Err(wrong(format!("{} bytes are too many", content.len())));
        }
        let clean = clean(&path).ok_or_else(|| wrong(format!("{path:?} is not a name")))?;
        // Leave out the names of the volume's disk, also its temporary ones.
        if !path.starts_with(IMAGE) {
            known.insert(clean, content.into());
        }
    }
    Ok(known)
}

/// A relative path of at most [`MAX_DEPTH`] plain names; `None` if it is anything else.
fn clean(path: &str) -> Option<PathBuf> {
    let parts: Option<Vec<&OsStr>> = Path::new(path)
        .components()
        .map(|part| match part {
            Component::Normal(name) if name.len() <= MAX_NAME_BYTES => Some(name),
            _ => None,
        })
        .collect();
    let parts = parts.filter(|parts| (1..=MAX_DEPTH).contains(&parts.len()))?;
    (!path.contains('\0')).then(|| parts.iter().collect())
}

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

/// Opens `path` beneath `root`, but never through a link or on another file system.
fn open(root: impl AsFd, path: &Path, flags: OFlags, mode: u32) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(root, path, flags, Mode::from_raw_mode(mode), resolve)
}

fn write_one(root: &OwnedFd, path: &Path, content: &[u8]) -> io::Result<()> {
    let mut parent = root.try_clone()?;
    for name in path.parent().into_iter().flat_map(Path::components) {
        let name: &Path = name.as_ref();
        match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        parent = open(&parent, name, DIRECTORY, 0)?;
    }
    let name = Path::new(path.file_name().unwrap_or_default());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = File::from(open(&parent, name, flags, 0o600)?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    // Only root may read it; that is enough for kubelet.
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.set_len(0)?;
    file.write_all(content)
}

/// Removes copies of files that are no longer in the guest. All regular files here are such copies: kubelet makes only
/// directories.
fn remove_others(root: &OwnedFd, files: &BTreeMap<PathBuf, Vec<u8>>) -> io::Result<()> {
    let mut ahead = vec![(root.try_clone()?, PathBuf::new())];
    let mut seen = BTreeSet::new();
    while let Some((directory, path)) = ahead.pop() {
        for entry in Dir::read_from(&directory)?.flatten() {
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let below = path.join(name);
            match entry.file_type() {
                FileType::Directory if below.components().count() < MAX_DEPTH => {
                    if seen.len() < MAX_FILES * MAX_DEPTH
                        && let Ok(opened) = open(&directory, Path::new(name), DIRECTORY, 0)
                    {
                        seen.insert(below.clone());
                        ahead.push((opened, below));
                    }
                }
                FileType::RegularFile
                    if !files.contains_key(&below)
                        && !below.as_os_str().as_bytes().starts_with(IMAGE.as_bytes()) =>
                {
                    unlinkat(&directory, name, AtFlags::empty())?;
                }
                _ => {}
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn write(directory: &Path, files: Vec<EnvironmentFile>) -> io::Result<()> {
        super::write(directory, files, &Remarks::new("pod"))
    }

    fn file(path: &str, content: &str) -> EnvironmentFile {
        EnvironmentFile {
            path: path.into(),
            content: content.as_bytes().to_vec().into(),
        }
    }

    #[test]
    fn copies_follow_the_guest_and_the_disk_stays() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::write(root.join(IMAGE), "disk").unwrap();
        fs::create_dir(root.join("sub-path")).unwrap();
        let given = vec![file("a.env", "A='1'"), file("b/c/d.env", "longer")];
        write(root, given).unwrap();
        let read = |path: &str| fs::read_to_string(root.join(path));
        assert_eq!(read("a.env").unwrap(), "A='1'");
        let given = vec![file("b/c/d.env", "D='2'"), file(".bulkhead.ext4", "mine")];
        write(root, given).unwrap();
        assert!(read("a.env").is_err());
        assert_eq!(read("b/c/d.env").unwrap(), "D='2'");
        assert_eq!(read(IMAGE).unwrap(), "disk");
        assert!(root.join("sub-path").is_dir());
        let mode = fs::metadata(root.join("b/c/d.env")).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_refused_and_links_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("volume");
        fs::create_dir(&root).unwrap();
        let outside = directory.path().join("outside");
        fs::create_dir(&outside).unwrap();
        for bad in [
            "",
            "/etc/x",
            "../outside/x",
            "a/../../x",
            "a\0b",
            &"d/".repeat(9),
        ] {
            assert!(write(&root, vec![file(bad, "x")]).is_err(), "{bad:?}");
        }
        symlink(&outside, root.join("link")).unwrap();
        symlink(outside.join("file"), root.join("name")).unwrap();
        write(
            &root,
            vec![file("link/x", "x"), file("name", "x"), file("ok", "x")],
        )
        .unwrap();
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        assert_eq!(fs::read_to_string(root.join("ok")).unwrap(), "x");
    }

    #[test]
    fn too_much_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let many = (0..257).map(|n| file(&n.to_string(), "")).collect();
        assert!(write(directory.path(), many).is_err());
        let long = "x".repeat(MAX_FILE_BYTES + 1);
        assert!(write(directory.path(), vec![file("x", &long)]).is_err());
    }
}
