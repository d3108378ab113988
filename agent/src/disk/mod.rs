// SPDX-License-Identifier: Apache-2.0
//! The pod's two disks: the image disk, a window of read-only layers ([`layers`], through [`dm`]), and
//! the scratch disk, where everything that containers write goes ([`scratch`]). And what is no disk:
//! directories of the host ([`shared`]).

mod dm;
pub mod layers;
pub mod lower;
pub mod overlay;
pub mod scratch;
pub mod shared;
