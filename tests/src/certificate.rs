// SPDX-License-Identifier: Apache-2.0
//! A self-signed certificate for 127.0.0.1, for TLS servers in tests.

use std::path::PathBuf;
use std::process::Command;

/// `certificate.pem` and `key.pem` in a temporary directory.
#[derive(Debug)]
pub struct Certificate(tempfile::TempDir);

impl Certificate {
    pub fn make() -> Self {
        let made = Self(tempfile::tempdir().expect("a directory"));
        let output = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "1"])
            .args(["-pkeyopt", "ec_paramgen_curve:P-256"])
            .args(["-subj", "/CN=bulkhead"])
            .args(["-addext", "subjectAltName=IP:127.0.0.1"])
            // rustls rejects a server certificate that is a CA.
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .arg("-keyout")
            .arg(made.path("key.pem"))
            .arg("-out")
            .arg(made.path("certificate.pem"))
            .output()
            .expect("run openssl");
        assert!(output.status.success(), "{output:?}");
        made
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}
