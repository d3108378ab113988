// SPDX-License-Identifier: Apache-2.0
//! The daemon's configuration: one TOML file, read once, then checked.
//!
//! [`RawConfig`] is the file as written: every key has a default, and unknown keys are errors. [`Config`] has the
//! checked values that the program uses. docs/operating.md describes every key.

mod cgroup_driver;
mod raw;
mod runtimes;
mod streaming;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_host::cgroup::Unbounded;
use bulkhead_host::cores::Cores;
use bulkhead_network::{self as network, NetworkConfig, NetworkError};

use crate::callers::Callers;
use crate::pod::templates::Sharing;
pub use cgroup_driver::CgroupDriver;
pub use raw::DEFAULT_SOCKET;
use raw::{RawConfig, RawImages, RawSandbox, RawStreaming};
#[cfg(test)]
pub use runtimes::DelegateConfig;
use runtimes::RuntimesError;
pub use runtimes::{HANDLER, Handler, Runtimes};
pub use streaming::{StreamingConfig, TlsFiles};

/// The file that is read if no other is given. It need not exist.
pub const DEFAULT_PATH: &str = "/etc/bulkhead/config.toml";
const PACKAGED_FILES: &str = "/usr/lib/bulkhead";
const MIN_SCRATCH_GIB: u64 = 1;
const MAX_SCRATCH_GIB: u64 = 64 << 10;
/// The two users above it mean "none" and "no change" (user_namespaces(7)).
const MOST_UID: u64 = u32::MAX as u64 - 2;
const MAX_PARALLEL_BOOTS: u64 = 1024;
const MAX_SPARES: u64 = 256;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read configuration {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("parse configuration {path}")]
    Parse {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    #[error("{key} is {found}, but it must be {possible}")]
    Range {
        key: &'static str,
        found: u64,
        possible: String,
    },
    #[error("TLS needs a certificate and a key: {0} is missing")]
    HalfTls(&'static str),
    #[error(
        "sandbox.spares is {0}, but VMs that are kept ready are forked, and sandbox.templates_mib is 0: set one of the two"
    )]
    SparesWithoutTemplates(usize),
    #[error("{key} is {path}, which is not an absolute path")]
    RelativePath { key: &'static str, path: PathBuf },
    #[error("cni.ip_ranges")]
    Subnet { source: NetworkError },
    #[error("images.pinned")]
    Pinned(#[from] bulkhead_image::ReferenceError),
    #[error("runtimes of pods")]
    Runtimes(#[from] RuntimesError),
}

/// The checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    pub socket: PathBuf,
    pub callers: Callers,
    /// For what must survive a reboot: images, records of pods, scratch disks.
    pub state_dir: PathBuf,
    /// For what need not survive a reboot: sockets, console logs, network namespaces.
    pub run_dir: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// The modules of the guest's kernel, as an EROFS file.
    pub modules: PathBuf,
    /// The program `bulkhead-vmm`.
    pub vmm: PathBuf,
    /// Relative to /sys/fs/cgroup. If it is `None`, VMMs stay in the daemon's cgroup.
    pub cgroup_parent: Option<PathBuf>,
    pub cgroup_driver: CgroupDriver,
    pub unbounded: Unbounded,
    /// Who serves which pods.
    pub runtimes: Runtimes,
    pub sandbox: SandboxConfig,
    pub cni: NetworkConfig,
    /// Directories in which kubelet keeps the volumes of its pods. They may be links.
    pub kubelet_roots: Vec<PathBuf>,
    /// Directories of CDI specifications; the last one has the highest priority.
    pub cdi_spec_dirs: Vec<PathBuf>,
    pub streaming: StreamingConfig,
    images: RawImages,
    pinned_images: Vec<bulkhead_image::Reference>,
    registries: BTreeMap<String, bulkhead_image::HostConfig>,
}

/// Settings for VMs. Sizes apply to pods without requests or limits.
#[derive(Clone, Debug)]
pub struct SandboxConfig {
    pub vcpus: u8,
    /// The boot memory of a VM whose pod has no memory limit.
    pub memory_mib: u32,
    /// The most memory that a VM can have.
    pub memory_max_mib: u32,
    pub scratch_bytes: u64,
    /// The largest scratch disk that a pod may ask for.
    pub scratch_max_bytes: u64,
    pub ready_timeout: Duration,
    pub parallel_boots: usize,
    /// How fast a container may write to its log, for long. Zero: as it likes.
    pub log_bytes_per_second: u64,
    /// Added to the guest kernel's command line.
    pub extra_cmdline: String,
    /// The users of VMs, each with its group. They are nobody else's.
    pub users: Range<u32>,
    pub cores: Cores,
    /// How much memory templates may take together. 0: VMs boot.
    pub templates_bytes: u64,
    pub templates_of: Sharing,
    /// How many VMs are kept ready for pods to come.
    pub spares: usize,
    /// Where warmed pods are. `None`: no pod begins as one.
    pub warmed: Option<PathBuf>,
}

impl RawStreaming {
    fn check(self) -> Result<StreamingConfig, ConfigError> {
        let client_ca = self
            .tls_client_ca
            .map(|path| absolute("streaming.tls_client_ca", path))
            .transpose()?;
        let tls = match (self.tls_certificate, self.tls_key) {
            (None, None) if client_ca.is_some() => {
                return Err(ConfigError::HalfTls("streaming.tls_certificate"));
            }
            (None, None) => None,
            (Some(certificate), Some(key)) => Some(TlsFiles {
                certificate: absolute("streaming.tls_certificate", certificate)?,
                key: absolute("streaming.tls_key", key)?,
                client_ca,
            }),
            (Some(_), None) => return Err(ConfigError::HalfTls("streaming.tls_key")),
            (None, Some(_)) => return Err(ConfigError::HalfTls("streaming.tls_certificate")),
        };
        Ok(StreamingConfig {
            address: self.address,
            port: self.port,
            tls,
        })
    }
}

impl Config {
    /// Reads the file at `path`, or the default one, which need not exist.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let named = path.unwrap_or(Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(named) {
            Ok(text) => Self::parse(&text, named),
            Err(e) if e.kind() == io::ErrorKind::NotFound && path.is_none() => {
                Self::parse("", named)
            }
            Err(source) => Err(ConfigError::Read {
                path: named.to_owned(),
                source,
            }),
        }
    }

    /// Parses and checks the text of a file. `path` is its name in errors.
    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let raw: RawConfig = toml::from_str(text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let beside = Beside::this_program();
        let cni = raw.cni;
        range(
            "cni.plugin_timeout_seconds",
            cni.plugin_timeout_seconds,
            1,
            3600,
        )?;
        let socket = absolute("socket", raw.socket)?;
        Ok(Self {
            runtimes: Runtimes::check(
                raw.default_handler,
                raw.host_namespaces_handler,
                raw.runtimes,
                &socket,
            )?,
            socket,
            callers: Callers {
                uid: raw.socket_uid,
                gid: raw.socket_gid,
            },
            cni: NetworkConfig {
                conf_dir: absolute("cni.conf_dir", cni.conf_dir)?,
                bin_dirs: cni.bin_dirs,
                cache_dir: cni.cache_dir.unwrap_or_else(|| raw.state_dir.join("cni")),
                netns_dir: raw.run_dir.join("netns"),
                plugin_timeout: Duration::from_secs(cni.plugin_timeout_seconds),
                ip_ranges: network::subnets(&cni.ip_ranges)
                    .map_err(|source| ConfigError::Subnet { source })?,
                in_advance: cni.in_advance,
            },
            state_dir: absolute("state_dir", raw.state_dir)?,
            run_dir: absolute("run_dir", raw.run_dir)?,
            kernel: raw.kernel.unwrap_or_else(|| beside.find("vmlinux")),
            initramfs: raw
                .initramfs
                .unwrap_or_else(|| beside.find("initramfs.cpio")),
            modules: raw.modules.unwrap_or_else(|| beside.find("modules.erofs")),
            vmm: raw.vmm.unwrap_or_else(|| beside.find("bulkhead-vmm")),
            cgroup_parent: Some(raw.cgroup_parent)
                .filter(|parent| !parent.is_empty())
                .map(|parent| PathBuf::from(parent.trim_start_matches('/'))),
            cgroup_driver: raw.cgroup_driver.unwrap_or_else(CgroupDriver::of_host),
            unbounded: match raw.allow_unbounded_vms {
                true => Unbounded::Allow,
                false => Unbounded::Refuse,
            },
            sandbox: raw.sandbox.check()?,
            kubelet_roots: raw
                .volumes
                .kubelet_roots
                .into_iter()
                .map(|path| absolute("volumes.kubelet_roots", path))
                .collect::<Result<_, _>>()?,
            cdi_spec_dirs: raw
                .cdi
                .spec_dirs
                .into_iter()
                .map(|path| absolute("cdi.spec_dirs", path))
                .collect::<Result<_, _>>()?,
            pinned_images: raw
                .images
                .pinned
                .iter()
                .map(|name| name.parse())
                .collect::<Result<_, _>>()?,
            streaming: raw.streaming.check()?,
            images: raw.images,
            registries: raw.registries,
        })
    }

    /// The configuration of the image store.
    pub fn image_config(&self) -> bulkhead_image::Config {
        bulkhead_image::Config {
            root: self.state_dir.join("images"),
            registries: self.registries.clone(),
            max_parallel_layers: self.images.max_parallel_layers,
            max_parallel_layers_per_host: self.images.max_parallel_layers_per_host,
            stall_timeout: Duration::from_secs(self.images.stall_timeout_seconds),
            min_bytes_per_second: self.images.min_kib_per_second.saturating_mul(1 << 10),
            max_image_bytes: self.images.max_image_gib.saturating_mul(1 << 30),
            keep_free_bytes: self.images.keep_free_mib.saturating_mul(1 << 20),
            pinned: self.pinned_images.clone(),
        }
    }
}

