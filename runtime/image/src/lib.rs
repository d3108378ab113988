// SPDX-License-Identifier: Apache-2.0
//! Images: from a registry to files that a guest can mount.
//!
//! [`Store`] is the entry point. A pull asks a registry ([`registry`]) for a manifest ([`manifest`]). Then it streams
//! every missing layer through hash, decompression, hash and tar reader into one EROFS file ([`layer`]). At the end it
//! writes the image's record ([`contents`]). Nothing is unpacked to a directory, nothing is mounted on the host, and
//! nothing becomes visible before its digest has been verified.
//!
//! Everything that a registry sends may be hostile: sizes are limited, names checked, digests computed here.

mod config;
mod contents;
mod digest;
mod failure;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod layer;
mod manifest;
mod progress;
mod pull;
mod reference;
mod registry;
mod store;
mod turns;

pub use config::{Config, Credentials, HostConfig};
pub use contents::{LayerBlob, StoreError, Usage};
pub use digest::Digest;
pub use failure::FailureKind;
pub use manifest::ImageDefaults;
pub use progress::PullProgress;
pub use pull::PullError;
pub use reference::{Reference, ReferenceError};
pub use store::{Image, Store};
