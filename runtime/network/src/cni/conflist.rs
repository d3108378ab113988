// SPDX-License-Identifier: Apache-2.0
//! The configuration of a network: files in the configuration directory, which are read again for every use.
//!
//! Source: the CNI specification 1.1.0, section 1. The first valid file by name is the network. Files that are not
//! valid are skipped and reported.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::failure::CniError;
use super::version::Version;

/// The most bytes of a file that are read.
const FILE_BYTES: u64 = 1 << 20;
const MOST_PLUGINS: usize = 32;
const EXTENSIONS: [&str; 3] = ["conflist", "conf", "json"];

/// A network: a chain of plugins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflist {
    pub name: String,
    /// The version that the chain is run with.
    pub version: Version,
    /// The versions that it may be run with, newest first. Empty after [`Conflist::settle`].
    #[serde(default)]
    pub(super) allowed: Vec<Version>,
    #[serde(default)]
    pub(super) disable_check: bool,
    #[serde(default)]
    pub(super) disable_gc: bool,
    pub(super) plugins: Vec<Plugin>,
}

/// One plugin, with its configuration as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plugin {
    /// The file name of its program.
    pub program: String,
    pub configuration: Map<String, Value>,
}

/// What was found in the configuration directory.
#[derive(Debug, Default)]
pub struct Selection {
    pub network: Option<Conflist>,
    /// Why files before it are not valid.
    pub skipped: Vec<CniError>,
}

impl Selection {
    /// Takes the first valid file of `directory` by name. A directory that does not exist counts as empty.
    pub fn look(directory: &Path) -> Result<Self, CniError> {
        let mut selection = Self::default();
        for path in files(directory, &EXTENSIONS)? {
            match Conflist::read(&path) {
                Ok(conflist) => {
                    selection.network = Some(conflist);
                    break;
                }
                Err(error) => selection.skipped.push(error),
            }
        }
        Ok(selection)
    }
}

impl Conflist {
    fn read(path: &Path) -> Result<Self, CniError> {
        let text = read_text(path)?;
        let invalid = |why| CniError::Configuration {
            path: path.to_owned(),
            why,
        };
        let whole: Map<String, Value> =
            serde_json::from_str(&text).map_err(|e| invalid(e.to_string()))?;
        let name = whole.get("name").and_then(Value::as_str);
        let inlined_only = flag(&whole, "loadOnlyInlinedPlugins").map_err(invalid)?;
        let mut more = Vec::new();
        // Only lists can have a directory of plugins. The name is part of its path, so it must be checked first.
        if let (Some(name), false, true) = (name, inlined_only, is_list(path, &whole)) {
            check_name(name).map_err(invalid)?;
            let directory = path.with_file_name(name);
            for path in files(&directory, &["conf"])? {
                let text = read_text(&path)?;
                let plugin = serde_json::from_str(&text).map_err(|e| CniError::Configuration {
                    path,
                    why: e.to_string(),
                })?;
                more.push(plugin);
            }
        }
        Self::assemble(whole, more).map_err(invalid)
    }

    /// Makes the network of a file's content, and of `more` plugins from the network's own directory, which come after
    /// those of the file.
    fn assemble(whole: Map<String, Value>, more: Vec<Value>) -> Result<Self, String> {
        let name = whole
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or_default();
        check_name(name)?;
        let allowed = Version::allowed(whole.get("cniVersion"), whole.get("cniVersions"))?;
        let disable_check = flag(&whole, "disableCheck")?;
        let disable_gc = flag(&whole, "disableGC")?;
        let mut configurations = match whole.get("plugins") {
            Some(Value::Array(plugins)) => plugins.clone(),
            Some(_) => return Err("plugins is not a list".to_owned()),
            // The file has the older format for one plugin, unless all plugins are in the directory.
            None if more.is_empty() => vec![Value::Object(whole.clone())],
            None => Vec::new(),
        };
        configurations.extend(more);
        if configurations.is_empty() || configurations.len() > MOST_PLUGINS {
            return Err(format!(
                "it has {} plugins instead of 1 to {MOST_PLUGINS}",
                configurations.len()
            ));
        }
        let plugins = configurations.into_iter().map(Plugin::parse);
        Ok(Self {
            name: name.to_owned(),
            version: allowed.first().copied().unwrap_or(Version::UNSAID),
            allowed,
            disable_check,
            disable_gc,
            plugins: plugins.collect::<Result<_, _>>()?,
        })
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub fn parse(text: &str) -> Result<Self, String> {
        Self::assemble(
            serde_json::from_str(text).map_err(|e| e.to_string())?,
            Vec::new(),
        )
    }
}

impl Plugin {
    fn parse(value: Value) -> Result<Self, String> {
        let Value::Object(configuration) = value else {
            return Err("a plugin is not an object".to_owned());
        };
        let program = configuration
            .get("type")
            .and_then(Value::as_str)
            .unwrap_or_default();
        // The type is used as a file name.
        if program.is_empty() || program.contains('/') || program == "." || program == ".." {
            return Err(format!("a plugin has the type {program:?}"));
        }
        Ok(Self {
            program: program.to_owned(),
            configuration,
        })
    }
}

/// Whether a file is a list: by its content or, if its plugins are elsewhere, by its extension.
fn is_list(path: &Path, whole: &Map<String, Value>) -> bool {
    whole.contains_key("plugins") || path.extension().is_some_and(|end| end == "conflist")
}

/// Checks a network's name, which plugins use in file names: letters, digits, `_`, `.` and `-`, and it must begin with
/// a letter or digit.
fn check_name(name: &str) -> Result<(), String> {
    let inner = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    if name.is_empty() {
        return Err("it has no name".to_owned());
    }
    if name.chars().all(inner) && name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        return Ok(());
    }
    Err(format!(
        "its name {name:?} must be letters, digits, _, . and -, and begin with a letter or digit"
    ))
}

