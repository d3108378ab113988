// SPDX-License-Identifier: Apache-2.0
//! Layers as bytes of a tar archive, to an EROFS file system and back. Only the checksums of headers are mended.
#![no_main]

use std::os::unix::fs::FileExt;

use bulkhead_fuzz::archive::mended;
use bulkhead_fuzz::{erofs, places};
use bulkhead_image::fuzzing::convert;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let archive = mended(bytes);
    let file = places::file(&[]);
    if convert(&archive, file.try_clone().expect("a second descriptor")).is_err() {
        return;
    }
    let mut image =
        vec![0; usize::try_from(file.metadata().expect("its size").len()).expect("a size")];
    file.read_exact_at(&mut image, 0).expect("a file in memory");
    for (path, found) in erofs::read(&image) {
        let is_there = found.content.is_empty()
            || archive
                .windows(found.content.len())
                .any(|window| window == found.content);
        assert!(is_there, "the content of {path:?} is not in the archive");
    }
});
