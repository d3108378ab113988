// SPDX-License-Identifier: Apache-2.0
//! The configuration of pod networks.

use std::path::PathBuf;
use std::time::Duration;

use crate::cni::Plugins;

/// The directories and limits of CNI, from the daemon's configuration.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    pub conf_dir: PathBuf,
    pub bin_dirs: Vec<PathBuf>,
    /// For the records of attached networks, one file for each pod.
    pub cache_dir: PathBuf,
    /// The directory in which the pods' namespaces are mounted.
    pub netns_dir: PathBuf,
    /// How long one command of one plugin may take.
    pub plugin_timeout: Duration,
    /// Subnets for plugins with the capability `ipRanges`. If it is empty, those from kubelet are used.
    pub ip_ranges: Vec<String>,
    /// Whether plugins may be asked for a network before its pod is known: then they learn neither name nor namespace of it.
    pub in_advance: bool,
}

impl NetworkConfig {
    pub(crate) fn plugins(&self) -> Plugins<'_> {
        Plugins {
            directories: &self.bin_dirs,
            limit: self.plugin_timeout,
        }
    }
}
