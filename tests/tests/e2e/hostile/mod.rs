// SPDX-License-Identifier: Apache-2.0
//! Who does his worst, and what that costs the others: hostile images and registries, guests whose agent or whose
//! kernel attacks, all of them together (issue 13), and a VMM that its guest has taken over (issue 14). Each test prints
//! what another client saw, beside an idle daemon.

mod guest;
mod images;
mod kernel;
mod setting;
mod taken_over;
mod together;

use std::time::Duration;

/// How long to look at an idle daemon.
const IDLE: Duration = Duration::from_secs(4);
