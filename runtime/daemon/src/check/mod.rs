// SPDX-License-Identifier: Apache-2.0
//! `bulkhead check`: tells whether this machine can run pods and, if not, why and what to do. With `--vm`, whether a VM
//! that runs is kept in ([`vm`]).
//!
//! It changes nothing. For the machine the daemon need not run. Most checks are functions in [`host`]; [`kernel`] says what
//! the host's kernel does against side channels and taken-over processes, and [`delegates`] asks other runtimes.

mod delegates;
mod finding;
mod host;
mod kernel;
pub mod vm;

use std::path::Path;
use std::process::ExitCode;

use bulkhead_host::probe::Probe;
use bulkhead_text::Problem;

use crate::cli::{self, Client};
use crate::config::Config;
use finding::Finding;

/// Runs all checks of the machine and prints their results. The exit code is success only if none has failed.
pub async fn run(config: &Config, json: bool) -> ExitCode {
    finding::print(&look(config).await, json, "This machine can run pods.")
}

/// How VMs of the daemon began. Nothing if no daemon runs.
async fn forks(socket: &Path) -> Option<Finding> {
    let mut client = Client::connect(socket).await.ok()?;
    let status = cli::ask_for_templates(&mut client).await.ok()??;
    let (counts, found) = (status.counts, status.sentence());
    Some(match counts.fell_back + counts.templates_failed {
        0 => Finding::info("forks", found),
        _ => Finding::warn(
            "forks",
            Problem::new(
                found,
                "the daemon's log has the reason, in a warning for each",
            ),
        ),
    })
}

/// Runs all checks.
async fn look(config: &Config) -> Vec<Finding> {
    let probe = Probe::new(
        config.vmm.clone(),
        config.kernel.clone(),
        config.initramfs.clone(),
        config.modules.clone(),
    );
    let guest = format!(
        "{}, {} and {}",
        config.kernel.display(),
        config.initramfs.display(),
        config.modules.display()
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
    findings.extend(forks(&config.socket).await);
    findings.extend(kernel::look(config.sandbox.cores));
    findings
}
