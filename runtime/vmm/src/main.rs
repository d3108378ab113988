// SPDX-License-Identifier: Apache-2.0
//! The `bulkhead-vmm` binary. `run` runs one microVM, `probe` tells whether this host can run one, and
//! `share` is the file server of one.

use std::process::ExitCode;
use std::time::Instant;

use bulkhead_text::chain;
use bulkhead_vmm::config::VmConfig;
use bulkhead_vmm::report::{ExitReason, ExitReport, ReportFile};
use bulkhead_vmm::{probe, vm};

const USAGE: &str = "usage: bulkhead-vmm run < CONFIGURATION | bulkhead-vmm share < CONFIGURATION | \
    bulkhead-vmm probe [--json]";

fn main() -> ExitCode {
    let origin = Instant::now();
    bulkhead_vmm::prepare_process();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["run"] => ExitCode::from(run(origin).exit_code()),
        ["share"] => serve_files(),
        ["probe"] => print_probe(false),
        ["probe", "--json"] => print_probe(true),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(64)
        }
    }
}

fn run(origin: Instant) -> ExitReason {
    let config = match VmConfig::read(std::io::stdin().lock()) {
        Ok(config) => config,
        Err(e) => {
            eprintln!("bulkhead-vmm: {}", chain(&e));
            return ExitReason::SetupFailed;
        }
    };
    let file = match ReportFile::create(&config.exit_report) {
        Ok(file) => file,
        Err(e) => {
            let path = config.exit_report.display();
            eprintln!("bulkhead-vmm: create exit report {path}: {e}");
            return ExitReason::SetupFailed;
        }
    };
    let report = vm::run(&config, origin)
        .unwrap_or_else(|e| ExitReport::new(ExitReason::SetupFailed, chain(&e)));
    if report.reason.exit_code() != 0 {
        eprintln!("bulkhead-vmm: {:?}: {}", report.reason, report.detail);
    }
    if let Err(e) = file.write(&report) {
        eprintln!("bulkhead-vmm: write exit report: {e}");
    }
    report.reason
}

fn serve_files() -> ExitCode {
    match bulkhead_share::run(std::io::stdin().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bulkhead-vmm share: {}", chain(&e));
            ExitCode::FAILURE
        }
    }
}

fn print_probe(json: bool) -> ExitCode {
    let verdict = probe::probe();
    if json {
        match serde_json::to_string(&verdict) {
            Ok(text) => println!("{text}"),
            Err(e) => eprintln!("bulkhead-vmm: {e}"),
        }
    } else {
        println!("{verdict}");
    }
    ExitCode::from(u8::from(!verdict.usable))
}
