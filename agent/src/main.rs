// SPDX-License-Identifier: Apache-2.0
//! The program `bulkhead-agent`. The library of the same name is all of it.

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_agent::main()
}