/// Reads a boolean, which may be written as a string.
fn flag(whole: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match whole.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(other) => Err(format!("{key} is {other}, not true or false")),
    }
}

/// The files of a directory that end with one of `extensions`, by name.
fn files(directory: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>, CniError> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            return Err(CniError::Read {
                path: directory.to_owned(),
                source,
            });
        }
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| extensions.contains(&extension))
            // Leave out pipes, on which a reader could wait for ever.
            && path.is_file()
    });
    paths.sort();
    Ok(paths)
}

fn read_text(path: &Path) -> Result<String, CniError> {
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(FILE_BYTES).read_to_string(&mut text))
        .map_err(|source| CniError::Read {
            path: path.to_owned(),
            source,
        })?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Directory(tempfile::TempDir);

    impl Directory {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn write(&self, name: &str, text: &str) {
            let path = self.0.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn look(&self) -> Selection {
            Selection::look(self.0.path()).unwrap()
        }
    }

    #[test]
    fn the_first_valid_file_by_name_is_taken_and_those_before_it_are_told() {
        let directory = Directory::new();
        let none = Selection::look(&directory.0.path().join("none")).unwrap();
        assert!(none.network.is_none() && none.skipped.is_empty());
        directory.write("00.txt", "not looked at");
        directory.write("10.conflist", "broken");
        let broken = directory.look();
        assert!(broken.network.is_none());
        let told = bulkhead_text::chain(&broken.skipped[0]);
        assert!(told.contains("10.conflist"), "{told}");
        directory.write("30.conf", r#"{"name":"later","type":"bridge"}"#);
        let later = directory.look().network.unwrap();
        assert_eq!(
            (later.name.as_str(), later.version),
            ("later", Version::UNSAID)
        );
        directory.write(
            "20.conflist",
            r#"{"name":"first","cniVersion":"1.1.0","disableGC":"true","plugins":[{"type":"bridge"}]}"#,
        );
        let found = directory.look();
        assert_eq!(found.skipped.len(), 1);
        let found = found.network.unwrap();
        assert_eq!(
            (found.name.as_str(), found.version),
            ("first", Version::V1_1_0)
        );
        assert!(found.disable_gc && !found.disable_check);
    }

    #[test]
    fn plugins_in_the_networks_own_directory_come_after_those_of_the_file() {
        let directory = Directory::new();
        let list = r#"{"name":"net","plugins":[{"type":"one"}]INLINED}"#;
        directory.write("1.conflist", &list.replace("INLINED", ""));
        directory.write("net/20.conf", r#"{"type":"three"}"#);
        directory.write("net/10.conf", r#"{"type":"two"}"#);
        let programs = |directory: &Directory| {
            let plugins = directory.look().network.unwrap().plugins;
            plugins
                .into_iter()
                .map(|plugin| plugin.program)
                .collect::<Vec<_>>()
        };
        assert_eq!(programs(&directory), ["one", "two", "three"]);
        let only = list.replace("INLINED", r#","loadOnlyInlinedPlugins":true"#);
        directory.write("1.conflist", &only);
        assert_eq!(programs(&directory), ["one"]);
        directory.write("1.conflist", r#"{"name":"net"}"#);
        assert_eq!(programs(&directory), ["two", "three"]);
    }

    #[test]
    fn configurations_that_would_run_something_else_are_refused() {
        for text in [
            r#"{"plugins":[{"type":"x"}]}"#,
            r#"{"name":"n","plugins":[]}"#,
            r#"{"name":"n","plugins":[{"type":"../../bin/sh"}]}"#,
            r#"{"name":"n","plugins":[{}]}"#,
            r#"{"name":"n","plugins":[3]}"#,
            r#"{"name":"n","plugins":3}"#,
            r#"{"name":"../n","plugins":[{"type":"x"}]}"#,
            r#"{"name":"n","cniVersion":"0.2.0","plugins":[{"type":"x"}]}"#,
            r#"{"name":"n","disableCheck":"perhaps","plugins":[{"type":"x"}]}"#,
        ] {
            assert!(Conflist::parse(text).is_err(), "{text}");
        }
    }
}
