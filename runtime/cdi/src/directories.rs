// SPDX-License-Identifier: Apache-2.0
//! The directories of specifications, and how devices are found in them.
//!
//! A later directory has the higher priority: its device is taken instead of one of the same name in an earlier one.
//! Within a directory a name must not occur twice.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::edits::Edits;
use crate::name::DeviceName;
use crate::specification::{Format, Specification, SpecificationError};

/// The most specifications in a directory.
const MOST_FILES: usize = 1024;
/// How many reasons an error tells why files could not be used.
const REASONS_TOLD: usize = 3;

/// Why devices are not found.
#[derive(Debug, thiserror::Error)]
pub enum CdiError {
    #[error("unresolvable CDI devices {devices}: {why}")]
    Unresolvable { devices: String, why: String },
    #[error(
        "CDI device {device} is in two specifications, {first} and {second}: remove one of them"
    )]
    Conflict {
        device: DeviceName,
        first: PathBuf,
        second: PathBuf,
    },
}

/// A file or directory that was left out.
#[derive(Debug, thiserror::Error)]
pub enum Skipped {
    #[error("read {path}")]
    Directory { path: PathBuf, source: io::Error },
    #[error(
        "{path} has more than {MOST_FILES} CDI specifications; the last ones by name are not read"
    )]
    TooMany { path: PathBuf },
    #[error(transparent)]
    File(#[from] SpecificationError),
}

/// The directories, in order of priority, the lowest first.
#[derive(Clone, Debug)]
pub struct Directories(Arc<[PathBuf]>);

/// What was found for the devices of a container.
#[derive(Debug, Default)]
pub struct Found {
    /// In the order in which they are to be made.
    pub parts: Vec<Part>,
    /// What might be noticed later: files that do not concern these devices, as far as one can know.
    pub skipped: Vec<Skipped>,
}

/// Edits, and whose they are.
#[derive(Debug)]
pub struct Part {
    /// For people: `CDI device vendor.com/class=name`, or all devices of a file.
    pub of: String,
    pub edits: Edits,
}

impl Directories {
    pub fn new(directories: Vec<PathBuf>) -> Self {
        Self(directories.into())
    }

    /// Finds devices. The edits of a file for all its devices come once, before those of its first device.
    pub fn find(&self, names: &[DeviceName]) -> Result<Found, CdiError> {
        let mut skipped = Vec::new();
        // The highest priority first.
        let directories = self.0.iter().rev();
        let read = directories.map(|directory| read_directory(directory, &mut skipped));
        let specifications: Vec<Vec<Specification>> = read.collect();
        let mut parts = Vec::new();
        let mut unknown = Vec::new();
        let mut used = BTreeSet::new();
        for name in names {
            let mut of_priority = specifications.iter();
            let Some(found) = of_priority.find_map(|all| find_in(all, name)) else {
                unknown.push(name.to_string());
                continue;
            };
            let (specification, edits) = found?;
            if used.insert(&specification.path) && !specification.edits.is_empty() {
                parts.push(Part {
                    of: format!("all CDI devices of {}", specification.path.display()),
                    edits: specification.edits.clone(),
                });
            }
            parts.push(Part {
                of: format!("CDI device {name}"),
                edits: edits.clone(),
            });
        }
        if unknown.is_empty() {
            return Ok(Found { parts, skipped });
        }
        Err(CdiError::Unresolvable {
            devices: unknown.join(", "),
            why: self.reason(&skipped),
        })
    }

    /// Why a device is not found.
    fn reason(&self, skipped: &[Skipped]) -> String {
        let looked: Vec<_> = self
            .0
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        let mut reason = match looked.as_slice() {
            [] => "no directory of specifications is configured (cdi.spec_dirs)".to_owned(),
            looked => format!("no specification in {} has them", looked.join(", ")),
        };
        for one in skipped.iter().take(REASONS_TOLD) {
            reason.push_str(&format!("; {one}"));
            let source = std::error::Error::source(one);
            reason.extend(source.map(|source| format!(": {source}")));
        }
        if let more @ 1.. = skipped.len().saturating_sub(REASONS_TOLD) {
            reason.push_str(&format!("; and {more} more could not be used"));
        }
        reason
    }
}

/// Finds a device among specifications of the same priority.
fn find_in<'a>(
    all: &'a [Specification],
    name: &DeviceName,
) -> Option<Result<(&'a Specification, &'a Edits), CdiError>> {
    let of_kind = all.iter().filter(|one| one.kind == name.kind());
    let mut found = of_kind.filter_map(|one| Some((one, one.devices.get(name.device())?)));
    let first = found.next()?;
    Some(match found.next() {
        None => Ok(first),
        Some(second) => Err(CdiError::Conflict {
            device: name.clone(),
            first: first.0.path.clone(),
            second: second.0.path.clone(),
        }),
    })
}

/// Reads the specifications in a directory, which need not exist, but not those in directories below.
fn read_directory(directory: &Path, skipped: &mut Vec<Skipped>) -> Vec<Specification> {
    let mut specifications = Vec::new();
    for (path, format) in files(directory, skipped) {
        match Specification::read(&path, format) {
            Ok(specification) => specifications.push(specification),
            Err(error) => skipped.push(error.into()),
        }
    }
    specifications
}

