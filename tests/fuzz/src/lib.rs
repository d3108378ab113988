// SPDX-License-Identifier: Apache-2.0
//! What fuzz targets share. A target is a file in `targets/`: it says what holds whatever the bytes are.
//!
//! `input` reads a target's bytes. `archive` makes tar archives of them and `erofs` reads what becomes of those.
//! `chains` plays the driver of a virtio device, and `places` are directories and files for the host's side.

// Without the targets nobody needs this.
#![cfg(feature = "targets")]

pub mod archive;
pub mod chains;
pub mod erofs;
pub mod input;
pub mod places;
