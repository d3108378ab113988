// SPDX-License-Identifier: Apache-2.0
//! One file: its format, JSON or YAML, and what must hold of its content.
//!
//! Sources: CDI's SPEC.md 1.1.0, and the schema and checks of its Go library, which containerd and CRI-O use.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::edits::Edits;
use crate::name::{check_device, check_kind};

/// The most bytes of a file. One that lists each library of a large driver has some hundred KiB.
const FILE_BYTES: u64 = 4 << 20;
/// How often a file may use what it has written once (YAML's aliases), counted in parts of a document.
const MOST_REPEATED_PARTS: usize = 100_000;
/// The versions of the specification that are known, oldest first.
const VERSIONS: [&str; 8] = [
    "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0",
];

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecificationError {
    #[error("read CDI specification {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("CDI specification {path} is not valid: {why}")]
    Invalid { path: PathBuf, why: String },
}

/// A file that was read and checked.
#[derive(Debug)]
pub struct Specification {
    pub path: PathBuf,
    /// Vendor and class.
    pub kind: String,
    /// For every container that gets one of the devices.
    pub edits: Edits,
    pub devices: BTreeMap<String, Edits>,
}

/// How the content of a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Yaml,
}

impl Format {
    /// The format of a file by its name. `None`: it is no specification.
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "json" => Some(Self::Json),
            "yaml" => Some(Self::Yaml),
            _ => None,
        }
    }
}

/// The file as written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Document {
    cdi_version: String,
    kind: String,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    devices: Vec<Device>,
    #[serde(default)]
    container_edits: Option<Edits>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Device {
    name: String,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    container_edits: Edits,
}

impl Specification {
    pub fn read(path: &Path, format: Format) -> Result<Self, SpecificationError> {
        let failed = |source| SpecificationError::Read {
            path: path.to_owned(),
            source,
        };
        // Opening a pipe would block.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(failed(io::Error::other("it is not a regular file")));
        }
        let mut text = String::new();
        let file = File::open(path).map_err(failed)?;
        file.take(FILE_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(failed)?;
        if u64::try_from(text.len()).unwrap_or(u64::MAX) > FILE_BYTES {
            return Err(failed(io::ErrorKind::FileTooLarge.into()));
        }
        Self::parse(path, &text, format).map_err(|why| SpecificationError::Invalid {
            path: path.to_owned(),
            why,
        })
    }

    /// Parses the content of a file. `path` is its name. The error is a reason.
    fn parse(path: &Path, text: &str, format: Format) -> Result<Self, String> {
        let document: Document = match format {
            Format::Json => serde_json::from_str(text).map_err(|e| e.to_string())?,
            Format::Yaml => from_yaml(text)?,
        };
        let class = check_kind(&document.kind).map_err(|e| e.to_string())?;
        check_version(&document, class)?;
        let edits = document.container_edits.unwrap_or_default();
        edits.check()?;
        let mut devices = BTreeMap::new();
        for device in document.devices {
            let Device {
                name,
                container_edits,
                ..
            } = device;
            check_device(&name).map_err(|e| e.to_string())?;
            let in_device = |why| format!("device {name:?}: {why}");
            container_edits.check().map_err(in_device)?;
            if container_edits.is_empty() {
                return Err(in_device("it has no edits".to_owned()));
            }
            if devices.insert(name.clone(), container_edits).is_some() {
                return Err(format!("two devices are called {name:?}"));
            }
        }
        if devices.is_empty() {
            return Err("it has no devices".to_owned());
        }
        Ok(Self {
            path: path.to_owned(),
            kind: document.kind,
            edits,
            devices,
        })
    }
}

/// Parses YAML as the Go library does, which means numbers like `0666` as YAML 1.1 has them: octal.
fn from_yaml(text: &str) -> Result<Document, String> {
    let options = serde_saphyr::options! {
        legacy_octal_numbers: true,
        // An error is one line of a log.
        with_snippet: false,
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MOST_REPEATED_PARTS,
        },
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|e| e.to_string())
}

/// Refuses versions that are not known, and fields that the file's version does not have: its author wrote for somebody
/// else.
fn check_version(document: &Document, class: &str) -> Result<(), String> {
    let version = &document.cdi_version;
    let at = |wanted: &str| VERSIONS.iter().position(|known| *known == wanted);
    let Some(found) = at(version.strip_prefix('v').unwrap_or(version)) else {
        return Err(format!(
            "cdiVersion is {version:?}, known are {}",
            VERSIONS.join(", ")
        ));
    };
    let devices = || document.devices.iter();
    let edits = || {
        let of_devices = devices().map(|device| &device.container_edits);
        of_devices.chain(&document.container_edits)
    };
    let is_given = |map: &Option<BTreeMap<_, _>>| map.as_ref().is_some_and(|map| !map.is_empty());
    let needs: [(bool, &str, &str); 8] = [
        (
            edits().any(|e| !e.net_devices.is_empty()),
            "netDevices",
            "1.1.0",
        ),
        (edits().any(|e| e.intel_rdt.is_some()), "intelRdt", "0.7.0"),
        (
            edits().any(|e| !e.additional_gids.is_empty()),
            "additionalGids",
            "0.7.0",
        ),
        (
            is_given(&document.annotations) || devices().any(|one| is_given(&one.annotations)),
            "annotations",
            "0.6.0",
        ),
        (class.contains('.'), "a class with a dot", "0.6.0"),
        (
            devices().any(|one| one.name.starts_with(|c: char| c.is_ascii_digit())),
            "a device whose name begins with a digit",
            "0.5.0",
        ),
        (
            edits().any(|e| e.device_nodes.iter().any(|node| !node.host_path.is_empty())),
            "hostPath of a device node",
            "0.5.0",
        ),
        (
            edits().any(|e| e.mounts.iter().any(|mount| !mount.kind.is_empty())),
            "type of a mount",
            "0.4.0",
        ),
    ];
    let newer = |(used, _, since): &&(bool, &str, &str)| *used && at(since) > Some(found);
    match needs.iter().find(newer) {
        None => Ok(()),
        Some((_, what, since)) => Err(format!(
            "cdiVersion is {version:?}, but {what} needs {since}"
        )),
    }
}

#[cfg(test)]
#[path = "specification_tests.rs"]
mod tests;
