// SPDX-License-Identifier: Apache-2.0
//! What kubelet talks to when pods are delegated: one runtime in front of several.
//!
//! Bulkhead's own servers, in [`crate::cri`], are one side; each other CRI server of the configuration is another one.
//! [`sides`] says who serves a new pod, [`images`] is the `ImageService`.

mod images;
mod seen;
mod sides;

pub use images::ImageEndpoint;
pub use seen::SeenPods;
pub use sides::{Side, Sides};
