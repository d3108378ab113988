// SPDX-License-Identifier: Apache-2.0
//! Makes a pod's network, tears it down, and asks plugins to check it.
//!
//! All that is needed to tear it down is written to a file before anything is made on the host.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_faults::{self as faults, Step};
use bulkhead_text::chain;
use tokio::sync::RwLock;

use crate::capabilities;
use crate::cni::{Invocation, KnownVersions, Selection};
use crate::config::NetworkConfig;
use crate::failure::{NetworkError, file_error};
use crate::interface::Interface;
use crate::leftovers::Leftovers;
use crate::link::{DEFAULT_MTU, INTERFACE, Neighbor, Route};
use crate::ranges::Ranges;
use crate::record::{AttachedRecord, NetworkRecord};
use crate::request::{AttachRequest, Dns};
use crate::status::LastStatus;
use crate::{netns, tap};

/// The MAC address of a guest without a network. It has a network device all the same.
const NO_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];

/// A pod's network: what the guest must know, and what the VMM needs.
#[derive(Debug)]
pub struct Attachment {
    pub record: NetworkRecord,
    /// `None` if the pod has only loopback.
    pub tap: Option<OwnedFd>,
    pub mac: [u8; 6],
    pub mtu: u16,
    /// With their prefix lengths, the primary one first: "10.88.0.5/16".
    pub addresses: Vec<String>,
    /// In the order in which they must be made.
    pub routes: Vec<Route>,
    pub neighbors: Vec<Neighbor>,
    pub dns: Dns,
}

impl Attachment {
    /// Whether it is a namespace with a TAP that is connected with nothing.
    pub fn is_blank(&self) -> bool {
        self.tap.is_some() && !self.record.has_interface()
    }

    /// Whether a pod for which `planned` was planned can have this network, which was made ahead.
    pub fn serves(&self, planned: &NetworkRecord) -> bool {
        if self.is_blank() {
            return planned.has_interface();
        }
        self.record.serves(planned)
    }
}

/// A network that is planned for a pod which is not known yet. The caller should store the record before it is made.
#[derive(Clone, Debug)]
pub struct Ahead {
    pub record: NetworkRecord,
    is_blank: bool,
}

