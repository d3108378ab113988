// SPDX-License-Identifier: Apache-2.0
//! The door for fuzz targets: what reads the configuration of networks and the results of plugins.

pub use crate::cni::{AddResult, Conflist};
pub use crate::ranges::check as subnets;
