// SPDX-License-Identifier: Apache-2.0
//! A VMM for tests that its guest has taken over. It takes the place of `bulkhead-vmm`: the daemon starts it, it enters the
//! very same jail (`bulkhead_vmm::start`), but then it runs no guest. It makes each [`attempt`] of a table, in a child of
//! its own: without a list of system calls, which shows what namespaces, root, user, Landlock and limits do alone; then
//! with the list of each kind of thread. What came of it goes to the console's file, a line of JSON for each.
//!
//! - `run` and `probe` are called as those of `bulkhead-vmm`.
//! - `bait` lays out on the host what attempts look for, until its input ends.
//! - `give CONTROL FILE` attaches a layer as the daemon does.
//! - `outside WORDS` makes some harmless attempts without a jail, to show that they work where nothing forbids them.
//! - `page` prints the table for `docs/threat-model.md`.

mod attempt;
mod attempts;
mod bait;
mod facts;
mod machine;
mod page;
#[allow(unsafe_code)]
mod sys;
mod taken;
mod trial;
mod world;

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use bulkhead_text::chain;
use bulkhead_vmm::control::Client;
use bulkhead_vmm::{probe, start};

const USAGE: &str =
    "usage: bulkhead-taken-over-vmm run|probe|bait|give CONTROL FILE|outside WORDS|page";

fn main() -> ExitCode {
    let origin = Instant::now();
    bulkhead_vmm::prepare_process();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments.as_slice() {
        ["run"] => {
            let facts = facts::Facts::look();
            return start::run(origin, |config, _| Ok(taken::over(config, facts)));
        }
        ["probe", "--json"] => {
            serde_json::to_string(&probe::probe()).map_or_else(|e| Err(e.to_string()), print)
        }
        ["bait"] => bait::lay().map_err(|e| e.to_string()),
        ["give", control, file] => give(Path::new(control), Path::new(file)),
        ["outside", words] => taken::outside(words).map_err(|e| e.to_string()),
        ["page"] => print(page::table()),
        _ => Err(USAGE.to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("bulkhead-taken-over-vmm: {e}");
            ExitCode::FAILURE
        }
    }
}

fn print(text: String) -> Result<(), String> {
    println!("{text}");
    Ok(())
}

fn give(control: &Path, file: &Path) -> Result<(), String> {
    let file = File::open(file).map_err(|e| e.to_string())?;
    let mut client = Client::connect(control).map_err(|e| chain(&e))?;
    client.attach_extent(&file).map_err(|e| chain(&e)).map(drop)
}