impl RawSandbox {
    fn check(self) -> Result<SandboxConfig, ConfigError> {
        let most = bulkhead_vmm::config::MAX_VCPUS;
        range("sandbox.vcpus", self.vcpus.into(), 1, most.into())?;
        let (least, most) = (
            bulkhead_vmm::config::MIN_MEMORY_MIB,
            bulkhead_vmm::config::MAX_MEMORY_MIB,
        );
        range(
            "sandbox.memory_mib",
            self.memory_mib.into(),
            least.into(),
            most.into(),
        )?;
        let memory_max_mib = self.memory_max_mib.unwrap_or(most);
        range(
            "sandbox.memory_max_mib",
            memory_max_mib.into(),
            self.memory_mib.into(),
            most.into(),
        )?;
        range(
            "sandbox.scratch_disk_gib",
            self.scratch_disk_gib,
            MIN_SCRATCH_GIB,
            MAX_SCRATCH_GIB,
        )?;
        range(
            "sandbox.scratch_disk_max_gib",
            self.scratch_disk_max_gib,
            MIN_SCRATCH_GIB,
            MAX_SCRATCH_GIB,
        )?;
        range(
            "sandbox.boot_timeout_seconds",
            self.boot_timeout_seconds,
            1,
            3600,
        )?;
        range("sandbox.first_uid", self.first_uid.into(), 1, MOST_UID)?;
        let left = MOST_UID.saturating_sub(self.first_uid.into()) + 1;
        range("sandbox.uids", self.uids.into(), 1, left)?;
        let parallel_boots = self.parallel_boots.unwrap_or_else(parallel_boots);
        range(
            "sandbox.parallel_boots",
            u64::try_from(parallel_boots).unwrap_or(u64::MAX),
            1,
            MAX_PARALLEL_BOOTS,
        )?;
        range(
            "sandbox.spares",
            u64::try_from(self.spares).unwrap_or(u64::MAX),
            0,
            MAX_SPARES,
        )?;
        if self.spares > 0 && self.templates_mib == 0 {
            return Err(ConfigError::SparesWithoutTemplates(self.spares));
        }
        Ok(SandboxConfig {
            vcpus: self.vcpus,
            memory_mib: self.memory_mib,
            memory_max_mib,
            scratch_bytes: self.scratch_disk_gib << 30,
            scratch_max_bytes: self.scratch_disk_max_gib << 30,
            log_bytes_per_second: self.log_mib_per_second.saturating_mul(1 << 20),
            ready_timeout: Duration::from_secs(self.boot_timeout_seconds),
            parallel_boots,
            extra_cmdline: self.extra_cmdline,
            users: self.first_uid..self.first_uid.saturating_add(self.uids),
            cores: match self.core_scheduling {
                true => Cores::OwnForEachVm,
                false => Cores::Shared,
            },
            templates_bytes: self.templates_mib.saturating_mul(1 << 20),
            templates_of: match self.templates_per_namespace {
                true => Sharing::Namespace,
                false => Sharing::Node,
            },
            spares: self.spares,
            warmed: self
                .warmed
                .map(|path| absolute("sandbox.warmed", path))
                .transpose()?,
        })
    }
}

