// SPDX-License-Identifier: Apache-2.0
//! Where CNI's things are, as the daemon's configuration says.

use std::path::PathBuf;
use std::time::Duration;

use crate::cni::Plugins;

/// Where CNI's things are.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    pub conf_dir: PathBuf,
    pub bin_dirs: Vec<PathBuf>,
    /// Records of attached networks, one file a pod.
    pub cache_dir: PathBuf,
    /// Where the pods' namespaces are mounted.
    pub netns_dir: PathBuf,
    /// For one command of one plugin.
    pub plugin_timeout: Duration,
    /// Subnets for plugins with the capability `ipRanges`; empty: those that kubelet tells.
    pub ip_ranges: Vec<String>,
}

impl NetworkConfig {
    pub(crate) fn plugins(&self) -> Plugins<'_> {
        Plugins {
            directories: &self.bin_dirs,
            limit: self.plugin_timeout,
        }
    }
}
