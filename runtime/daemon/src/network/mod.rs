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
//! The configuration directory is read on every use. A pod keeps the configuration that it was attached with.

mod attached;
mod bandwidth;
mod cni;
mod counters;
mod interface;
mod leftovers;
mod netns;
mod ranges;
mod ready;
#[allow(unsafe_code)]
mod sys;
mod tap;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_text::chain;
use serde::{Deserialize, Serialize};
use tokio::sync::RwLock;

use self::cni::{Invocation, KnownVersions, Plugins, Selection};

use self::attached::AttachedRecord;
pub use self::attached::NetworkRecord;
pub use self::cni::CniError;
pub use self::counters::{Counters, Direction};
use self::interface::Interface;
pub use self::ranges::check as subnets;

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
    /// For one command of one plugin.
    pub plugin_timeout: Duration,
    /// Subnets for plugins with the capability `ipRanges`; empty: those that kubelet tells.
    pub ip_ranges: Vec<String>,
}

/// An error in a pod's network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("CNI")]
    Cni(#[from] CniError),
    #[error("there is no valid CNI configuration")]
    NoneValid(#[source] CniError),
    #[error("annotation {annotation} is {value:?}, not a number of bits a second from 1k to 1P")]
    Bandwidth {
        annotation: &'static str,
        value: String,
    },
    #[error("{0:?} is not a subnet")]
    Subnet(String),
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
    pub annotations: BTreeMap<String, String>,
    /// What the pod says, if it does.
    pub dns: Option<Dns>,
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
    /// With their prefix lengths, the primary one first: "10.88.0.5/16".
    pub addresses: Vec<String>,
    /// In the order in which they are to be made.
    pub routes: Vec<Route>,
    pub neighbors: Vec<Neighbor>,
    pub dns: Dns,
}

/// A route of the pod; 0 and empty: not said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// CIDR.
    pub destination: String,
    /// Empty: on link.
    pub gateway: String,
    /// The source address that it prefers.
    pub source: String,
    pub priority: u32,
    pub mtu: u32,
    /// The largest TCP segment that is advertised.
    pub advmss: u32,
}

/// A neighbour whose address on the link is known without asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbor {
    pub address: String,
    pub mac: [u8; 6],
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// The networks of this daemon's pods.
#[derive(Debug)]
pub struct Network {
    config: NetworkConfig,
    versions: KnownVersions,
    /// Attaching reads it; collecting garbage, which must not meet an attachment that it does not know, writes it.
    gate: Arc<RwLock<()>>,
    status: ready::LastStatus,
    leftovers: leftovers::Leftovers,
    /// What `CHECK` said of adopted pods, by their ids; empty: all is well.
    checks: Mutex<HashMap<String, String>>,
}

impl NetworkConfig {
    fn plugins(&self) -> Plugins<'_> {
        Plugins {
            directories: &self.bin_dirs,
            limit: self.plugin_timeout,
        }
    }
}

impl Network {
    pub fn new(config: &NetworkConfig) -> Result<Self, NetworkError> {
        for directory in [&config.cache_dir, &config.netns_dir] {
            std::fs::create_dir_all(directory).map_err(file_error("make", directory))?;
        }
        Ok(Self {
            config: config.clone(),
            versions: KnownVersions::default(),
            gate: Arc::default(),
            status: ready::LastStatus::default(),
            leftovers: leftovers::Leftovers::default(),
            checks: Mutex::default(),
        })
    }

    /// Makes a pod's network, or none of it.
    pub async fn attach(&self, request: AttachRequest) -> Result<Attachment, NetworkError> {
        let _passed = self.gate.read().await;
        let mut selection = Selection::look(&self.config.conf_dir)?;
        self.status.tell_skipped(&selection.skipped);
        let Some(mut conflist) = selection.network else {
            return match selection.skipped.pop() {
                None => Ok(loopback_only(request.pod_id)),
                Some(why) => Err(NetworkError::NoneValid(why)),
            };
        };
        conflist
            .settle(&self.versions, &self.config.plugins())
            .await?;
        let netns = self.config.netns_dir.join(&request.pod_id);
        let invocation = Invocation::new(&request, &self.ip_ranges(), &netns)?;
        let mut record = NetworkRecord {
            pod_id: request.pod_id,
            attached: Some(AttachedRecord {
                invocation,
                netns,
                conflist,
                result: None,
            }),
        };
        // First the record: whoever finds the namespace knows how to take it down.
        self.remember(&record)?;
        match self.attach_recorded(&mut record).await {
            Ok(attachment) => Ok(attachment),
            Err(error) => {
                if let Err(undo) = self.detach(&record).await {
                    self.leftovers.add(record, &undo);
                }
                Err(error)
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
            .add(&attached.invocation, &self.config.plugins())
            .await?;
        attached.result = Some(result.text.clone());
        if !result.others.is_empty() {
            tracing::warn!(
                pod = record.pod_id,
                "a VM has one interface, {INTERFACE}; CNI also made {}, which the pod does not see",
                result.others.join(", ")
            );
        }
        let joined = tap::join(&attached.netns, INTERFACE).await?;
        self.remember(record)?;
        let Interface {
            addresses,
            routes,
            neighbors,
        } = joined.interface.complete(&result.addresses, &result.routes);
        Ok(Attachment {
            record: record.clone(),
            tap: Some(joined.tap),
            mac: joined.mac,
            mtu: joined.mtu,
            addresses,
            routes,
            neighbors,
            dns: result.dns,
        })
    }

    /// Takes a pod's network down; what is already gone is fine. After an error all that is left is still there, and
    /// asking again is the way on.
    pub async fn detach(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        if let Some(attached) = &record.attached {
            let netns = Some(attached.netns.as_path()).filter(|path| netns::exists(path));
            attached
                .conflist
                .delete(
                    &attached.invocation,
                    netns,
                    attached.result.as_deref(),
                    &self.config.plugins(),
                )
                .await?;
            netns::remove(&attached.netns).await?;
        }
        self.checks().remove(&record.pod_id);
        let path = self.record_path(&record.pod_id);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(file_error("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    /// Asks the plugins whether a pod's network is still as they made it, and keeps the answer.
    pub async fn check(&self, record: &NetworkRecord) {
        let Some(attached) = &record.attached else {
            return;
        };
        let plugins = self.config.plugins();
        let result = attached.result.as_deref();
        let checked = attached
            .conflist
            .check(&attached.invocation, result, &plugins);
        let answer = match checked.await {
            Ok(()) => String::new(),
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(pod = record.pod_id, "its network is not as it was: {error}");
                error
            }
        };
        self.checks().insert(record.pod_id.clone(), answer);
    }

    /// What `inspectp` shows of a pod's network.
    pub fn describe(&self, record: &NetworkRecord) -> serde_json::Value {
        let mut shown = record.describe();
        if let (Some(shown), Some(answer)) = (
            shown.as_object_mut(),
            self.checks().get(&record.pod_id).cloned(),
        ) {
            let answer = if answer.is_empty() {
                "ok".to_owned()
            } else {
                answer
            };
            shown.insert("check".to_owned(), answer.into());
        }
        shown
    }

    fn checks(&self) -> std::sync::MutexGuard<'_, HashMap<String, String>> {
        self.checks.lock().unwrap_or_else(PoisonError::into_inner)
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
        neighbors: Vec::new(),
        dns: Dns::default(),
    }
}

fn file_error(step: &'static str, path: &Path) -> impl Fn(io::Error) -> NetworkError + use<> {
    let path = path.to_owned();
    move |source| NetworkError::File {
        step,
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests;
