// SPDX-License-Identifier: Apache-2.0
//! What a pod and a container are: what was asked for ([`spec`], [`signal`]), their life cycle ([`state`]), and what is
//! stored of them ([`record`], [`volume`]). Types and pure functions only.

pub mod record;
pub mod signal;
pub mod spec;
pub mod state;
pub mod volume;
