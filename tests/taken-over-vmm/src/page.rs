// SPDX-License-Identifier: Apache-2.0
//! The table for the threat model: attempts with the same answer are in one row.

use std::fmt::Write as _;

use bulkhead_vmm::syscalls;

use crate::attempt::Attempt;
use crate::attempts;
use crate::world::{World, allows};

/// What attempts have in common that are in one row.
#[derive(PartialEq, Eq)]
struct Row {
    group: &'static str,
    without: String,
    with: String,
}

/// The table in Markdown.
pub fn table() -> String {
    let mut rows: Vec<(Row, Vec<&'static str>)> = Vec::new();
    for (group, attempt) in attempts::all() {
        let row = Row {
            group,
            without: without(attempt),
            with: with(attempt),
        };
        match rows.iter_mut().find(|(other, _)| *other == row) {
            Some((_, names)) => names.push(attempt.name),
            None => rows.push((row, vec![attempt.name])),
        }
    }
    let mut text =
        String::from("| at | attempt | without a list | with one |\n|---|---|---|---|\n");
    for (row, names) in rows {
        let Row {
            group,
            without,
            with,
        } = row;
        let names = names.join("; ");
        // Writing to a string does not fail.
        let _ = writeln!(text, "| {group} | {names} | {without} | {with} |");
    }
    text.pop();
    text
}

fn without(attempt: &Attempt) -> String {
    let answers: Vec<String> = attempt.may.iter().map(ToString::to_string).collect();
    let answers = answers.join(" or ");
    match attempt.harmless {
        "" => answers,
        why => format!("{answers}: {why}"),
    }
}

/// Which kinds of threads have all calls of the attempt. The others end.
fn with(attempt: &Attempt) -> String {
    let world = World::rehearsal();
    let _ = (attempt.run)(&world);
    let calls = world.rehearsed();
    let lists = syscalls::ALL.into_iter().filter(|list| {
        let mut calls = calls.iter();
        calls.all(|(call, arguments)| allows(list, *call, arguments))
    });
    let names: Vec<String> = lists.map(|list| format!("`{}`", list.name)).collect();
    match names.as_slice() {
        [] => "ended".to_owned(),
        names => format!("ended, but the same for {}", names.join(", ")),
    }
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
