// SPDX-License-Identifier: Apache-2.0
//! Converts CRI's messages to our types. What the runtime cannot do is refused here with an error that names it, and
//! never ignored.

use std::collections::HashMap;

use bulkhead_proto::cri;

use super::parse_mounts::image_words;
use super::refusal::{ParseError, check_handler, wrong};
use super::{limits, parse_cdi, parse_devices, parse_mounts, parse_security};
use crate::pod::life::signal;
use crate::pod::life::spec::{ContainerSpec, Dns, Labels, PodName, PodSpec, PortMapping, Protocol};
use crate::pod::volumes::kind::is_label;
use crate::pod::warmed;

/// The longest hostname that Linux accepts.
const HOSTNAME_BYTES: usize = 64;

/// Parses the configuration in `RunPodSandbox`.
pub fn pod(config: Option<cri::PodSandboxConfig>, handler: String) -> Result<PodSpec, ParseError> {
    let config = config.ok_or(ParseError::Missing("the pod's config"))?;
    let metadata = config
        .metadata
        .ok_or(ParseError::Missing("the pod's metadata"))?;
    for (what, value) in [
        ("the pod's metadata.name", &metadata.name),
        ("the pod's metadata.namespace", &metadata.namespace),
        ("the pod's metadata.uid", &metadata.uid),
    ] {
        if value.is_empty() {
            return Err(ParseError::Missing(what));
        }
    }
    check_handler(&handler)?;
    if let Some(name) = config
        .annotations
        .get(warmed::ANNOTATION)
        .filter(|name| !is_label(name))
    {
        return Err(wrong(warmed::ANNOTATION, name));
    }
    let linux = config.linux.unwrap_or_default();
    let limits = limits::pod(&linux, &config.annotations)?;
    let context = linux.security_context.unwrap_or_default();
    parse_security::check_sandbox_user(&context)?;
    let namespaces = parse_security::namespaces(context.namespace_options)?;
    Ok(PodSpec {
        name: PodName {
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            attempt: metadata.attempt,
        },
        hostname: hostname(config.hostname)?,
        log_directory: config.log_directory,
        dns: config.dns_config.map(|dns| Dns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        port_mappings: config
            .port_mappings
            .into_iter()
            .map(port_mapping)
            .collect::<Result<_, _>>()?,
        labels: labels(config.labels),
        annotations: labels(config.annotations),
        runtime_handler: handler,
        pid: namespaces.pid,
        privileged: context.privileged,
        users: namespaces.users,
        sysctls: labels(linux.sysctls),
        limits,
    })
}

/// Parses the configuration in `CreateContainer`, without what its CDI devices add.
pub fn container(config: Option<cri::ContainerConfig>) -> Result<ContainerSpec, ParseError> {
    let config = config.ok_or(ParseError::Missing("the container's config"))?;
    let metadata = config
        .metadata
        .ok_or(ParseError::Missing("the container's metadata"))?;
    if metadata.name.is_empty() {
        return Err(ParseError::Missing("the container's metadata.name"));
    }
    let image = config.image.unwrap_or_default();
    if image.image.is_empty() {
        return Err(ParseError::Missing("the container's image"));
    }
    let image_words = image_words(image.annotations, image.runtime_handler)?;
    let stop_signal = match cri::Signal::try_from(config.stop_signal) {
        Ok(cri::Signal::RuntimeDefault) => None,
        Ok(signal) => Some(signal_number(signal)?),
        Err(_) => return Err(wrong("stop signal", config.stop_signal)),
    };
    let linux = config.linux.unwrap_or_default();
    let entry = |pair: cri::KeyValue| (pair.key, pair.value);
    let (devices, block_devices) = parse_devices::devices(config.devices)?;
    Ok(ContainerSpec {
        name: metadata.name,
        attempt: metadata.attempt,
        user_image: image.user_specified_image,
        image_words,
        image: image.image,
        command: config.command,
        args: config.args,
        working_directory: config.working_dir,
        environment: config.envs.into_iter().map(entry).collect(),
        labels: labels(config.labels),
        cdi_devices: parse_cdi::names(&config.cdi_devices, &config.annotations)?,
        annotations: labels(config.annotations),
        start_hooks: Vec::new(),
        log_path: config.log_path,
        mounts: parse_mounts::mounts(config.mounts)?,
        devices,
        block_devices,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        security: parse_security::security(linux.security_context)?,
        resources: linux.resources.map(limits::resources).unwrap_or_default(),
        stop_signal,
    })
}

fn port_mapping(mapping: cri::PortMapping) -> Result<PortMapping, ParseError> {
    let port = |value: i32| u16::try_from(value).map_err(|_| wrong("port", value));
    Ok(PortMapping {
        protocol: match mapping.protocol() {
            cri::Protocol::Tcp => Protocol::Tcp,
            cri::Protocol::Udp => Protocol::Udp,
            cri::Protocol::Sctp => Protocol::Sctp,
        },
        container_port: port(mapping.container_port)?,
        host_port: port(mapping.host_port)?,
        host_ip: mapping.host_ip,
    })
}

fn hostname(name: String) -> Result<String, ParseError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
    if name.len() > HOSTNAME_BYTES || !name.chars().all(allowed) {
        return Err(wrong("hostname", name));
    }
    Ok(name)
}

/// The number of a signal of CRI, whose name for `SIGRTMIN+3`, for example, is `SIGNAL_SIGRTMINPLUS3`.
pub fn signal_number(given: cri::Signal) -> Result<i32, ParseError> {
    let name = given.as_str_name().trim_start_matches("SIGNAL_");
    let name = name.replace("PLUS", "+").replace("MINUS", "-");
    signal::parse(&name).ok_or_else(|| wrong("stop signal", name))
}

fn labels(map: HashMap<String, String>) -> Labels {
    map.into_iter().collect()
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
