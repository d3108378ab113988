// SPDX-License-Identifier: Apache-2.0
//! What kubelet reads of an emptyDir on the host: files that one container leaves to set the environment of the next
//! (`fileKeyRef`). When a container has exited, and before anybody hears of it, the files in kubelet's form that its
//! emptyDirs hold are copied to the host. Which of them a pod names is not known here, so all are, within bounds.
//!
//! A guest chooses names and contents, never where they go: each name is checked, and what is opened is beneath the
//! volume's directory, without links. Copies that the guest has no longer are removed.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use bulkhead_guest::protocol::EnvironmentFile;
use bulkhead_host::Guest;
use bulkhead_text::chain;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, mkdirat, openat2, unlinkat,
};
use rustix::io::Errno;

use super::disk::IMAGE;

const MAX_FILES: usize = 256;
const MAX_FILE_BYTES: usize = 64 << 10;
const MAX_DEPTH: usize = 8;
const MAX_NAME_BYTES: usize = 255;

/// Brings the files of `volume`, an emptyDir of the guest, to kubelet's `directory` of it. What goes wrong is said in the
/// log: kubelet says what it misses.
pub async fn copy_back(guest: &Guest, volume: &str, directory: &Path) {
    let files = match guest.agent.environment_files(volume).await {
        Ok(files) => files,
        Err(error) => {
            return tracing::warn!(volume, "read files for the environment: {}", chain(&error));
        }
    };
    let path = directory.to_owned();
    let written = tokio::task::spawn_blocking(move || write(&path, files)).await;
    if let Err(error) = written.unwrap_or_else(|e| Err(io::Error::other(e))) {
        tracing::warn!("copy files of {volume} to {}: {error}", directory.display());
    }
}

/// Makes the regular files of `directory` those that were given, but for the volume's disk.
fn write(directory: &Path, files: Vec<EnvironmentFile>) -> io::Result<()> {
    let files = checked(files)?;
    let root = openat2(
        CWD,
        directory,
        DIRECTORY,
        Mode::empty(),
        ResolveFlags::empty(),
    )?;
    remove_others(&root, &files)?;
    for (path, content) in &files {
        if let Err(e) = write_one(&root, path, content) {
            // A directory of a sub-path may be in the way, or a mount.
            tracing::warn!("{}: {e}", directory.join(path).display());
        }
    }
    Ok(())
}

/// What a guest says, if it can be true.
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
        // Not the disk's, nor what one is being made under.
        if !path.starts_with(IMAGE) {
            known.insert(clean, content.into());
        }
    }
    Ok(known)
}

/// Few plain names, one below the other.
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

/// Never through a link, nor into something that is mounted there.
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
    // kubelet is root.
    file.set_permissions(Permissions::from_mode(0o600))?;
    file.set_len(0)?;
    file.write_all(content)
}

/// Removes copies that the guest has no longer. Nobody else leaves files here: kubelet makes directories only.
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
