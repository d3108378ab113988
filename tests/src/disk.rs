// SPDX-License-Identifier: Apache-2.0
//! A disk of a given size, which can be filled.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

/// A tmpfs on a directory. It is unmounted on drop.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `size` as mount(8) takes it: "64k".
    pub fn mount(path: PathBuf, size: &str) -> Self {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(&path)
            .status();
        assert!(mounted.expect("run mount").success());
        Self(path)
    }

    /// Takes all space that is left.
    pub fn fill(&self) {
        let mut options = File::options();
        let file = options.create(true).append(true).open(self.filling());
        let mut file = file.expect("open a file");
        for bytes in [1 << 20, 4096, 1] {
            let part = vec![1; bytes];
            while file.write_all(&part).is_ok() {}
        }
    }

    /// Gives back what [`Self::fill`] has taken.
    pub fn empty(&self) {
        std::fs::remove_file(self.filling()).expect("remove a file");
    }

    fn filling(&self) -> PathBuf {
        self.0.join("filling")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
