// SPDX-License-Identifier: Apache-2.0
//! The pod's three disks: the image disk, a [`window`] of read-only layers ([`layers`]), the scratch disk, where
//! everything that containers write goes ([`scratch`]), and the volume disk, a window too, with block devices of the
//! host ([`blocks`]) and with volumes (`crate::volumes`). What the host puts in a window is an [`extent`], of which
//! [`dm`] makes a block device. And what is no disk: directories of the host ([`shared`]).

pub mod blocks;
pub mod dm;
pub mod extent;
pub mod layers;
pub mod lower;
pub mod overlay;
pub mod scratch;
pub mod shared;
pub mod window;
