// SPDX-License-Identifier: Apache-2.0
//! RPCs about the runtime itself.

use std::collections::HashMap;

use bulkhead_proto::cri;
use bulkhead_text::{Problem, chain};
use tonic::Status;

use super::codes::network_code;
use super::refusal::HANDLERS;
use crate::config::CgroupDriver;
use crate::pod::Pods;

const API_VERSION: &str = "v1";
/// The version of the `Version` messages themselves.
const KUBE_API_VERSION: &str = "0.1.0";

pub fn version() -> cri::VersionResponse {
    cri::VersionResponse {
        version: KUBE_API_VERSION.to_owned(),
        runtime_name: "bulkhead".to_owned(),
        runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
        runtime_api_version: API_VERSION.to_owned(),
    }
}

pub async fn status(pods: &Pods, verbose: bool) -> cri::StatusResponse {
    let runtime = pods.can_run().await;
    let network = pods.has_network().await;
    let handler = |name: &&str| cri::RuntimeHandler {
        name: (*name).to_owned(),
        features: Some(cri::RuntimeHandlerFeatures {
            recursive_read_only_mounts: true,
            user_namespaces: true,
        }),
    };
    let mut info = HashMap::new();
    if verbose {
        let (launcher, vm) = (pods.launcher(), pods.vm_defaults());
        let details = serde_json::json!({
            "vmm": launcher.program,
            "kernel": launcher.kernel,
            "initramfs": launcher.initramfs,
            "modules": launcher.modules,
            "sandbox": { "vcpus": vm.vcpus, "memoryMib": vm.memory_mib,
                "memoryMaxMib": vm.memory_max_mib, "scratchBytes": vm.scratch_bytes,
                "parallelBoots": pods.parallel_boots() },
            "templates": pods.templates(),
            "spares": pods.spares(),
            "warmed": pods.warmed(),
        });
        info.insert("config".to_owned(), details.to_string());
    }
    cri::StatusResponse {
        status: Some(cri::RuntimeStatus {
            conditions: vec![
                condition("RuntimeReady", "RuntimeNotReady", runtime),
                network_condition(network),
            ],
        }),
        info,
        runtime_handlers: HANDLERS.iter().map(handler).collect(),
        features: Some(cri::RuntimeFeatures {
            supplemental_groups_policy: true,
            mount_options: true,
            ..Default::default()
        }),
    }
}

/// The condition `NetworkReady`. Even if it is true it may have a message, about configuration files that are not
/// valid.
fn network_condition(ready: Result<String, Problem>) -> cri::RuntimeCondition {
    let remark = ready.as_ref().cloned().unwrap_or_default();
    let mut shown = condition("NetworkReady", "NetworkPluginNotReady", ready.map(drop));
    if shown.message.is_empty() {
        shown.message = remark;
    }
    shown
}

fn condition(name: &str, reason: &str, ready: Result<(), Problem>) -> cri::RuntimeCondition {
    cri::RuntimeCondition {
        r#type: name.to_owned(),
        status: ready.is_ok(),
        reason: if ready.is_ok() {
            String::new()
        } else {
            reason.to_owned()
        },
        message: ready
            .err()
            .map(|problem| problem.to_string())
            .unwrap_or_default(),
    }
}

/// Sets the addresses of this node's pods, for CNI plugins that take their subnets from the runtime.
pub fn set_pod_cidr(pods: &Pods, pod_cidr: &str) -> Result<(), Status> {
    let set = pods.set_pod_cidr(pod_cidr);
    set.map_err(|error| Status::new(network_code(&error), chain(&error)))?;
    tracing::info!(
        pod_cidr,
        "set the pod CIDR for CNI plugins with the capability ipRanges"
    );
    Ok(())
}

/// What kubelet asks when it starts: it uses the same cgroup driver.
pub fn runtime_config(driver: CgroupDriver) -> cri::RuntimeConfigResponse {
    let cgroup_driver = match driver {
        CgroupDriver::Systemd => cri::CgroupDriver::Systemd,
        CgroupDriver::Cgroupfs => cri::CgroupDriver::Cgroupfs,
    };
    cri::RuntimeConfigResponse {
        linux: Some(cri::LinuxRuntimeConfiguration {
            cgroup_driver: cgroup_driver.into(),
        }),
    }
}
