// SPDX-License-Identifier: Apache-2.0
//! How large a pod's VM is. Pure.

use serde::{Deserialize, Serialize};

/// What a VM was booted with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSize {
    pub vcpus: u8,
    pub memory_mib: u32,
    pub scratch_bytes: u64,
}