/// The files of a directory that are specifications by their names, in the order of these.
fn files(directory: &Path, skipped: &mut Vec<Skipped>) -> Vec<(PathBuf, Format)> {
    let listed = std::fs::read_dir(directory).and_then(|entries| {
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry?;
            if let Some(format) = Format::of(&entry.path())
                && !entry.file_type()?.is_dir()
            {
                found.push((entry.path(), format));
            }
        }
        Ok(found)
    });
    let mut found = match listed {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(source) => {
            skipped.push(Skipped::Directory {
                path: directory.to_owned(),
                source,
            });
            Vec::new()
        }
    };
    found.sort_unstable_by(|one, other| one.0.cmp(&other.0));
    if found.len() > MOST_FILES {
        found.truncate(MOST_FILES);
        skipped.push(Skipped::TooMany {
            path: directory.to_owned(),
        });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new(files: &[(&str, &str, &[&str])]) -> Self {
            let root = tempfile::tempdir().unwrap();
            for (path, kind, devices) in files {
                let path = root.path().join(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                let from = path.display();
                let device = |name: &&str| {
                    format!(r#"{{"name": "{name}", "containerEdits": {{"env": ["FROM={from}"]}}}}"#)
                };
                let devices: Vec<_> = devices.iter().map(device).collect();
                let text = format!(
                    r#"{{"cdiVersion": "0.3.0", "kind": "{kind}", "devices": [{}],
                    "containerEdits": {{"env": ["ALL={from}"]}}}}"#,
                    devices.join(", ")
                );
                std::fs::write(path, text).unwrap();
            }
            Self(root)
        }

        fn find(&self, directories: &[&str], names: &[&str]) -> Result<Found, CdiError> {
            let paths = directories.iter().map(|one| self.0.path().join(one));
            let names: Vec<_> = names
                .iter()
                .map(|name| DeviceName::parse(name).unwrap())
                .collect();
            Directories::new(paths.collect()).find(&names)
        }

        /// The variables of what was found, with paths below the root.
        fn variables(&self, directories: &[&str], names: &[&str]) -> Vec<String> {
            let found = self.find(directories, names).unwrap();
            let root = format!("{}/", self.0.path().display());
            let variables = found.parts.into_iter().flat_map(|part| part.edits.env);
            variables.map(|one| one.replace(&root, "")).collect()
        }
    }

    #[test]
    fn edits_of_a_file_come_once_and_before_those_of_its_devices() {
        let tree = Tree::new(&[
            ("etc/a.json", "v.com/a", &["x", "y"]),
            ("etc/b.yaml", "v.com/b", &["x"]),
        ]);
        let names = ["v.com/a=y", "v.com/b=x", "v.com/a=x"];
        assert_eq!(
            tree.variables(&["etc", "none"], &names),
            [
                "ALL=etc/a.json",
                "FROM=etc/a.json",
                "ALL=etc/b.yaml",
                "FROM=etc/b.yaml",
                "FROM=etc/a.json"
            ]
        );
    }

    #[test]
    fn the_later_directory_wins_and_one_directory_must_not_have_a_device_twice() {
        let tree = Tree::new(&[
            ("etc/1.json", "v.com/a", &["x", "low"]),
            ("etc/2.json", "v.com/a", &["x"]),
            ("run/1.json", "v.com/a", &["x"]),
            ("etc/deep.json/3.json", "v.com/a", &["deep"]),
            ("etc/4.json.tmp", "v.com/a", &["low"]),
        ]);
        let x = ["v.com/a=x"];
        assert_eq!(
            tree.variables(&["etc", "run"], &x),
            ["ALL=run/1.json", "FROM=run/1.json"]
        );
        let both = tree.find(&["run", "etc"], &x).unwrap_err().to_string();
        assert!(
            both.contains("etc/1.json") && both.contains("etc/2.json"),
            "{both}"
        );
        assert_eq!(tree.variables(&["run", "etc"], &["v.com/a=low"]).len(), 2);
        assert!(tree.find(&["etc", "run"], &["v.com/a=deep"]).is_err());
    }

    #[test]
    fn what_is_not_found_is_named_with_all_that_could_be_the_reason() {
        let tree = Tree::new(&[("etc/good.json", "v.com/a", &["x"])]);
        std::fs::write(tree.0.path().join("etc/bad.json"), "{").unwrap();
        std::os::unix::fs::symlink("/none", tree.0.path().join("etc/link.yaml")).unwrap();
        let fifo = tree.0.path().join("etc/pipe.json");
        let made = std::process::Command::new("mkfifo").arg(fifo).status();
        assert!(made.unwrap().success());
        let found = tree.find(&["etc"], &["v.com/a=x"]).unwrap();
        assert_eq!(found.skipped.len(), 3);
        let names = ["v.com/a=x", "v.com/a=y", "w.com/a=x"];
        let error = tree.find(&["etc"], &names).unwrap_err().to_string();
        for word in [
            "unresolvable CDI devices v.com/a=y, w.com/a=x: no specification in ",
            "etc/bad.json is not valid: ",
            "etc/link.yaml: No such file",
            "etc/pipe.json: it is not a regular file",
        ] {
            assert!(error.contains(word), "{word}: {error}");
        }
        let nowhere = tree.find(&[], &["v.com/a=x"]).unwrap_err().to_string();
        assert!(nowhere.contains("cdi.spec_dirs"), "{nowhere}");
    }
}
