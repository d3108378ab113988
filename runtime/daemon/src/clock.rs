// SPDX-License-Identifier: Apache-2.0
//! The host's clock, in the unit that CRI and the agent's protocol use.

use std::time::{SystemTime, UNIX_EPOCH};

/// The time now, in nanoseconds since 1970.
pub fn now() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
