// SPDX-License-Identifier: Apache-2.0
//! `bulkhead check`: tells whether this machine can run pods and, if not, why and what to do.
//!
//! It changes nothing, and the daemon need not run. Most checks are functions in [`host`];
//! [`delegates`] asks other runtimes.

mod delegates;
mod host;

use std::process::ExitCode;

use bulkhead_host::probe::Probe;
use bulkhead_text::Problem;
use serde::Serialize;

use crate::config::Config;

/// The result of one check.
#[derive(Debug, Serialize)]
struct Finding {
    name: &'static str,
    ok: bool,
    /// What was found.
    found: String,
    /// What to do; empty if the check passed.
    remedy: String,
}

impl Finding {
    fn new(name: &'static str, looked: Result<String, Problem>) -> Self {
        match looked {
            Ok(found) => Self {
                name,
                ok: true,
                found,
                remedy: String::new(),
            },
            Err(problem) => Self {
                name,
                ok: false,
                found: problem.cause,
                remedy: problem.remedy,
            },
        }
    }
}

/// Runs all checks and prints their results. The exit code is success only if all have passed.
pub async fn run(config: &Config, json: bool) -> ExitCode {
    let findings = look(config).await;
    let ok = findings.iter().all(|finding| finding.ok);
    if json {
        println!("{}", serde_json::json!({ "ok": ok, "checks": findings }));
    } else {
        print!("{}", show(&findings));
    }
    if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs all checks.
async fn look(config: &Config) -> Vec<Finding> {
    let probe = Probe::new(
        config.vmm.clone(),
        config.kernel.clone(),
        config.initramfs.clone(),
    );
    let guest = format!(
        "{} and {}",
        config.kernel.display(),
        config.initramfs.display()
    );
    let network = format!(
        "a network in {}, and its plugins",
        config.cni.conf_dir.display()
    );
    let mut findings = vec![
        Finding::new("privilege", host::privilege()),
        Finding::new(
            "kvm",
            probe
                .kvm()
                .await
                .map(|()| "a probe guest ran as it should".to_owned()),
        ),
        Finding::new("guest", probe.files().map(|()| guest)),
        Finding::new("tun", host::tun()),
        Finding::new("cgroups", host::cgroups(config.cgroup_parent.as_deref())),
        Finding::new("cni", config.cni.ready().await.map(|()| network)),
        Finding::new(
            "disk",
            host::disk(&config.state_dir, config.sandbox.scratch_bytes),
        ),
        Finding::new("clock", host::clock()),
    ];
    if !config.runtimes.delegates.is_empty() {
        let ready = delegates::ready(&config.runtimes).await;
        findings.push(Finding::new("delegates", ready));
    }
    findings
}

fn show(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let verdict = if finding.ok { "ok  " } else { "FAIL" };
        text += &format!("{verdict}  {:<9}  {}\n", finding.name, finding.found);
        if !finding.ok {
            text += &format!("{:17}-> {}\n", "", finding.remedy);
        }
    }
    text += match findings.iter().filter(|finding| !finding.ok).count() {
        0 => "This machine can run pods.\n".to_owned(),
        count => format!("{count} of {} checks failed.\n", findings.len()),
    }
    .as_str();
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_shown_with_its_remedy_and_counted() {
        let findings = [
            Finding::new("good", Ok("fine".into())),
            Finding::new("bad", Err(Problem::new("it is broken", "mend it"))),
        ];
        let text = show(&findings);
        assert!(text.contains("ok    good       fine\n"), "{text}");
        assert!(text.contains("FAIL  bad        it is broken\n"), "{text}");
        assert!(text.contains("-> mend it\n"), "{text}");
        assert!(text.ends_with("1 of 2 checks failed.\n"), "{text}");
        assert!(show(&findings[..1]).ends_with("can run pods.\n"));
    }
}
