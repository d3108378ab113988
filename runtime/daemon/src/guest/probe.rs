// SPDX-License-Identifier: Apache-2.0
//! Whether this host can run VMs: asked of `bulkhead-vmm probe`, which runs a few instructions in a guest.
//!
//! A good answer is kept; a bad one is asked for again once it is old, so that the daemon recovers without a restart.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::process::Command;
use tokio::sync::Mutex;

/// How long a bad answer stands.
const BAD_ANSWER: Duration = Duration::from_secs(15);
/// A software KVM may hang on the probe guest.
const TIMEOUT: Duration = Duration::from_secs(20);

/// The answer to "can this host run VMs?", with its memory.
#[derive(Debug)]
pub struct Probe {
    vmm: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
    last: Mutex<Option<(Instant, Result<(), String>)>>,
}

impl Probe {
    pub fn new(vmm: PathBuf, kernel: PathBuf, initramfs: PathBuf) -> Self {
        Self {
            vmm,
            kernel,
            initramfs,
            last: Mutex::new(None),
        }
    }

    /// `Err` says in one sentence why pods cannot run and what to do.
    pub async fn ready(&self) -> Result<(), String> {
        for (what, path) in [("kernel", &self.kernel), ("initramfs", &self.initramfs)] {
            readable(what, path)?;
        }
        let mut last = self.last.lock().await;
        match &*last {
            Some((_, Ok(()))) => return Ok(()),
            Some((when, bad)) if when.elapsed() < BAD_ANSWER => return bad.clone(),
            _ => {}
        }
        let answer = self.ask().await;
        *last = Some((Instant::now(), answer.clone()));
        answer
    }

    async fn ask(&self) -> Result<(), String> {
        let vmm = self.vmm.display();
        let mut command = Command::new(&self.vmm);
        command.arg("probe").stdin(Stdio::null()).kill_on_drop(true);
        let output = match tokio::time::timeout(TIMEOUT, command.output()).await {
            Ok(Ok(output)) => output,
            Ok(Err(e)) => return Err(format!("cannot run {vmm}: {e}; set `vmm` in the configuration")),
            Err(_) => {
                return Err(format!(
                    "the KVM of this host hung on a probe guest for {TIMEOUT:?}: use a host with hardware \
                     virtualization (`bulkhead check` says more)"
                ));
            }
        };
        if output.status.success() {
            return Ok(());
        }
        let said = [output.stderr, output.stdout].concat();
        let said = String::from_utf8_lossy(&said).trim().replace('\n', "; ");
        Err(format!("KVM cannot run guests here: {said} (`bulkhead check` says more)"))
    }
}

fn readable(what: &str, path: &Path) -> Result<(), String> {
    std::fs::File::open(path).map(drop).map_err(|e| {
        format!(
            "guest {what} {}: {e}; build it with scripts/build, or set `{what}` in the configuration",
            path.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_file_is_named_with_a_remedy() {
        let probe = Probe::new("/bin/true".into(), "/no/such/vmlinux".into(), "/dev/null".into());
        let said = probe.ready().await.unwrap_err();
        assert!(said.contains("/no/such/vmlinux") && said.contains("scripts/build"), "{said}");
    }

    #[tokio::test]
    async fn the_programs_exit_status_decides() {
        let good = Probe::new("/bin/true".into(), "/dev/null".into(), "/dev/null".into());
        assert_eq!(good.ready().await, Ok(()));
        let bad = Probe::new("/bin/false".into(), "/dev/null".into(), "/dev/null".into());
        assert!(bad.ready().await.is_err());
        let missing = Probe::new("/no/vmm".into(), "/dev/null".into(), "/dev/null".into());
        assert!(missing.ready().await.unwrap_err().contains("/no/vmm"));
    }
}
