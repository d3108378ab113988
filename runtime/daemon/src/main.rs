// SPDX-License-Identifier: Apache-2.0
//! The program `bulkhead`. The library of the same name is all of it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead::main()
}
