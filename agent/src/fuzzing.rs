// SPDX-License-Identifier: Apache-2.0
//! The door for fuzz targets: what reads the host's streams and the user databases of images.

pub use crate::init::user;
pub use crate::streams::buffer::Source;
pub use crate::streams::{messages, records};
