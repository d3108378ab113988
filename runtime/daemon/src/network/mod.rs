// SPDX-License-Identifier: Apache-2.0
//! A pod's network: a network namespace, what CNI puts into it, and a TAP that the guest sees instead.
//!
//! CNI plugins know nothing of VMs: they make an interface in a namespace and give it addresses. We join that
//! interface to a TAP with tc redirects, both ways, below the namespace's own network stack, and tell the guest the
//! MAC, addresses, routes and MTU. So any plugin works unchanged.
//!
//! ```text
//! bridge ── veth ──[ eth0 ── tc redirect ── tap0 ]── bulkhead-vmm ── guest's eth0
//!                  └── namespace of the pod ────┘
//! ```

mod cni;
mod counters;
mod netns;
#[allow(unsafe_code)]
mod sys;
mod tap;

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::cni::{Conflist, Invocation};
use crate::problem::Problem;

pub use self::cni::CniError;
pub use self::counters::{Counters, Direction};

/// CNI's name of the interface in the namespace.
const INTERFACE: &str = "eth0";
/// A guest without a network still has a network device, and that a MAC.
const NO_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
const DEFAULT_MTU: u16 = 1500;

/// Where CNI's things are.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    pub conf_dir: PathBuf,
    pub bin_dirs: Vec<PathBuf>,
    /// Records of attached networks, one file a pod.
    pub cache_dir: PathBuf,
    /// Where the pods' namespaces are mounted.
    pub netns_dir: PathBuf,
    pub plugin_timeout: Duration,
}

impl NetworkConfig {
    /// Whether there is a network, and its plugins. Without, pods have loopback only.
    pub fn ready(&self) -> Result<(), Problem> {
        let conf_dir = self.conf_dir.display();
        let loaded = Conflist::load(&self.conf_dir);
        let loaded = loaded
            .map_err(|e| Problem::new(crate::chain(&e), format!("mend the files in {conf_dir}")))?;
        let Some(conflist) = loaded else {
            return Err(Problem::new(
                format!("no CNI configuration in {conf_dir}"),
                "put one there, for example a bridge with host-local addresses",
            ));
        };
        let Some(name) = conflist.missing_plugin(&self.bin_dirs) else {
            return Ok(());
        };
        let directories: Vec<_> = self
            .bin_dirs
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        Err(Problem::new(
            format!("CNI plugin {name} is in none of {}", directories.join(", ")),
            "install containernetworking-plugins",
        ))
    }
}

