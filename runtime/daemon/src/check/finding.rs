// SPDX-License-Identifier: Apache-2.0
//! The result of one check, and how results are shown.

use std::process::ExitCode;

use bulkhead_text::Problem;
use serde::Serialize;

/// The least width of the column of names.
const NAME_WIDTH: usize = 9;

/// What a result means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// Good to know. Nothing is wrong, or nobody can tell from here.
    Info,
    /// Pods run, but the host protects less than it could.
    Warn,
    Fail,
}

/// The result of one check.
#[derive(Debug, Serialize)]
pub struct Finding {
    pub name: String,
    /// False only if it is a failure.
    pub ok: bool,
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do; empty if nothing is to be done.
    pub remedy: String,
}

impl Finding {
    /// The result of a check that passes or fails.
    pub fn new(name: impl Into<String>, looked: Result<String, Problem>) -> Self {
        match looked {
            Ok(found) => Self::plain(name, Verdict::Ok, found),
            Err(problem) => Self::problem(name, Verdict::Fail, problem),
        }
    }

    /// What is right.
    pub fn fine(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self::plain(name, Verdict::Ok, found)
    }

    /// What is good to know.
    pub fn info(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self::plain(name, Verdict::Info, found)
    }

    /// What should be better.
    pub fn warn(name: impl Into<String>, problem: Problem) -> Self {
        Self::problem(name, Verdict::Warn, problem)
    }

    fn plain(name: impl Into<String>, verdict: Verdict, found: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ok: true,
            verdict,
            found: found.into(),
            remedy: String::new(),
        }
    }

    fn problem(name: impl Into<String>, verdict: Verdict, problem: Problem) -> Self {
        Self {
            name: name.into(),
            ok: verdict != Verdict::Fail,
            verdict,
            found: problem.cause,
            remedy: problem.remedy,
        }
    }
}

/// Prints results, and `well` if none is a failure. The exit code is success only then.
pub fn print(findings: &[Finding], json: bool, well: &str) -> ExitCode {
    let ok = findings.iter().all(|finding| finding.ok);
    if json {
        println!("{}", serde_json::json!({ "ok": ok, "checks": findings }));
    } else {
        print!("{}", show(findings, well));
    }
    if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn show(findings: &[Finding], well: &str) -> String {
    let width = findings.iter().map(|finding| finding.name.len()).max();
    let width = width.unwrap_or_default().max(NAME_WIDTH);
    let mut text = String::new();
    for finding in findings {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok  ",
            Verdict::Info => "info",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        text += &format!("{verdict}  {:<width$}  {}\n", finding.name, finding.found);
        if !finding.remedy.is_empty() {
            text += &format!("{:indent$}-> {}\n", "", finding.remedy, indent = width + 8);
        }
    }
    let count = |verdict| {
        let like = findings.iter().filter(|finding| finding.verdict == verdict);
        like.count()
    };
    let warnings = match count(Verdict::Warn) {
        0 => String::new(),
        1 => " There is 1 warning.".to_owned(),
        count => format!(" There are {count} warnings."),
    };
    text += &match count(Verdict::Fail) {
        0 => format!("{well}{warnings}\n"),
        failed => format!("{failed} of {} checks failed.{warnings}\n", findings.len()),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_and_warnings_are_shown_with_their_remedies_and_counted() {
        let findings = [
            Finding::fine("good", "fine"),
            Finding::info("known", "so it is"),
            Finding::warn("weak", Problem::new("it is thin", "make it thicker")),
            Finding::new("bad", Err(Problem::new("it is broken", "mend it"))),
        ];
        let text = show(&findings, "All is well.");
        for line in [
            "ok    good       fine\n",
            "info  known      so it is\n",
            "warn  weak       it is thin\n                 -> make it thicker\n",
            "FAIL  bad        it is broken\n                 -> mend it\n",
        ] {
            assert!(text.contains(line), "{text}");
        }
        assert!(
            text.ends_with("1 of 4 checks failed. There is 1 warning.\n"),
            "{text}"
        );
        let text = show(&findings[..3], "All is well.");
        assert!(text.ends_with("All is well. There is 1 warning.\n"));
        assert!(show(&findings[..2], "All is well.").ends_with("All is well.\n"));
    }

    #[test]
    fn a_warning_is_no_failure() {
        let warning = Finding::warn("weak", Problem::new("it is thin", "make it thicker"));
        assert_eq!(print(&[warning], true, ""), ExitCode::SUCCESS);
        let failure = Finding::new("bad", Err(Problem::new("it is broken", "mend it")));
        assert_eq!(print(&[failure], false, ""), ExitCode::FAILURE);
    }
}
