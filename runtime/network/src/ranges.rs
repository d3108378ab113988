// SPDX-License-Identifier: Apache-2.0
//! The subnets of this node, for plugins with the capability `ipRanges`. They come from the configuration or, if it has
//! none, from kubelet (CRI `UpdateRuntimeConfig`). kubelet sends them only once, so they are kept in a file.

use std::path::PathBuf;

use crate::config::NetworkConfig;
use crate::failure::NetworkError;
use crate::link::is_cidr;
use crate::record::replace;

const FILE: &str = "pod-cidr";
const MOST: usize = 16;

/// Checks that all items of a list are subnets, and that there are not too many. Returns the list unchanged.
pub fn check(subnets: &[String]) -> Result<Vec<String>, NetworkError> {
    let mut numbered = subnets.iter().enumerate();
    match numbered.find(|(number, subnet)| *number >= MOST || !is_cidr(subnet)) {
        Some((_, subnet)) => Err(NetworkError::Subnet(subnet.chars().take(64).collect())),
        None => Ok(subnets.to_vec()),
    }
}

/// Parses subnets with commas between them, which is kubelet's format.
fn parse(text: &str) -> Result<Vec<String>, NetworkError> {
    let subnets = text
        .split(',')
        .map(str::trim)
        .filter(|subnet| !subnet.is_empty());
    check(&subnets.map(str::to_owned).collect::<Vec<_>>())
}

/// The subnets for addresses of pods.
#[derive(Debug)]
pub struct Ranges {
    /// The subnets in the configuration. If it is empty, kubelet decides.
    configured: Vec<String>,
    /// Keeps the last subnets from kubelet.
    file: PathBuf,
}

impl Ranges {
    pub fn new(config: &NetworkConfig) -> Self {
        Self {
            configured: config.ip_ranges.clone(),
            file: config.cache_dir.join(FILE),
        }
    }

    /// Stores subnets from kubelet.
    pub fn set(&self, text: &str) -> Result<(), NetworkError> {
        replace(&self.file, parse(text)?.join(",").as_bytes())
    }

    /// The subnets that apply now.
    pub fn now(&self) -> Vec<String> {
        if !self.configured.is_empty() {
            return self.configured.clone();
        }
        let told = std::fs::read_to_string(&self.file).unwrap_or_default();
        parse(&told).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_are_checked_one_by_one() {
        assert_eq!(
            parse("10.1.0.0/24, fd00::/64,").unwrap(),
            ["10.1.0.0/24", "fd00::/64"]
        );
        assert!(parse("").unwrap().is_empty());
        for wrong in ["10.1.0.0", "10.1.0.0/33", "x/8", "10.1.0.0/24;10.2.0.0/24"] {
            assert!(
                matches!(parse(wrong), Err(NetworkError::Subnet(_))),
                "{wrong}"
            );
        }
        assert!(parse(&"10.0.0.0/8,".repeat(MOST + 1)).is_err());
    }

    #[test]
    fn kubelets_subnets_are_kept_unless_the_configuration_has_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE);
        let ranges = |configured: &[&str]| Ranges {
            configured: configured.iter().map(|&one| one.to_owned()).collect(),
            file: file.clone(),
        };
        assert!(ranges(&[]).now().is_empty());
        ranges(&[]).set("10.1.0.0/24,fd00::/64").unwrap();
        assert!(ranges(&[]).set("nonsense").is_err());
        assert_eq!(ranges(&[]).now(), ["10.1.0.0/24", "fd00::/64"]);
        assert_eq!(ranges(&["10.7.0.0/24"]).now(), ["10.7.0.0/24"]);
    }
}
