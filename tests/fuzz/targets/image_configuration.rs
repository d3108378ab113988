// SPDX-License-Identifier: Apache-2.0
//! Image configurations. The first byte is the number of layers that the manifest has.
//!
//! What is accepted fits its bounds, and is kept as it is by the store.
#![no_main]

use std::collections::BTreeSet;

use bulkhead_fuzz::input::Input;
use bulkhead_image::Digest;
use bulkhead_image::fuzzing::{ImageConfig, ImageRecord};

const MOST_ERROR_BYTES: usize = 2000;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let layers = usize::from(input.below(4));
    let config = match ImageConfig::parse(input.rest(), layers) {
        Ok(config) => config,
        Err(error) => {
            let text = error.to_string();
            assert!(text.len() <= MOST_ERROR_BYTES, "{text}");
            assert!(!text.chars().any(char::is_control), "{text:?}");
            return;
        }
    };
    assert_eq!(config.diff_ids.len(), layers);
    let defaults = &config.defaults;
    for text in [&defaults.user, &defaults.working_dir, &defaults.stop_signal] {
        assert!(text.len() <= 4096, "a text of {} bytes", text.len());
    }
    let record = ImageRecord {
        id: Digest::of(bytes),
        repo_tags: BTreeSet::new(),
        repo_digests: BTreeSet::new(),
        layers: config.diff_ids,
        defaults: config.defaults,
        artifact_type: None,
        metadata_bytes: bytes.len() as u64,
    };
    let stored = serde_json::to_vec(&record).expect("a record");
    let read: ImageRecord = serde_json::from_slice(&stored).expect("what was stored");
    assert_eq!(read, record);
});
