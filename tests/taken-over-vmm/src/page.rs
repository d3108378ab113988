// SPDX-License-Identifier: Apache-2.0
//! The table for the threat model: attempts with the same answer are in one row.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use ::syscalls::x86_64::Sysno;
use bulkhead_jail::syscalls::{List, When};
use bulkhead_vmm::syscalls;

use crate::attempt::Attempt;
use crate::attempts;
use crate::world::{World, allows};

/// What attempts have in common that are in one row.
#[derive(PartialEq, Eq)]
struct Row {
    group: &'static str,
    harmless: &'static str,
    with: String,
}

/// What is collected for a row.
#[derive(Default)]
struct Cells {
    names: Vec<&'static str>,
    answers: BTreeSet<String>,
}

/// The table in Markdown.
pub fn table() -> String {
    let mut rows: Vec<(Row, Cells)> = Vec::new();
    for (group, attempt) in attempts::all() {
        let row = Row {
            group,
            harmless: attempt.harmless,
            with: with(attempt),
        };
        let place = rows.iter().position(|(other, _)| *other == row);
        let place = place.unwrap_or_else(|| {
            rows.push((row, Cells::default()));
            rows.len() - 1
        });
        let (_, cells) = &mut rows[place];
        cells.names.push(attempt.name);
        let answers = attempt.may.iter().map(ToString::to_string);
        cells.answers.extend(answers);
    }
    let mut text =
        String::from("| at | attempts | without a list | with one |\n|---|---|---|---|\n");
    for (row, cells) in rows {
        let names = cells.names.join("; ");
        let answers: Vec<String> = cells.answers.into_iter().collect();
        let answers = answers.join(", ");
        let without = match row.harmless {
            "" => answers,
            why => format!("{answers}: {why}"),
        };
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "| {} | {names} | {without} | {} |",
            row.group, row.with
        );
    }
    text.pop();
    text
}

/// Which kinds of threads have all calls of the attempt. The others end.
fn with(attempt: &Attempt) -> String {
    let world = World::rehearsal();
    let _ = (attempt.run)(&world);
    let calls = world.rehearsed();
    let lists = syscalls::ALL.into_iter().filter(|list| {
        let mut calls = calls.iter();
        calls.all(|(call, arguments)| {
            allows(list, *call, arguments) && !is_of_debug_builds(list, *call)
        })
    });
    let names: Vec<String> = lists.map(|list| format!("`{}`", list.name)).collect();
    match names.as_slice() {
        [] => "ended".to_owned(),
        names if names.len() == syscalls::ALL.len() => "the same".to_owned(),
        names => format!("ended, but for {}", names.join(", ")),
    }
}

/// A debug build looks whether a descriptor is open before it closes it. The table is that of other builds.
fn is_of_debug_builds(list: &List, call: Sysno) -> bool {
    let mut rules = list.all().filter(|rule| rule.call == Sysno::fcntl);
    call == Sysno::fcntl && rules.any(|rule| rule.when == When::Always)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threat_model_has_the_table_as_it_is() {
        let page = include_str!("../../../docs/threat-model.md");
        assert!(
            page.contains(&table()),
            "put into docs/threat-model.md what this prints: cargo run -p bulkhead-taken-over-vmm page"
        );
    }
}
