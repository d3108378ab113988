// SPDX-License-Identifier: Apache-2.0
//! The files of a volume from which kubelet may take environment variables (`fileKeyRef`). kubelet reads them on the
//! host, but they are in the guest. So they are copied to the host when a container has exited.
//!
//! Nobody says which files kubelet will read. So this finds all files in the required form, `NAME='value'`, those
//! nearest to the root first. Containers may write to the volume at the same time, so no symbolic link is followed. No
//! more than [`MAX_LOOKED_AT`] entries are examined.

use std::collections::VecDeque;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use bulkhead_proto::agent::EnvironmentFile;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, openat2, statat};

const MAX_FILES: usize = 256;
const MAX_FILE_BYTES: u64 = 64 << 10;
const MAX_TOTAL_BYTES: usize = 1 << 20;
const MAX_DEPTH: usize = 8;
const MAX_LOOKED_AT: usize = 4096;

/// A directory that still has to be examined.
struct Ahead {
    directory: OwnedFd,
    path: String,
    depth: usize,
}

/// Finds the files below the directory `root`.
pub fn find(root: &Path) -> io::Result<Vec<EnvironmentFile>> {
    let mut found = Vec::new();
    let (mut looked_at, mut total) = (0, 0);
    let mut ahead = VecDeque::from([Ahead {
        directory: openat2(
            CWD,
            root,
            DIRECTORY,
            Mode::empty(),
            ResolveFlags::NO_SYMLINKS,
        )?,
        path: String::new(),
        depth: 1,
    }]);
    while let Some(at) = ahead.pop_front() {
        // Entries that vanish meanwhile are skipped.
        for entry in Dir::read_from(&at.directory)
            .into_iter()
            .flatten()
            .flatten()
        {
            let Some(name) = plain(entry.file_name()) else {
                continue;
            };
            looked_at += 1;
            if looked_at > MAX_LOOKED_AT || found.len() >= MAX_FILES {
                return Ok(found);
            }
            let path = join(&at.path, name);
            match kind(&at.directory, &entry) {
                FileType::Directory if at.depth < MAX_DEPTH => {
                    let opened = open(&at.directory, name, DIRECTORY);
                    ahead.extend(opened.ok().map(|directory| Ahead {
                        directory,
                        path,
                        depth: at.depth + 1,
                    }));
                }
                FileType::RegularFile => {
                    let Some(content) = read(&at.directory, name) else {
                        continue;
                    };
                    total += path.len() + content.len();
                    if total > MAX_TOTAL_BYTES {
                        return Ok(found);
                    }
                    let content = content.into();
                    found.push(EnvironmentFile { path, content });
                }
                _ => {}
            }
        }
    }
    Ok(found)
}

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);
/// NONBLOCK, because the file may have been replaced by a pipe, on which an open would wait.
const FILE: OFlags = OFlags::RDONLY
    .union(OFlags::NONBLOCK)
    .union(OFlags::CLOEXEC);

fn open(directory: &OwnedFd, name: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(directory, name, flags, Mode::empty(), resolve)
}

/// Reads a file, if it is not too long and has the required form.
fn read(directory: &OwnedFd, name: &str) -> Option<Vec<u8>> {
    let file = File::from(open(directory, name, FILE).ok()?);
    let metadata = file.metadata().ok()?;
    if !metadata.is_file() || metadata.len() > MAX_FILE_BYTES {
        return None;
    }
    let mut content = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut content).ok()?;
    has_form(&content).then_some(content)
}

/// Whether kubelet could parse the file, judged by the first line that is neither empty nor a comment. A file without
/// such a line defines no variables, which is valid where variables are optional.
fn has_form(content: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(content) else {
        return false;
    };
    let mut lines = text
        .lines()
        .map(|line| line.trim_start_matches([' ', '\t']));
    let first = lines.find(|line| !line.is_empty() && !line.starts_with('#'));
    first.is_none_or(|line| match line.split_once('=') {
        Some((name, value)) => {
            !name.is_empty() && !name.contains([' ', '\t']) && value.starts_with(['\'', ' ', '\t'])
        }
        None => false,
    })
}

fn kind(directory: &OwnedFd, entry: &rustix::fs::DirEntry) -> FileType {
    match entry.file_type() {
        FileType::Unknown => {
            let stat = statat(directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW);
            stat.map_or(FileType::Unknown, |stat| {
                FileType::from_raw_mode(stat.st_mode)
            })
        }
        kind => kind,
    }
}

/// A name that can be sent to the host.
fn plain(name: &CStr) -> Option<&str> {
    let name = name.to_str().ok()?;
    (name != "." && name != "..").then_some(name)
}

fn join(parent: &str, name: &str) -> String {
    if parent.is_empty() {
        return name.to_owned();
    }
    format!("{parent}/{name}")
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn paths(root: &Path) -> Vec<String> {
        let mut paths: Vec<_> = find(root).unwrap().into_iter().map(|f| f.path).collect();
        paths.sort();
        paths
    }

    #[test]
    fn the_form_is_that_which_kubelet_reads() {
        for (text, expected) in [
            ("A='b'\n", true),
            ("# a comment\n\n \tA_B='more\nlines'", true),
            ("A= 'b'", true),
            ("", true),
            ("# nothing\n", true),
            ("A=b", false),
            ("A ='b'", false),
            ("='b'", false),
            ("#!/bin/sh\necho", false),
            ("{\"a\": 1}", false),
        ] {
            assert_eq!(has_form(text.as_bytes()), expected, "{text:?}");
        }
        assert!(!has_form(b"A='\xff'"));
    }

    #[test]
    fn files_are_found_nearest_first_and_links_and_long_ones_left() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("top.env"), "A='1'").unwrap();
        fs::write(root.join("a/b/deep.env"), "A='2'").unwrap();
        fs::write(root.join("program"), "\x7fELF").unwrap();
        fs::write(
            root.join("long.env"),
            format!("A='{}'", "x".repeat(64 << 10)),
        )
        .unwrap();
        symlink("top.env", root.join("link.env")).unwrap();
        symlink("/etc", root.join("etc")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
        let found = find(root).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|file| (file.path.as_str(), file.content.as_ref()))
            .collect();
        let expected: [(&str, &[u8]); 2] = [("top.env", b"A='1'"), ("a/b/deep.env", b"A='2'")];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_volume_of_many_files_is_not_looked_through() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        for number in 0..300 {
            fs::write(root.join(format!("{number}.env")), "A='1'").unwrap();
        }
        assert_eq!(paths(root).len(), MAX_FILES);
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let large = format!("A='{}'", "x".repeat(60 << 10));
        for number in 0..30 {
            fs::write(root.join(format!("{number}.env")), &large).unwrap();
        }
        let total: usize = find(root).unwrap().iter().map(|f| f.content.len()).sum();
        assert!((900 << 10..=1 << 20).contains(&total), "{total}");
        let mut deep = root.to_path_buf();
        for _ in 0..MAX_DEPTH {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("too-deep.env"), "").unwrap();
        assert!(paths(root).iter().all(|path| !path.contains("too-deep")));
    }
}
