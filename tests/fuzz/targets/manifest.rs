// SPDX-License-Identifier: Apache-2.0
//! Manifests and indexes of a registry. The first byte is the number of the media type with which they were served.
#![no_main]

use bulkhead_fuzz::input::Input;
use bulkhead_image::fuzzing::{Candidates, Manifest};

const TYPES: [&str; 5] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "text/html",
];
/// What an error may quote of a hostile manifest.
const MOST_ERROR_BYTES: usize = 2000;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let served_type = TYPES[usize::from(input.byte()) % TYPES.len()];
    match Manifest::parse(input.rest(), served_type) {
        Ok(Manifest::Image { config, layers }) => {
            assert!(layers.len() <= 500, "more layers than overlayfs takes");
            for one in layers.iter().chain([&config]) {
                assert_eq!(one.digest.hex().len(), 64);
            }
        }
        Ok(Manifest::Artifact(artifact)) => {
            assert!(
                artifact.blobs.len() <= 500,
                "more blobs than overlayfs takes"
            );
            assert!(artifact.artifact_type.len() <= MOST_ERROR_BYTES);
        }
        Ok(Manifest::Index(Candidates::Named(one))) => assert_eq!(one.digest.hex().len(), 64),
        Ok(Manifest::Index(Candidates::Unnamed(list))) => {
            assert!(!list.is_empty() && list.len() <= 8, "the entries to try");
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.len() <= MOST_ERROR_BYTES, "{text}");
            assert!(!text.chars().any(char::is_control), "{text:?}");
        }
    }
});
