// SPDX-License-Identifier: Apache-2.0
//! Directories that a layer has only because it has something in them: its archive has no entry for them. Tools such as
//! Bazel and ko write such layers. For overlayfs such a directory hides the mode, owner, times and attributes that a
//! layer below gives to it. So the ones of the layer below are copied to a tree of directories, which becomes the top
//! layer. The host has marked these directories (`runtime/image/src/layer/node.rs`).
//!
//! Layers are read-only file systems, so nothing in them changes while they are read here by path. Everything here
//! blocks.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::lgetxattr;
use rustix::io::Errno;

use super::attributes;
use super::layers::MOUNTS;

const IMPLIED: &str = "trusted.overlay.bulkhead.implied";
/// The values of [`IMPLIED`]: the directory is implied, or there is an implied one below it.
const ITSELF: u8 = b'y';
const BELOW: u8 = b'b';
const OPAQUE: &str = "trusted.overlay.opaque";
/// More directories of one image are an error: their copies are in the guest's own memory.
const MAX_DIRECTORIES: usize = 1 << 16;
/// Longer paths are left as they are: they could not be opened.
const MAX_PATH_BYTES: usize = 3500;

/// A tree of directories with the attributes that implied directories of an image have. Dropping it removes it.
#[derive(Debug)]
pub struct Restored(PathBuf);

impl Restored {
    /// Makes the tree for `layers`, the bottom one first. `None` if nothing has to be restored.
    pub fn make(layers: &[&Path]) -> io::Result<Option<Self>> {
        static MADE: AtomicU64 = AtomicU64::new(0);
        let mut implied = BTreeSet::new();
        // Below the bottom layer there is nothing to restore from.
        for layer in layers.iter().skip(1) {
            find(layer, Path::new(""), &mut implied)?;
        }
        let mut wanted = Vec::new();
        for path in implied {
            let seen = look(layers, &path)?;
            if matches!(decide(&seen), Some(Source { is_below: true, .. })) {
                wanted.push(path);
            }
        }
        if wanted.is_empty() {
            return Ok(None);
        }
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let restored = Self(format!("{MOUNTS}/a{number:x}").into());
        fs::create_dir(&restored.0)?;
        restored.fill(layers, &wanted)?;
        Ok(Some(restored))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the directories `wanted`, which are in order, and those above them.
    fn fill(&self, layers: &[&Path], wanted: &[PathBuf]) -> io::Result<()> {
        let mut sources = Vec::new();
        let mut made = BTreeSet::new();
        for path in wanted {
            let above: Vec<&Path> = path.ancestors().collect();
            for path in above.into_iter().rev().skip(1) {
                if !made.insert(path) {
                    continue;
                }
                let source = decide(&look(layers, path)?);
                let layer = source.and_then(|source| layers.get(source.layer));
                let layer = layer.ok_or(io::ErrorKind::NotFound)?;
                fs::create_dir(self.0.join(path))?;
                sources.push((layer.join(path), self.0.join(path)));
            }
        }
        // A directory that gets a child gets a new time, so the deepest ones are first.
        sources
            .iter()
            .rev()
            .try_for_each(|(source, copy)| attributes::copy(source, copy))
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Adds the implied directories of a layer at `path` and below.
fn find(layer: &Path, path: &Path, found: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    let mut open = vec![path.to_owned()];
    while let Some(path) = open.pop() {
        match mark(&layer.join(&path), IMPLIED)? {
            Some(ITSELF) => {
                found.insert(path.clone());
            }
            Some(BELOW) => {}
            _ => continue,
        }
        if found.len() > MAX_DIRECTORIES {
            return Err(io::Error::other(format!(
                "the image has more than {MAX_DIRECTORIES} directories without an entry of their own"
            )));
        }
        if path.as_os_str().len() > MAX_PATH_BYTES {
            continue;
        }
        for entry in fs::read_dir(layer.join(&path))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                open.push(path.join(entry.file_name()));
            }
        }
    }
    Ok(())
}

/// What a layer has at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// `is_hiding`: whether a directory above it hides what lower layers have there. If it hides only what they have
    /// in itself, it still has its attributes from them.
    Directory {
        is_implied: bool,
        is_hiding: bool,
    },
    Nothing {
        is_hiding: bool,
    },
    /// Something that is not a directory, there or on the way.
    Other,
}

/// What each of the layers has at `path`, the top one first.
fn look(layers: &[&Path], path: &Path) -> io::Result<Vec<Seen>> {
    let look = |layer: &&Path| look_in(layer, path);
    layers.iter().rev().map(look).collect()
}

fn look_in(layer: &Path, path: &Path) -> io::Result<Seen> {
    let mut here = layer.to_owned();
    let (mut is_hiding, mut is_opaque) = (false, false);
    for name in path.components() {
        here.push(name);
        is_hiding |= is_opaque;
        match fs::symlink_metadata(&here) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Ok(Seen::Other),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Ok(Seen::Nothing { is_hiding });
            }
            Err(e) => return Err(e),
        }
        is_opaque = mark(&here, OPAQUE)?.is_some();
    }
    Ok(Seen::Directory {
        is_implied: mark(&here, IMPLIED)? == Some(ITSELF),
        is_hiding,
    })
}

/// Where a directory has its attributes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Source {
    /// From the bottom.
    layer: usize,
    /// Whether a layer above it implies the directory.
    is_below: bool,
}

/// The layer that says what the directory is like, from what the layers have, the top one first. `None` if the image has
/// no such directory.
fn decide(seen: &[Seen]) -> Option<Source> {
    let mut implied = None;
    for (layer, seen) in (0..seen.len()).rev().zip(seen) {
        let hides = match *seen {
            Seen::Other => true,
            Seen::Nothing { is_hiding } => is_hiding,
            Seen::Directory {
                is_implied: false, ..
            } => {
                return Some(Source {
                    layer,
                    is_below: implied.is_some(),
                });
            }
            Seen::Directory { is_hiding, .. } => {
                implied.get_or_insert(Source {
                    layer,
                    is_below: false,
                });
                is_hiding
            }
        };
        if hides {
            break;
        }
    }
    implied
}

/// The first byte of an attribute.
fn mark(path: &Path, name: &str) -> io::Result<Option<u8>> {
    let mut value = [0; 16];
    match lgetxattr(path, name, &mut value) {
        Ok(_) => Ok(value.first().copied()),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_implied_directory_is_like_the_one_below_it_that_shows() {
        let own = Seen::Directory {
            is_implied: false,
            is_hiding: false,
        };
        let implied = Seen::Directory {
            is_implied: true,
            is_hiding: false,
        };
        let inside = Seen::Directory {
            is_implied: true,
            is_hiding: true,
        };
        let nothing = Seen::Nothing { is_hiding: false };
        let hidden = Seen::Nothing { is_hiding: true };
        let from = |layer, is_below| Some(Source { layer, is_below });
        // The top layer is first.
        for (seen, expected) in [
            (vec![own, own], from(1, false)),
            (vec![implied, own], from(0, true)),
            (vec![implied, nothing, implied, own, own], from(1, true)),
            (vec![own, implied, own], from(2, false)),
            (vec![nothing, implied, own], from(0, true)),
            (vec![implied, nothing], from(1, false)),
            (vec![implied, Seen::Other, own], from(2, false)),
            (vec![implied, hidden, own], from(2, false)),
            (vec![inside, own], from(1, false)),
            (vec![nothing, Seen::Other, own], None),
            (vec![nothing], None),
        ] {
            assert_eq!(decide(&seen), expected, "{seen:?}");
        }
    }
}
