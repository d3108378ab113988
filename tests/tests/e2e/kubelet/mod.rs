// SPDX-License-Identifier: Apache-2.0
//! A real kubelet alone, whose pods are static: what it does with a runtime, in a few tests of many cases each.
//!
//! What needs an API server is not here: configMaps, secrets and tokens, RuntimeClasses, and evictions, from which kubelet
//! spares static pods.

mod lifecycle;
mod resize;
mod restarts;
mod settings;
mod streams;
mod volumes;
