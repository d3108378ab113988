// SPDX-License-Identifier: Apache-2.0
//! Decides whether pods get an address, for CRI's condition `NetworkReady`. That depends on the configuration directory
//! and, with CNI 1.1, on the `STATUS` of the plugins.

use std::time::{Duration, Instant};

use bulkhead_text::{Problem, chain};

use crate::cni::{CniError, Conflist, KnownVersions, Plugins, Selection};
use crate::config::NetworkConfig;
use crate::network::Network;
use crate::status::{Said, list};

/// How long a result of `STATUS` is used again, because kubelet asks every few seconds.
const FRESH: Duration = Duration::from_secs(5);
/// How long a plugin may take for `STATUS`.
const STATUS: Duration = Duration::from_secs(5);

impl NetworkConfig {
    /// Whether there is a network and its plugins are ready. Pods without a network have only loopback.
    pub async fn ready(&self) -> Result<(), Problem> {
        let (conflist, _) = self.chosen()?;
        self.plugins_ready(conflist, &KnownVersions::default())
            .await
    }

    /// The network, and the errors of files that were skipped for it. The error says why there is none.
    fn chosen(&self) -> Result<(Conflist, Vec<CniError>), Problem> {
        let conf_dir = self.conf_dir.display();
        let mend = || format!("correct the files in {conf_dir}");
        let selection =
            Selection::look(&self.conf_dir).map_err(|e| Problem::new(chain(&e), mend()))?;
        let Some(conflist) = selection.network else {
            if selection.skipped.is_empty() {
                return Err(Problem::new(
                    format!("no CNI configuration in {conf_dir}"),
                    "put one there, for example a bridge with host-local addresses",
                ));
            }
            return Err(Problem::new(list(&selection.skipped), mend()));
        };
        let Some(name) = conflist.missing_plugin(&self.bin_dirs) else {
            return Ok((conflist, selection.skipped));
        };
        let directories = self.bin_dirs.iter().map(|path| path.display().to_string());
        Err(Problem::new(
            format!(
                "CNI plugin {name} is in none of {}",
                directories.collect::<Vec<_>>().join(", ")
            ),
            "install containernetworking-plugins",
        ))
    }

    /// Chooses the version of the protocol and runs `STATUS`.
    async fn plugins_ready(
        &self,
        mut conflist: Conflist,
        versions: &KnownVersions,
    ) -> Result<(), Problem> {
        let plugins = Plugins {
            limit: self.plugin_timeout.min(STATUS),
            ..self.plugins()
        };
        let asked = async {
            conflist.settle(versions, &plugins).await?;
            conflist.status(&plugins).await
        };
        asked.await.map_err(|e| {
            Problem::new(
                chain(&e),
                "solve what the plugin reports; the node then becomes ready by itself",
            )
        })
    }
}

impl Network {
    /// Whether pods get an address. The text is a remark about files that were skipped, else empty.
    pub async fn ready(&self) -> Result<String, Problem> {
        let (conflist, skipped) = self.config.chosen()?;
        self.status.tell_skipped(&skipped);
        let mut said = self.status.said.lock().await;
        let fresh = said
            .as_ref()
            .filter(|said| said.at.elapsed() < FRESH && said.conflist == conflist);
        let answer = match fresh {
            Some(said) => said.answer.clone(),
            None => {
                let asked = self.config.plugins_ready(conflist.clone(), &self.versions);
                let answer = asked.await;
                *said = Some(Said {
                    at: Instant::now(),
                    conflist,
                    answer: answer.clone(),
                });
                answer
            }
        };
        let remark = list(&skipped);
        answer.map(|()| match remark.is_empty() {
            true => remark,
            false => format!("skipped {remark}"),
        })
    }
}
