// SPDX-License-Identifier: Apache-2.0
//! The configuration file as written, with the defaults of all keys.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use serde::Deserialize;

use super::cgroup_driver::CgroupDriver;

/// The default path of the CRI socket.
pub const DEFAULT_SOCKET: &str = "/run/bulkhead/bulkhead.sock";

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawConfig {
    pub socket: PathBuf,
    pub socket_uid: Option<u32>,
    pub socket_gid: Option<u32>,
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    pub kernel: Option<PathBuf>,
    pub initramfs: Option<PathBuf>,
    pub modules: Option<PathBuf>,
    pub vmm: Option<PathBuf>,
    pub cgroup_parent: String,
    pub cgroup_driver: Option<CgroupDriver>,
    pub allow_unbounded_vms: bool,
    pub default_handler: Option<String>,
    pub host_namespaces_handler: Option<String>,
    pub runtimes: BTreeMap<String, RawRuntime>,
    pub sandbox: RawSandbox,
    pub cni: RawCni,
    pub volumes: RawVolumes,
    pub cdi: RawCdi,
    pub streaming: RawStreaming,
    pub images: RawImages,
    pub registries: BTreeMap<String, bulkhead_image::HostConfig>,
}

/// Another runtime. Its name is the table's.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawRuntime {
    pub cri: String,
    #[serde(default)]
    pub handler: String,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawSandbox {
    pub vcpus: u8,
    pub memory_mib: u32,
    pub memory_max_mib: Option<u32>,
    pub scratch_disk_gib: u64,
    pub scratch_disk_max_gib: u64,
    pub boot_timeout_seconds: u64,
    pub parallel_boots: Option<usize>,
    pub log_mib_per_second: u64,
    pub extra_cmdline: String,
    pub first_uid: u32,
    pub uids: u32,
    pub core_scheduling: bool,
    pub templates_mib: u64,
    pub templates_per_namespace: bool,
    pub spares: usize,
    pub warmed: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawCni {
    pub conf_dir: PathBuf,
    pub bin_dirs: Vec<PathBuf>,
    pub cache_dir: Option<PathBuf>,
    pub plugin_timeout_seconds: u64,
    pub ip_ranges: Vec<String>,
    pub in_advance: bool,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawVolumes {
    pub kubelet_roots: Vec<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawCdi {
    pub spec_dirs: Vec<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawStreaming {
    pub address: IpAddr,
    pub port: u16,
    pub tls_certificate: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    pub tls_client_ca: Option<PathBuf>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawImages {
    pub max_parallel_layers: usize,
    pub max_parallel_layers_per_host: usize,
    pub stall_timeout_seconds: u64,
    pub min_kib_per_second: u64,
    pub max_image_gib: u64,
    pub keep_free_mib: u64,
    pub pinned: Vec<String>,
}

impl Default for RawConfig {
    fn default() -> Self {
        Self {
            socket: DEFAULT_SOCKET.into(),
            socket_uid: None,
            socket_gid: None,
            state_dir: "/var/lib/bulkhead".into(),
            run_dir: "/run/bulkhead".into(),
            kernel: None,
            initramfs: None,
            modules: None,
            vmm: None,
            cgroup_parent: "bulkhead".to_owned(),
            cgroup_driver: None,
            allow_unbounded_vms: false,
            default_handler: None,
            host_namespaces_handler: None,
            runtimes: BTreeMap::new(),
            sandbox: RawSandbox::default(),
            cni: RawCni::default(),
            volumes: RawVolumes::default(),
            cdi: RawCdi::default(),
            streaming: RawStreaming::default(),
            images: RawImages::default(),
            registries: BTreeMap::new(),
        }
    }
}

impl Default for RawSandbox {
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory_mib: 512,
            memory_max_mib: None,
            scratch_disk_gib: 10,
            scratch_disk_max_gib: 1024,
            boot_timeout_seconds: 60,
            parallel_boots: None,
            log_mib_per_second: 32,
            extra_cmdline: String::new(),
            first_uid: 0x7000_0000,
            uids: 1 << 16,
            core_scheduling: false,
            templates_mib: 512,
            templates_per_namespace: false,
            spares: 0,
            warmed: None,
        }
    }
}

impl Default for RawCni {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            cache_dir: None,
            plugin_timeout_seconds: 60,
            ip_ranges: Vec::new(),
            in_advance: false,
        }
    }
}

impl Default for RawVolumes {
    fn default() -> Self {
        Self {
            kubelet_roots: vec!["/var/lib/kubelet".into()],
        }
    }
}

impl Default for RawCdi {
    fn default() -> Self {
        Self {
            spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
        }
    }
}

impl Default for RawStreaming {
    fn default() -> Self {
        Self {
            address: Ipv4Addr::LOCALHOST.into(),
            port: 0,
            tls_certificate: None,
            tls_key: None,
            tls_client_ca: None,
        }
    }
}

impl Default for RawImages {
    fn default() -> Self {
        Self {
            max_parallel_layers: 3,
            max_parallel_layers_per_host: 6,
            stall_timeout_seconds: 30,
            min_kib_per_second: 16,
            max_image_gib: 128,
            keep_free_mib: 256,
            pinned: Vec::new(),
        }
    }
}