/// The networks of this daemon's pods.
#[derive(Debug)]
pub struct Network {
    pub(crate) config: NetworkConfig,
    pub(crate) versions: KnownVersions,
    /// Held for reading while a pod is attached, and for writing during garbage collection, which would remove an
    /// attachment that it does not know.
    pub(crate) gate: Arc<RwLock<()>>,
    pub(crate) status: LastStatus,
    pub(crate) leftovers: Leftovers,
    ranges: Ranges,
    /// The errors of `CHECK` for adopted pods, by pod id. Empty if the check has passed.
    checks: Mutex<HashMap<String, String>>,
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
            status: LastStatus::default(),
            leftovers: Leftovers::default(),
            ranges: Ranges::new(config),
            checks: Mutex::default(),
        })
    }

    /// Plans a pod's network, but makes nothing on the host yet. The record is enough to tear down everything that
    /// [`Network::attach`] makes, so the caller should store it before attaching.
    pub async fn plan(&self, request: AttachRequest) -> Result<NetworkRecord, NetworkError> {
        let mut selection = Selection::look(&self.config.conf_dir)?;
        self.status.tell_skipped(&selection.skipped);
        let Some(mut conflist) = selection.network else {
            return match selection.skipped.pop() {
                None => Ok(NetworkRecord {
                    pod_id: request.pod_id,
                    attached: None,
                }),
                Some(why) => Err(NetworkError::NoneValid(why)),
            };
        };
        conflist
            .settle(&self.versions, &self.config.plugins())
            .await?;
        let netns = self.config.netns_dir.join(&request.pod_id);
        let capabilities = capabilities::of_request(&request, &self.ranges.now())?;
        let invocation = Invocation::new(&request, capabilities, &netns);
        Ok(NetworkRecord {
            pod_id: request.pod_id,
            attached: Some(AttachedRecord {
                invocation,
                netns,
                conflist,
                result: None,
            }),
        })
    }

    /// Plans the network of a pod that is not known yet: all of it if the configuration says that plugins may be asked then
    /// ([`NetworkConfig::in_advance`]), else a namespace with a TAP.
    pub async fn plan_ahead(&self, id: &str) -> Result<Ahead, NetworkError> {
        let request = AttachRequest {
            pod_id: id.to_owned(),
            ..Default::default()
        };
        let mut record = self.plan(request).await?;
        let is_blank = record.has_interface() && !self.config.in_advance;
        if is_blank {
            record.attached = None;
        }
        Ok(Ahead { record, is_blank })
    }

    /// Makes what [`Network::plan_ahead`] has planned. After an error, [`Network::detach`] undoes what was made.
    pub async fn make_ahead(&self, ahead: Ahead) -> Result<Attachment, NetworkError> {
        let Ahead { record, is_blank } = ahead;
        if !is_blank {
            return self.attach(record, None).await;
        }
        let path = self.namespace(&record);
        faults::around(Step::MakeNetns, netns::create(&path)).await?;
        let tap = tap::inside(&path).await?;
        Ok(Attachment {
            tap: Some(tap),
            ..loopback_only(record)
        })
    }

    /// The path of a network's namespace, whether it exists or not.
    pub fn namespace(&self, record: &NetworkRecord) -> PathBuf {
        record.netns(&self.config.netns_dir)
    }

    /// Makes a pod's network as planned; `tap` is the one of the namespace that it was planned for, if that is there already.
    /// After an error, what was made is torn down; if that fails too, it is remembered and tried again later.
    pub async fn attach(
        &self,
        mut record: NetworkRecord,
        tap: Option<OwnedFd>,
    ) -> Result<Attachment, NetworkError> {
        let _passed = self.gate.read().await;
        if record.attached.is_none() {
            return Ok(loopback_only(record));
        }
        // Write the record first, so that a later daemon can tear down what it finds.
        if let Err(error) = record.write(&self.config.cache_dir) {
            // It may be there all the same.
            let _ = record.remove(&self.config.cache_dir);
            return Err(error);
        }
        match self.attach_recorded(&mut record, tap).await {
            Ok(attachment) => Ok(attachment),
            Err(error) => {
                if let Err(undo) = self.detach(&record).await {
                    self.leftovers.add(record, &undo);
                }
                Err(error)
            }
        }
    }

    /// Makes the namespace, unless it is there with its TAP, runs the plugins and connects the TAP. After an error, the caller
    /// undoes what was made.
    async fn attach_recorded(
        &self,
        record: &mut NetworkRecord,
        tap: Option<OwnedFd>,
    ) -> Result<Attachment, NetworkError> {
        let Some(attached) = &mut record.attached else {
            return Ok(loopback_only(record.clone()));
        };
        if tap.is_none() {
            faults::around(Step::MakeNetns, netns::create(&attached.netns)).await?;
        }
        faults::before(Step::AddCni)?;
        let result = attached
            .conflist
            .add(&attached.invocation, &self.config.plugins())
            .await?;
        faults::after(Step::AddCni)?;
        attached.result = Some(result.text.clone());
        if !result.others.is_empty() {
            tracing::warn!(
                pod = record.pod_id,
                "a VM has one interface, {INTERFACE}; CNI also made {}, which the pod does not see",
                result.others.join(", ")
            );
        }
        let joining = tap::join(&attached.netns, INTERFACE, tap);
        let joined = faults::around(Step::JoinTap, joining).await?;
        record.write(&self.config.cache_dir)?;
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

    /// Tears down a pod's network. Parts that do not exist are no error. After an error, the record still exists, and
    /// the call can be repeated.
    pub async fn detach(&self, record: &NetworkRecord) -> Result<(), NetworkError> {
        if let Some(attached) = &record.attached {
            let netns = Some(attached.netns.as_path()).filter(|path| netns::exists(path));
            faults::before(Step::DeleteCni)?;
            attached
                .conflist
                .delete(
                    &attached.invocation,
                    netns,
                    attached.result.as_deref(),
                    &self.config.plugins(),
                )
                .await?;
            faults::after(Step::DeleteCni)?;
        }
        let netns = self.namespace(record);
        faults::around(Step::RemoveNetns, netns::remove(&netns)).await?;
        self.checks().remove(&record.pod_id);
        record.remove(&self.config.cache_dir)
    }

    /// Runs `CHECK`: asks the plugins whether a pod's network is still as they made it. Keeps the result for
    /// [`Network::describe`].
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
                tracing::warn!(pod = record.pod_id, "check of its network: {error}");
                error
            }
        };
        self.checks().insert(record.pod_id.clone(), answer);
    }

    /// Describes a pod's network as JSON, for `crictl inspectp`.
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

    /// Sets the subnets from kubelet. They apply to pods that are attached from now on.
    pub fn set_pod_cidr(&self, text: &str) -> Result<(), NetworkError> {
        self.ranges.set(text)
    }

    fn checks(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.checks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn loopback_only(record: NetworkRecord) -> Attachment {
    Attachment {
        record,
        tap: None,
        mac: NO_MAC,
        mtu: DEFAULT_MTU,
        addresses: Vec::new(),
        routes: Vec::new(),
        neighbors: Vec::new(),
        dns: Dns::default(),
    }
}
