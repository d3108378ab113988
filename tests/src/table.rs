// SPDX-License-Identifier: Apache-2.0
//! A table of cases in one test. All cases are checked and printed; if one is wrong, the test fails at the end.

use std::fmt::Display;

#[derive(Debug)]
pub struct Table {
    title: String,
    rows: Vec<(String, bool, String)>,
}

impl Table {
    pub fn new(title: &str) -> Self {
        Self {
            title: title.into(),
            rows: Vec::new(),
        }
    }

    /// Adds a case: whether it is right, and what was seen.
    pub fn row(&mut self, case: &str, right: bool, seen: impl Display) {
        let seen = seen.to_string().trim_end().replace('\n', "\\n");
        self.rows.push((case.into(), right, seen));
    }

    /// Adds a case that is right if `seen` equals `expected`.
    pub fn equal<T: PartialEq + std::fmt::Debug>(&mut self, case: &str, seen: T, expected: T) {
        let right = seen == expected;
        let seen = if right {
            format!("{seen:?}")
        } else {
            format!("{seen:?}, should be {expected:?}")
        };
        self.row(case, right, seen);
    }

    /// Prints the table. Panics if a case is wrong or if there are no cases.
    pub fn finish(self) {
        println!("{}", self.title);
        for (case, right, seen) in &self.rows {
            println!(
                "  {} {case:<58} {seen}",
                if *right { "ok   " } else { "WRONG" }
            );
        }
        let wrong: Vec<_> = self.rows.iter().filter(|row| !row.1).collect();
        assert!(!self.rows.is_empty(), "{}: no cases", self.title);
        assert!(
            wrong.is_empty(),
            "{}: {} wrong: {wrong:#?}",
            self.title,
            wrong.len()
        );
    }
}
