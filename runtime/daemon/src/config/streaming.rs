// SPDX-License-Identifier: Apache-2.0
//! The configuration of the streaming server.

use std::net::IpAddr;
use std::path::PathBuf;

/// The address on which the server listens, and its TLS files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamingConfig {
    pub address: IpAddr,
    /// 0 means any free port.
    pub port: u16,
    pub tls: Option<TlsFiles>,
}

/// Files in PEM format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// The authorities whose certificates clients must have. `None`: the token is enough.
    pub client_ca: Option<PathBuf>,
}
