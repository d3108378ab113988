// SPDX-License-Identifier: Apache-2.0
//! The `bulkhead-vmm` binary. `run` runs one microVM, `probe` tells whether this host can run one,
//! `share` is the file server of one, and `system-calls` prints what their threads may call.

use std::process::ExitCode;
use std::time::Instant;

use bulkhead_jail::syscalls::When;
use bulkhead_text::chain;
use bulkhead_vmm::{probe, start, syscalls, vm};

const USAGE: &str = "usage: bulkhead-vmm run < CONFIGURATION 3>EXIT_REPORT 4<>/dev/kvm ... | bulkhead-vmm share < CONFIGURATION | \
    bulkhead-vmm probe [--json] | bulkhead-vmm system-calls";

fn main() -> ExitCode {
    let origin = Instant::now();
    bulkhead_vmm::prepare_process();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["run"] => start::run(origin, vm::run),
        ["share"] => serve_files(),
        ["probe"] => print_probe(false),
        ["probe", "--json"] => print_probe(true),
        ["system-calls"] => print_system_calls(),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(64)
        }
    }
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

/// Prints a line for each rule: the kind of thread, the call, the condition, and why it may go unused.
fn print_system_calls() -> ExitCode {
    let lists = syscalls::ALL
        .into_iter()
        .chain([&bulkhead_share::syscalls::SERVER]);
    for list in lists {
        for rule in list.all() {
            let condition = match rule.when {
                When::Always => String::new(),
                When::OneOf(argument, values) => {
                    let values: Vec<String> = values.iter().map(|v| format!("{v:#x}")).collect();
                    format!("argument {argument}: {}", values.join(" "))
                }
                When::Without(argument, bits) => format!("argument {argument}: without {bits:#x}"),
            };
            let (call, number) = (rule.call.name(), rule.call.id());
            let seldom = rule.seldom.unwrap_or_default();
            println!("{}\t{call}\t{number}\t{condition}\t{seldom}", list.name);
        }
    }
    ExitCode::SUCCESS
}
