// SPDX-License-Identifier: Apache-2.0
//! Checks whether this host can run VMs, with `bulkhead-vmm probe`, which runs a few instructions in a guest.
//!
//! A good result is kept for ever. After a bad result, the probe is repeated when the result is old, so that the daemon
//! recovers without a restart.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use bulkhead_text::Problem;
use bulkhead_vmm::probe::Verdict;
use tokio::process::Command;
use tokio::sync::Mutex;

/// How long a bad result is kept.
const BAD_ANSWER: Duration = Duration::from_secs(15);
/// How long the probe may take. A KVM that is emulated in software may hang.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Checks the host, and remembers the last result.
#[derive(Debug)]
pub struct Probe {
    vmm: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
    modules: PathBuf,
    last: Mutex<Option<(Instant, Result<(), Problem>)>>,
}

impl Probe {
    pub fn new(vmm: PathBuf, kernel: PathBuf, initramfs: PathBuf, modules: PathBuf) -> Self {
        Self {
            vmm,
            kernel,
            initramfs,
            modules,
            last: Mutex::new(None),
        }
    }

    /// Whether pods can run here.
    pub async fn ready(&self) -> Result<(), Problem> {
        self.files()?;
        let mut last = self.last.lock().await;
        match &*last {
            Some((_, Ok(()))) => return Ok(()),
            Some((when, bad)) if when.elapsed() < BAD_ANSWER => return bad.clone(),
            _ => {}
        }
        let answer = self.kvm().await;
        *last = Some((Instant::now(), answer.clone()));
        answer
    }

    /// Whether the guest's kernel, initramfs and modules can be read.
    pub fn files(&self) -> Result<(), Problem> {
        readable("kernel", &self.kernel)?;
        readable("initramfs", &self.initramfs)?;
        readable("modules", &self.modules)
    }

    /// Runs the probe, whatever the last result was.
    pub async fn kvm(&self) -> Result<(), Problem> {
        let mut command = Command::new(&self.vmm);
        command
            .args(["probe", "--json"])
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = match tokio::time::timeout(TIMEOUT, command.output()).await {
            Ok(Ok(output)) => output,
            Ok(Err(e)) => {
                let vmm = self.vmm.display();
                return Err(Problem::new(
                    format!("cannot run {vmm}: {e}"),
                    "set `vmm` in the configuration",
                ));
            }
            Err(_) => {
                return Err(Problem::new(
                    format!(
                        "the probe guest did not end within {TIMEOUT:?}: KVM hangs on this host"
                    ),
                    "use a host with hardware virtualization",
                ));
            }
        };
        if output.status.success() {
            return Ok(());
        }
        Err(match serde_json::from_slice::<Verdict>(&output.stdout) {
            Ok(verdict) => Problem::new(
                format!("KVM cannot run guests here: {}", verdict.cause),
                verdict.remedy,
            ),
            Err(_) => {
                let said = String::from_utf8_lossy(&output.stderr)
                    .trim()
                    .replace('\n', "; ");
                let cause = format!(
                    "{} probe ended with {}: {said}",
                    self.vmm.display(),
                    output.status
                );
                Problem::new(
                    cause,
                    "set `vmm` in the configuration to a bulkhead-vmm of this version",
                )
            }
        })
    }
}

fn readable(what: &str, path: &Path) -> Result<(), Problem> {
    std::fs::File::open(path).map(drop).map_err(|e| {
        let remedy = match e.kind() {
            io::ErrorKind::NotFound => {
                format!("build it with scripts/build, or set `{what}` in the configuration")
            }
            io::ErrorKind::PermissionDenied => "let the daemon's user read it".to_owned(),
            _ => "see what the error says about this host, and try again".to_owned(),
        };
        Problem::new(format!("guest {what} {}: {e}", path.display()), remedy)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_file_is_named_with_a_remedy() {
        let probe = Probe::new(
            "/bin/true".into(),
            "/no/such/vmlinux".into(),
            "/dev/null".into(),
            "/dev/null".into(),
        );
        let said = probe.ready().await.unwrap_err().to_string();
        assert!(
            said.contains("/no/such/vmlinux") && said.contains("scripts/build"),
            "{said}"
        );
    }

    #[tokio::test]
    async fn the_programs_exit_status_decides() {
        let good = Probe::new(
            "/bin/true".into(),
            "/dev/null".into(),
            "/dev/null".into(),
            "/dev/null".into(),
        );
        assert_eq!(good.ready().await, Ok(()));
        let bad = Probe::new(
            "/bin/false".into(),
            "/dev/null".into(),
            "/dev/null".into(),
            "/dev/null".into(),
        );
        assert!(bad.ready().await.is_err());
        let missing = Probe::new(
            "/no/vmm".into(),
            "/dev/null".into(),
            "/dev/null".into(),
            "/dev/null".into(),
        );
        assert!(missing.ready().await.unwrap_err().cause.contains("/no/vmm"));
    }
}
