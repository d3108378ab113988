// SPDX-License-Identifier: Apache-2.0
//! What the configuration says of the streaming server.

use std::net::IpAddr;
use std::path::PathBuf;

/// Where the server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamingConfig {
    pub address: IpAddr,
    /// 0: any free one.
    pub port: u16,
    pub tls: Option<TlsFiles>,
}

/// In PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
}
