// SPDX-License-Identifier: Apache-2.0
//! The door for fuzz targets: what reads the bytes of streaming clients and the records of the store.

pub use crate::pod::life::record::{ContainerRecord, PodRecord};
pub use crate::streaming::fuzzing as streaming;
