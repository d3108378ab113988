// SPDX-License-Identifier: Apache-2.0
//! The door for fuzz targets: what reads the words of registries and the bytes of layers.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

pub use crate::contents::ImageRecord;
pub use crate::layer::LayerError;
use crate::layer::{Content, Limits, Promise};
pub use crate::manifest::{Candidates, ImageConfig, Manifest};
pub use crate::registry::{Challenge, error_message, pause};

/// So much that a hole of a file cannot take all memory.
const MAX_IMAGE_BYTES: u64 = 64 << 20;

/// Converts an archive that is not compressed to an EROFS file system in `file`, as a pull does.
pub fn convert(archive: &[u8], file: File) -> Result<(), LayerError> {
    let digest = crate::Digest::of(archive);
    let promise = Promise {
        bytes: archive.len() as u64,
        content: Content::Layer {
            diff_id: digest.clone(),
        },
        digest,
    };
    let limits = Limits::new(Path::new("/"), MAX_IMAGE_BYTES, 0, &Arc::default());
    let limits = Arc::new(limits.map_err(LayerError::Write)?);
    crate::layer::convert(archive, file, &promise, &limits)
}