/// An error in a pod's network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("CNI")]
    Cni(#[from] CniError),
    #[error("network namespace {path}: {step}")]
    Namespace {
        path: PathBuf,
        step: &'static str,
        source: io::Error,
    },
    #[error("network device of the pod: {step}")]
    Device {
        step: &'static str,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{step} {path}")]
    File {
        step: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// Who wants a network, in the words that CNI's plugins understand.
#[derive(Clone, Debug, Default)]
pub struct AttachRequest {
    pub pod_id: String,
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub port_mappings: Vec<PortMapping>,
}

/// A port of the host that leads into the pod (CRI `PodSandboxConfig.port_mappings`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    pub protocol: Protocol,
    pub container_port: u16,
    pub host_port: u16,
    #[serde(rename = "hostIP")]
    pub host_ip: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// What the guest is to be told, and what the VMM needs.
#[derive(Debug)]
pub struct Attachment {
    pub record: NetworkRecord,
    /// `None`: loopback only.
    pub tap: Option<OwnedFd>,
    pub mac: [u8; 6],
    pub mtu: u16,
    /// With their prefix lengths: "10.88.0.5/16".
    pub addresses: Vec<String>,
    /// (destination, gateway); an empty gateway is on link.
    pub routes: Vec<(String, String)>,
    pub dns: Dns,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// All that is needed to take a pod's network down, whatever the configuration says by then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    pod_id: String,
    /// `None`: nothing was made.
    attached: Option<AttachedRecord>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct AttachedRecord {
    netns: PathBuf,
    conflist: Conflist,
    invocation: Invocation,
    /// CNI's result, JSON.
    result: Option<String>,
}

/// The networks of this daemon's pods.
#[derive(Debug)]
pub struct Network {
    config: NetworkConfig,
}

impl Network {
    pub fn new(config: &NetworkConfig) -> Result<Self, NetworkError> {
        for directory in [&config.cache_dir, &config.netns_dir] {
            std::fs::create_dir_all(directory).map_err(file_error("make", directory))?;
        }
        Ok(Self {
            config: config.clone(),
        })
    }

    /// Whether pods get an address. Follows the configuration directory.
    pub fn ready(&self) -> Result<(), Problem> {
        self.config.ready()
    }

    /// Makes a pod's network, or none of it.
    pub async fn attach(&self, request: AttachRequest) -> Result<Attachment, NetworkError> {
        let pod_id = request.pod_id.clone();
        let Some(conflist) = Conflist::load(&self.config.conf_dir)? else {
            return Ok(loopback_only(pod_id));
        };
        let netns = self.config.netns_dir.join(&pod_id);
        let mut record = NetworkRecord {
            pod_id,
            attached: Some(AttachedRecord {
                invocation: Invocation::new(&request, &netns),
                netns,
                conflist,
                result: None,
            }),
        };
        // First the record: whoever finds the namespace knows how to take it down.
        self.remember(&record)?;
        match self.attach_recorded(&mut record).await {
            Ok(attachment) => Ok(attachment),
            Err(e) => {
                if let Err(undo) = self.detach(&record).await {
                    tracing::warn!(
                        "pod {}: network left over: {}",
                        record.pod_id,
                        crate::chain(&undo)
                    );
                }
                Err(e)
            }
        }
    }

    async fn attach_recorded(
        &self,
        record: &mut NetworkRecord,
    ) -> Result<Attachment, NetworkError> {
        let Some(attached) = &mut record.attached else {
            return Ok(loopback_only(record.pod_id.clone()));
        };
        netns::create(&attached.netns).await?;
        let result = attached
            .conflist
            .add(&attached.invocation, &self.plugins())
            .await?;
        attached.result = Some(result.text.clone());
        let joined = tap::join(&attached.netns, INTERFACE).await?;
        self.remember(record)?;
        Ok(Attachment {
            record: record.clone(),
            tap: Some(joined.tap),
            mac: joined.mac,
            mtu: joined.mtu,
            addresses: result.addresses,
            routes: result.routes,
            dns: result.dns,
        })
    }

    /// Takes a pod's network down; what is already gone is fine.
    pub async fn detach(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        if let Some(attached) = &record.attached {
            let result = attached.result.as_deref();
            let deleted = attached
                .conflist
                .delete(&attached.invocation, result, &self.plugins())
                .await;
            // The namespace goes in any case: with it go the interfaces.
            netns::remove(&attached.netns).await?;
            deleted?;
        }
        let path = self.record_path(&record.pod_id);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(file_error("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    /// Takes down the networks of pods that are no more. Touches only what this daemon recorded.
    pub async fn sweep(&self, live_pods: &HashSet<String>) {
        let Ok(entries) = std::fs::read_dir(&self.config.cache_dir) else {
            return;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            let record = std::fs::read(&path)
                .ok()
                .and_then(|bytes| serde_json::from_slice::<NetworkRecord>(&bytes).ok());
            let Some(record) = record.filter(|record| !live_pods.contains(&record.pod_id)) else {
                continue;
            };
            tracing::info!(
                "network of pod {}, which is no more: taken down",
                record.pod_id
            );
            if let Err(e) = self.detach(&record).await {
                tracing::warn!("network of pod {}: {}", record.pod_id, crate::chain(&e));
            }
        }
    }

    fn plugins(&self) -> cni::Plugins<'_> {
        cni::Plugins {
            directories: &self.config.bin_dirs,
            timeout: self.config.plugin_timeout,
        }
    }

    fn record_path(&self, pod_id: &str) -> PathBuf {
        self.config.cache_dir.join(format!("{pod_id}.json"))
    }

    fn remember(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        let path = self.record_path(&record.pod_id);
        let failed = file_error("write", &path);
        let text = serde_json::to_vec(record).map_err(|e| failed(e.into()))?;
        let temporary = path.with_extension("new");
        std::fs::write(&temporary, text).map_err(file_error("write", &temporary))?;
        std::fs::rename(&temporary, &path).map_err(failed)
    }
}

fn loopback_only(pod_id: String) -> Attachment {
    Attachment {
        record: NetworkRecord {
            pod_id,
            attached: None,
        },
        tap: None,
        mac: NO_MAC,
        mtu: DEFAULT_MTU,
        addresses: Vec::new(),
        routes: Vec::new(),
        dns: Dns::default(),
    }
}

fn file_error(
    step: &'static str,
    path: &std::path::Path,
) -> impl Fn(io::Error) -> NetworkError + use<> {
    let path = path.to_owned();
    move |source| NetworkError::File {
        step,
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(directory: &std::path::Path) -> Network {
        Network::new(&NetworkConfig {
            conf_dir: directory.join("conf"),
            bin_dirs: vec![directory.join("bin")],
            cache_dir: directory.join("cache"),
            netns_dir: directory.join("netns"),
            plugin_timeout: Duration::from_secs(5),
        })
        .unwrap()
    }

    #[tokio::test]
    async fn without_a_configuration_there_is_loopback_only_and_readiness_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let network = network(directory.path());
        let why = network.ready().unwrap_err().cause;
        assert!(why.contains("no CNI configuration"), "{why}");
        let request = AttachRequest {
            pod_id: "p".into(),
            ..Default::default()
        };
        let attachment = network.attach(request).await.unwrap();
        assert!(attachment.tap.is_none() && attachment.addresses.is_empty());
        network.detach(&attachment.record).await.unwrap();
    }

    #[test]
    fn readiness_names_a_missing_plugin() {
        let directory = tempfile::tempdir().unwrap();
        let network = network(directory.path());
        std::fs::create_dir(directory.path().join("conf")).unwrap();
        std::fs::write(
            directory.path().join("conf/1.conflist"),
            r#"{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"nosuch"}]}"#,
        )
        .unwrap();
        let why = network.ready().unwrap_err().cause;
        assert!(why.contains("nosuch"), "{why}");
    }

    #[test]
    fn port_mappings_are_written_as_the_portmap_plugin_reads_them() {
        let mapping = PortMapping {
            protocol: Protocol::Tcp,
            container_port: 80,
            host_port: 8080,
            host_ip: "127.0.0.1".into(),
        };
        assert_eq!(
            serde_json::to_string(&mapping).unwrap(),
            r#"{"protocol":"tcp","containerPort":80,"hostPort":8080,"hostIP":"127.0.0.1"}"#
        );
    }
}