/// The default: one boot for each CPU that the daemon may use, because a boot keeps one CPU busy all the time.
fn parallel_boots() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Finds the other files of an installation: next to this program, or where packages put them.
struct Beside(Option<PathBuf>);

impl Beside {
    fn this_program() -> Self {
        let program = std::env::current_exe().ok();
        Self(program.and_then(|path| path.parent().map(Path::to_owned)))
    }

    fn find(&self, name: &str) -> PathBuf {
        let here = self.0.as_ref().map(|directory| directory.join(name));
        here.filter(|path| path.exists())
            .unwrap_or_else(|| Path::new(PACKAGED_FILES).join(name))
    }
}

fn absolute(key: &'static str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    if path.is_absolute() {
        return Ok(path);
    }
    Err(ConfigError::RelativePath { key, path })
}

fn range(key: &'static str, found: u64, least: u64, most: u64) -> Result<(), ConfigError> {
    if (least..=most).contains(&found) {
        return Ok(());
    }
    Err(ConfigError::Range {
        key,
        found,
        possible: format!("{least} to {most}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("test.toml"))
    }

    #[test]
    fn an_empty_file_gives_the_defaults() {
        let config = parse("").unwrap();
        assert_eq!(config.socket, Path::new(DEFAULT_SOCKET));
        assert_eq!(config.sandbox.memory_mib, 512);
        assert_eq!(config.sandbox.scratch_bytes, 10 << 30);
        assert!(config.sandbox.parallel_boots >= 1);
        assert_eq!(config.cgroup_parent.as_deref(), Some(Path::new("bulkhead")));
        assert_eq!(config.unbounded, Unbounded::Refuse);
        assert_eq!(config.callers, Callers::default());
        assert_eq!(config.sandbox.cores, Cores::Shared);
        assert_eq!(config.cni.cache_dir, Path::new("/var/lib/bulkhead/cni"));
    }

    #[test]
    fn what_is_written_wins() {
        let config = parse(
            "run_dir = \"/r\"\nsocket_gid = 5\ncgroup_parent = \"\"\nallow_unbounded_vms = true\n[sandbox]\nvcpus = 2\nfirst_uid = 7\nuids = 3\ncore_scheduling = true\nparallel_boots = 5\n\
             [registries.\"127.0.0.1:5000\"]\nplain_http = true\n[images]\nstall_timeout_seconds = 2\nmax_image_gib = 3\nkeep_free_mib = 4\nmin_kib_per_second = 5\n",
        )
        .unwrap();
        assert_eq!(config.sandbox.vcpus, 2);
        assert_eq!(config.sandbox.parallel_boots, 5);
        assert_eq!(config.sandbox.users, 7..10);
        assert_eq!(config.sandbox.cores, Cores::OwnForEachVm);
        assert_eq!(config.cni.netns_dir, Path::new("/r/netns"));
        assert_eq!(config.cgroup_parent, None);
        let gid = Some(5);
        assert_eq!(config.callers, Callers { uid: None, gid });
        assert_eq!(config.unbounded, Unbounded::Allow);
        let images = config.image_config();
        assert_eq!(images.stall_timeout, Duration::from_secs(2));
        assert_eq!(images.max_image_bytes, 3 << 30);
        assert_eq!(images.keep_free_bytes, 4 << 20);
        assert_eq!(images.min_bytes_per_second, 5 << 10);
        assert!(images.registries["127.0.0.1:5000"].plain_http);
    }

    #[test]
    fn the_cgroup_driver_is_the_one_that_is_written_else_the_hosts() {
        for (text, expected) in [
            ("cgroup_driver = \"systemd\"", CgroupDriver::Systemd),
            ("cgroup_driver = \"cgroupfs\"", CgroupDriver::Cgroupfs),
            ("", CgroupDriver::of_host()),
        ] {
            assert_eq!(parse(text).unwrap().cgroup_driver, expected, "{text}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let table = [
            ("cgroup_driver = \"cgroup\"", "cgroupfs"),
            ("sokcet = \"/x\"", "sokcet"),
            ("[sandbox]\nmemory_mib = 1", "sandbox.memory_mib is 1"),
            ("[sandbox]\nvcpus = 0", "sandbox.vcpus is 0"),
            ("[sandbox]\nfirst_uid = 0", "sandbox.first_uid is 0"),
            ("[sandbox]\nuids = 4294967295", "sandbox.uids is 4294967295"),
            ("[sandbox]\nspares = 257", "sandbox.spares is 257"),
            (
                "[sandbox]\nspares = 1\ntemplates_mib = 0",
                "sandbox.templates_mib is 0",
            ),
            (
                "[sandbox]\nparallel_boots = 0",
                "sandbox.parallel_boots is 0",
            ),
            ("socket = \"here\"", "socket is here"),
            ("state_dir = 3", "state_dir"),
            (
                "[cni]\nip_ranges = [\"10.0.0.0\"]",
                "\"10.0.0.0\" is not a subnet",
            ),
            ("[images]\npinned = [\"UPPER\"]", "UPPER"),
            ("default_handler = \"runc\"", "default_handler is \"runc\""),
            ("[runtimes.runc]\nhandler = \"runc\"", "cri"),
            ("[streaming]\naddress = \"here\"", "address"),
            (
                "[streaming]\ntls_key = \"/k\"",
                "streaming.tls_certificate is missing",
            ),
            (
                "[streaming]\ntls_client_ca = \"/c\"",
                "streaming.tls_certificate is missing",
            ),
        ];
        for (text, word) in table {
            let error = bulkhead_text::chain(&parse(text).unwrap_err());
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn a_named_file_must_exist() {
        let error = Config::load(Some(Path::new("/no/such/file"))).unwrap_err();
        assert!(bulkhead_text::chain(&error).contains("/no/such/file"));
    }
}
