// SPDX-License-Identifier: Apache-2.0
//! Layers as bytes of a tar archive, to an EROFS file system and back. Only the checksums of headers are mended.
#![no_main]

use bulkhead_fuzz::archive::{file_system_of, mended};
use bulkhead_fuzz::erofs;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let archive = mended(bytes);
    let Some(image) = file_system_of(&archive) else {
        return;
    };
    for (path, found) in erofs::read(&image) {
        let is_there = found.content.is_empty()
            || archive
                .windows(found.content.len())
                .any(|window| window == found.content);
        assert!(is_there, "the content of {path:?} is not in the archive");
    }
});
