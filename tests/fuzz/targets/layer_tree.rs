// SPDX-License-Identifier: Apache-2.0
//! Layers of files, links, whiteouts and attributes in any order, to an EROFS file system and back.
//!
//! The input is a list of entries that people can read. If `BULKHEAD_FSCK` is set, fsck.erofs examines the file system, too.
#![no_main]

use std::process::Command;

use bulkhead_fuzz::archive::{file_system_of, of_lines};
use bulkhead_fuzz::{erofs, places};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let archive = of_lines(bytes);
    let Some(image) = file_system_of(&archive) else {
        return;
    };
    let found = erofs::read(&image);
    for (path, found) in &found {
        let is_zeroes = found.content.iter().all(|byte| *byte == 0);
        let is_there = is_zeroes
            || bytes
                .windows(found.content.len())
                .any(|window| window == found.content);
        assert!(is_there, "the content of {path:?} is not in the archive");
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let is_directory = found.mode & 0o170_000 == 0o040_000;
        assert!(
            is_directory || !name.starts_with(b".wh."),
            "the whiteout {path:?} is a file"
        );
    }
    if std::env::var_os("BULKHEAD_FSCK").is_some() {
        fsck(&image);
    }
});

fn fsck(image: &[u8]) {
    let path = places::directory().join("layer.erofs");
    // fsck.erofs 1.5 also reads where attributes would be, behind the last inode. Linux does not.
    std::fs::write(&path, [image, &[0; 4096]].concat()).expect("a file");
    let said = Command::new("fsck.erofs")
        .arg("--extract")
        .arg(&path)
        .output();
    let said = said.expect("fsck.erofs, of the package erofs-utils");
    assert!(said.status.success(), "fsck.erofs: {said:?}");
}
