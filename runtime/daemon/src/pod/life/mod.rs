// SPDX-License-Identifier: Apache-2.0
//! What a pod and a container are: what was asked for ([`spec`], [`signal`]), where they are in their lives ([`state`]),
//! and what is stored of them ([`record`]). Nothing here does anything.

pub mod record;
pub mod signal;
pub mod spec;
pub mod state;
