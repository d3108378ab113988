// SPDX-License-Identifier: Apache-2.0
//! The pod's three disks, and the host's shared directories.
//!
//! The image disk is a [`window`] of read-only layers ([`layers`], [`implied`]). The scratch disk holds everything that
//! containers write outside of the pod's volumes ([`scratch`]); what of an image has to be there, [`copy`] copies with
//! its [`attributes`]. The volume disk is a window, too, with block devices of the host
//! ([`blocks`]) and with volumes (`crate::volumes`). The host puts an [`extent`] into a window, and [`dm`] makes a
//! block device of it, once the disk's [`capacity`] reaches that far.
//! Directories of the host are not on a disk, but come by virtio-fs ([`shared`]).

mod attributes;
pub mod blocks;
mod capacity;
pub mod copy;
pub mod dm;
pub mod extent;
pub mod implied;
pub mod layers;
pub mod lower;
pub mod overlay;
pub mod scratch;
pub mod shared;
pub mod window;
