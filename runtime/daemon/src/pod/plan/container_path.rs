// SPDX-License-Identifier: Apache-2.0
//! Paths in a container at which something is mounted: of CRI's mounts, and of volumes that an image declares. Pure.

use std::path::{Component, Path, PathBuf};

/// The absolute path without `.` and double slashes. As in containerd, a relative path starts at the root. `None` if it
/// is the root itself, or can be no path below it.
pub fn normalized(given: &str) -> Option<String> {
    let mut path = PathBuf::from("/");
    for part in Path::new(given).components() {
        match part {
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    let is_below = path != Path::new("/") && !given.contains('\0');
    is_below.then(|| path.to_string_lossy().into_owned())
}
