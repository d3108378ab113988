// SPDX-License-Identifier: Apache-2.0
//! The configuration of the store.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::reference::Reference;

/// How the store works.
#[derive(Clone, Debug)]
pub struct Config {
    /// The directory with all files of the store. Nobody else writes there.
    pub root: PathBuf,
    /// Settings by host name as in a reference (`docker.io`, `127.0.0.1:5000`). Other hosts get the defaults.
    pub registries: BTreeMap<String, HostConfig>,
    /// How many layers of one image may be downloaded at once.
    pub max_parallel_layers: usize,
    /// How many layers may be downloaded at once from one host, over all pulls. There is no such number for all hosts
    /// together: one that is slow would take the places of all others.
    pub max_parallel_layers_per_host: usize,
    /// A registry that sends nothing for this long is given up.
    pub stall_timeout: Duration,
    /// A registry that is slower on average is given up.
    pub min_bytes_per_second: u64,
    /// The most bytes that the layers of an image may have together when they are unpacked.
    pub max_image_bytes: u64,
    /// A pull ends when its file system has fewer free bytes.
    pub keep_free_bytes: u64,
    /// Images that must not be garbage-collected. They are reported as pinned.
    pub pinned: Vec<Reference>,
}

impl Config {
    /// The file with the records of images.
    pub fn records(&self) -> PathBuf {
        self.root.join("images.redb")
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: PathBuf::new(),
            registries: BTreeMap::new(),
            max_parallel_layers: 3,
            max_parallel_layers_per_host: 6,
            stall_timeout: Duration::from_secs(60),
            min_bytes_per_second: 16 << 10,
            max_image_bytes: 128 << 30,
            keep_free_bytes: 256 << 20,
            pinned: Vec::new(),
        }
    }
}

/// How to talk to one registry.
#[derive(Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostConfig {
    /// Use HTTP without TLS.
    pub plain_http: bool,
    /// Hosts, with an optional port, to ask first, in order. The settings of each are under its own name.
    pub mirrors: Vec<String>,
    /// PEM certificates to trust in addition to the system's.
    pub ca_file: Option<PathBuf>,
    /// Accept any TLS certificate.
    pub skip_verify: bool,
    /// Used when a pull request has no credentials of its own.
    pub username: Option<String>,
    pub password: Option<String>,
}

impl fmt::Debug for HostConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostConfig")
            .field("plain_http", &self.plain_http)
            .field("mirrors", &self.mirrors)
            .field("ca_file", &self.ca_file)
            .field("skip_verify", &self.skip_verify)
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// The credentials of a pull. Their `Debug` shows no secret.
#[derive(Clone)]
pub enum Credentials {
    Basic {
        username: String,
        password: String,
    },
    /// A token for the registry itself, sent as it is.
    Bearer(String),
    /// A refresh token. The token server exchanges it for a token of the registry (OAuth 2.0, RFC 6749 section 6).
    Identity(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Basic { username, .. } => write!(f, "Basic({username:?})"),
            Self::Bearer(_) => f.write_str("Bearer"),
            Self::Identity(_) => f.write_str("Identity"),
        }
    }
}
