// SPDX-License-Identifier: Apache-2.0
//! The process of a VM from its first step to its last: into the jail, then its configuration, its work, its report.
//!
//! What the work is, the caller says. In `bulkhead-vmm` it is [`crate::vm::run`]; a program for tests does its worst
//! instead, in the same jail.

use std::process::ExitCode;
use std::time::Instant;

use bulkhead_jail::namespaces::Side;
use bulkhead_text::chain;

use crate::config::VmConfig;
use crate::inherited::Inherited;
use crate::jail;
use crate::report::{ExitReason, ExitReport, ReportFile};
use crate::vm::SetupError;

/// Starts the VM's process and tells its number, or is that process and does its `work`. `origin` is the time at which the
/// first of the two began.
pub fn run(
    origin: Instant,
    work: impl FnOnce(&VmConfig, Instant) -> Result<ExitReport, SetupError>,
) -> ExitCode {
    match jail::separate() {
        Ok(Side::Parent { child }) => {
            println!("{child}");
            ExitCode::SUCCESS
        }
        Ok(Side::Child) => ExitCode::from(inside(origin, work).exit_code()),
        Err(e) => {
            eprintln!("bulkhead-vmm: {}", chain(&e));
            ExitCode::from(ExitReason::SetupFailed.exit_code())
        }
    }
}

fn inside(
    origin: Instant,
    work: impl FnOnce(&VmConfig, Instant) -> Result<ExitReport, SetupError>,
) -> ExitReason {
    // The parent reads the number until the end of that pipe.
    if let Err(e) = rustix::stdio::dup2_stdout(rustix::stdio::stderr()) {
        eprintln!("bulkhead-vmm: close standard output: {e}");
        return ExitReason::SetupFailed;
    }
    let config = match VmConfig::read(std::io::stdin().lock()) {
        Ok(config) => config,
        Err(e) => {
            eprintln!("bulkhead-vmm: {}", chain(&e));
            return ExitReason::SetupFailed;
        }
    };
    let file = match Inherited::ExitReport.take() {
        Ok(file) => ReportFile::new(file),
        Err(e) => {
            eprintln!("bulkhead-vmm: take over the exit report: {e}");
            return ExitReason::SetupFailed;
        }
    };
    let work = || {
        bulkhead_jail::syscalls::prepare(Some(file.of_forbidden_call()))?;
        jail::enter(&config)?;
        work(&config, origin)
    };
    let report = work().unwrap_or_else(|e| ExitReport::new(ExitReason::SetupFailed, chain(&e)));
    if report.reason.exit_code() != 0 {
        eprintln!("bulkhead-vmm: {:?}: {}", report.reason, report.detail);
    }
    if let Err(e) = file.write(&report) {
        eprintln!("bulkhead-vmm: write exit report: {e}");
    }
    report.reason
}
