// SPDX-License-Identifier: Apache-2.0
//! A real kubelet without an API server runs static pods. Few tests with many cases each.
//!
//! Not covered, because it needs an API server: configMaps, secrets, tokens and RuntimeClasses. Nor eviction: kubelet
//! never evicts static pods.

mod lifecycle;
mod resize;
mod restarts;
mod settings;
mod streams;
mod volumes;
