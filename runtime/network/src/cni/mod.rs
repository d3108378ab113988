// SPDX-License-Identifier: Apache-2.0
//! The runtime's side of CNI: runs a chain of plugins and reads their results.
//!
//! Source: the CNI specification 1.1.0, sections 2 and 3. [`conflist`] reads the configuration, [`version`] chooses the
//! version of the protocol, [`invocation`] is a plugin's input, [`process`] runs a plugin, [`result`] parses the result
//! of `ADD`, and [`mod@failure`] has the errors.

mod conflist;
mod failure;
mod invocation;
mod process;
mod result;
mod version;

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use self::conflist::Plugin;
pub use self::conflist::{Conflist, Selection};
pub use self::failure::CniError;
use self::failure::{excerpt, failure};
pub use self::invocation::Invocation;
use self::process::{Broken, OUTPUT_BYTES};
pub use self::result::AddResult;
pub use self::version::Version;
use crate::link::INTERFACE;

/// The key under which `GC` gets the list of attachments to keep, and the key that a draft of the specification had.
const VALID_ATTACHMENTS: [&str; 2] = ["cni.dev/valid-attachments", "cni.dev/attachments"];

/// Where the plugins' programs are, and how long one may take.
#[derive(Clone, Copy, Debug)]
pub struct Plugins<'a> {
    pub directories: &'a [PathBuf],
    pub limit: Duration,
}

/// Remembers which versions programs support. An entry is valid as long as the file has not changed.
#[derive(Debug, Default)]
pub struct KnownVersions(Mutex<HashMap<PathBuf, (SystemTime, Vec<Version>)>>);

/// One call, for any plugin of a chain.
#[derive(Clone, Copy, Debug)]
struct Call<'a> {
    command: &'static str,
    /// Set for commands about one pod.
    invocation: Option<&'a Invocation>,
    /// `None` if the namespace no longer exists, which can happen only in `DEL`.
    netns: Option<&'a Path>,
    previous: Option<&'a Value>,
    /// The attachments that `GC` must keep.
    valid: Option<&'a [Value]>,
}

impl Call<'_> {
    /// A command about the network, not about one pod.
    const fn general(command: &'static str) -> Self {
        Self {
            command,
            invocation: None,
            netns: None,
            previous: None,
            valid: None,
        }
    }
}

impl Conflist {
    /// Whether every plugin gets the same for both, but for the pod's identity.
    pub fn asks_the_same(&self, one: &Invocation, other: &Invocation) -> bool {
        let mut plugins = self.plugins.iter();
        plugins.all(|plugin| one.asks_the_same(other, plugin))
    }

    /// The first plugin whose program cannot be found.
    pub fn missing_plugin(&self, directories: &[PathBuf]) -> Option<&str> {
        let mut programs = self.plugins.iter().map(|plugin| plugin.program.as_str());
        programs.find(|program| find(program, directories).is_none())
    }

    /// Chooses the version that the chain is run with. Asks the plugins only if several versions are allowed.
    pub async fn settle(
        &mut self,
        known: &KnownVersions,
        plugins: &Plugins<'_>,
    ) -> Result<(), CniError> {
        let mut allowed = std::mem::take(&mut self.allowed);
        if allowed.len() > 1 {
            for plugin in &self.plugins {
                let supported = self.versions_of(plugin, known, plugins).await?;
                allowed.retain(|version| supported.contains(version));
            }
        }
        if let Some(version) = allowed.first() {
            self.version = *version;
            return Ok(());
        }
        Err(CniError::Versions {
            network: self.name.clone(),
        })
    }

    /// The versions that a plugin supports. It is asked only if that is not known yet.
    async fn versions_of(
        &self,
        plugin: &Plugin,
        known: &KnownVersions,
        plugins: &Plugins<'_>,
    ) -> Result<Vec<Version>, CniError> {
        let path = self.find(plugin, plugins)?;
        let changed = std::fs::metadata(&path).and_then(|metadata| metadata.modified());
        if let Ok(changed) = changed
            && let Some(versions) = known.get(&path, changed)
        {
            return Ok(versions);
        }
        let call = Call::general("VERSION");
        let answer = self.execute(plugin, call, plugins).await?;
        let versions = Version::supported(&answer)
            .ok_or_else(|| self.nonsense(plugin, call.command, format!("{answer}")))?;
        if let Ok(changed) = changed {
            known.put(path, changed, versions.clone());
        }
        Ok(versions)
    }

    /// Runs `ADD` of every plugin. Each gets the result of the one before.
    pub async fn add(
        &self,
        invocation: &Invocation,
        plugins: &Plugins<'_>,
    ) -> Result<AddResult, CniError> {
        let mut previous: Option<Value> = None;
        let mut parsed = AddResult::default();
        for plugin in &self.plugins {
            let call = Call {
                invocation: Some(invocation),
                netns: Some(&invocation.netns),
                previous: previous.as_ref(),
                ..Call::general("ADD")
            };
            let mut result = self.execute(plugin, call, plugins).await?;
            if let Some(result) = result.as_object_mut() {
                // The next plugin needs the version to parse the result.
                result
                    .entry("cniVersion")
                    .or_insert(self.version.name().into());
            }
            parsed = AddResult::parse(&result)
                .map_err(|why| self.nonsense(plugin, call.command, why))?;
            previous = Some(result);
        }
        Ok(parsed)
    }

    /// Runs `CHECK` of every plugin. Does nothing with versions before 0.4.0, or if the administrator has disabled it.
    pub async fn check(
        &self,
        invocation: &Invocation,
        result: Option<&str>,
        plugins: &Plugins<'_>,
    ) -> Result<(), CniError> {
        let previous = result.and_then(|text| serde_json::from_str(text).ok());
        if self.disable_check || self.version < Version::V0_4_0 || previous.is_none() {
            return Ok(());
        }
        for plugin in &self.plugins {
            let call = Call {
                invocation: Some(invocation),
                netns: Some(&invocation.netns),
                previous: previous.as_ref(),
                ..Call::general("CHECK")
            };
            self.execute(plugin, call, plugins).await?;
        }
        Ok(())
    }

    /// Runs `DEL` of every plugin in reverse order, even if one fails. Returns the first error.
    pub async fn delete(
        &self,
        invocation: &Invocation,
        netns: Option<&Path>,
        result: Option<&str>,
        plugins: &Plugins<'_>,
    ) -> Result<(), CniError> {
        let previous = result.filter(|_| self.version >= Version::V0_4_0);
        let previous = previous.and_then(|text| serde_json::from_str(text).ok());
        let mut outcome = Ok(());
        for plugin in self.plugins.iter().rev() {
            let call = Call {
                invocation: Some(invocation),
                netns,
                previous: previous.as_ref(),
                ..Call::general("DEL")
            };
            let deleted = self.execute(plugin, call, plugins).await;
            outcome = outcome.and(deleted.map(drop));
        }
        outcome
    }

    /// Runs `STATUS` of every plugin, which tells whether an `ADD` would succeed now. Versions before 1.1.0 do not have
    /// it.
    pub async fn status(&self, plugins: &Plugins<'_>) -> Result<(), CniError> {
        if self.version < Version::V1_1_0 {
            return Ok(());
        }
        for plugin in &self.plugins {
            self.execute(plugin, Call::general("STATUS"), plugins)
                .await?;
        }
        Ok(())
    }

    /// Runs `GC` of every plugin, even if one fails. Plugins may remove everything that belongs to none of `valid`.
    /// Returns all errors.
    pub async fn collect_garbage(&self, valid: &[Value], plugins: &Plugins<'_>) -> Vec<CniError> {
        let mut errors = Vec::new();
        if self.disable_gc || self.version < Version::V1_1_0 {
            return errors;
        }
        for plugin in &self.plugins {
            let call = Call {
                valid: Some(valid),
                ..Call::general("GC")
            };
            errors.extend(self.execute(plugin, call, plugins).await.err());
        }
        errors
    }

    /// Runs one plugin. Returns its parsed answer, or null for commands without an answer.
    async fn execute(
        &self,
        plugin: &Plugin,
        call: Call<'_>,
        plugins: &Plugins<'_>,
    ) -> Result<Value, CniError> {
        let path = self.find(plugin, plugins)?;
        let command = call.command;
        let run_error = |source| CniError::Run {
            plugin: self.label(plugin),
            source,
        };
        let environment = environment(call, plugins).map_err(run_error)?;
        let input = self.input(plugin, call);
        let ended = match process::run(&path, &environment, &input, plugins.limit).await {
            Ok(ended) => ended,
            Err(Broken::Io(source)) => return Err(run_error(source)),
            Err(Broken::Endless) => {
                let why = format!("more than {OUTPUT_BYTES} bytes and was killed");
                return Err(self.nonsense(plugin, command, why));
            }
            Err(Broken::Late) => {
                return Err(CniError::Late {
                    plugin: self.label(plugin),
                    command,
                    limit: plugins.limit,
                });
            }
        };
        if !ended.status.success() {
            let (code, said) = failure(&ended);
            return Err(CniError::Failed {
                plugin: self.label(plugin),
                command,
                code,
                said,
            });
        }
        if !matches!(command, "ADD" | "VERSION") {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&ended.output).map_err(|e| {
            let why = format!("text that is not JSON: {e}: {:?}", excerpt(&ended.output));
            self.nonsense(plugin, command, why)
        })
    }

    /// The plugin's standard input (CNI 1.1.0, "Deriving request configuration from plugin configuration").
    fn input(&self, plugin: &Plugin, call: Call<'_>) -> Vec<u8> {
        if call.command == "VERSION" {
            return json!({ "cniVersion": self.version.name() })
                .to_string()
                .into_bytes();
        }
        let mut input = plugin.configuration.clone();
        input.remove("capabilities");
        input.insert("name".into(), self.name.clone().into());
        input.insert("cniVersion".into(), self.version.name().into());
        if let Some(previous) = call.previous {
            input.insert("prevResult".into(), previous.clone());
        }
        if let Some(valid) = call.valid {
            for key in VALID_ATTACHMENTS {
                input.insert(key.into(), valid.into());
            }
        }
        let runtime = call
            .invocation
            .map(|invocation| invocation.runtime_config(plugin));
        if let Some(runtime) = runtime.filter(|runtime| !runtime.is_empty()) {
            input.insert("runtimeConfig".into(), runtime.into());
        }
        Value::Object(input).to_string().into_bytes()
    }

    fn find(&self, plugin: &Plugin, plugins: &Plugins<'_>) -> Result<PathBuf, CniError> {
        find(&plugin.program, plugins.directories).ok_or_else(|| CniError::Missing {
            plugin: self.label(plugin),
        })
    }

    /// The name of a plugin in errors.
    fn label(&self, plugin: &Plugin) -> String {
        format!("{} of network {}", plugin.program, self.name)
    }

    fn nonsense(&self, plugin: &Plugin, command: &'static str, why: String) -> CniError {
        CniError::Answer {
            plugin: self.label(plugin),
            command,
            why,
        }
    }
}

impl KnownVersions {
    fn get(&self, path: &Path, changed: SystemTime) -> Option<Vec<Version>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (when, versions) = known.get(path)?;
        (*when == changed).then(|| versions.clone())
    }

    fn put(&self, path: PathBuf, changed: SystemTime, versions: Vec<Version>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(path, (changed, versions));
    }
}

fn environment(
    call: Call<'_>,
    plugins: &Plugins<'_>,
) -> std::io::Result<Vec<(&'static str, OsString)>> {
    let path = std::env::join_paths(plugins.directories).map_err(std::io::Error::other)?;
    let mut environment = vec![("CNI_COMMAND", call.command.into()), ("CNI_PATH", path)];
    if let Some(invocation) = call.invocation {
        let netns = call.netns.map(|path| path.as_os_str().to_owned());
        environment.extend([
            ("CNI_CONTAINERID", invocation.container_id.clone().into()),
            ("CNI_NETNS", netns.unwrap_or_default()),
            ("CNI_IFNAME", INTERFACE.into()),
            ("CNI_ARGS", invocation.arguments.clone().into()),
        ]);
    }
    Ok(environment)
}

fn find(program: &str, directories: &[PathBuf]) -> Option<PathBuf> {
    let mut paths = directories.iter().map(|directory| directory.join(program));
    paths.find(|path| {
        let metadata = std::fs::metadata(path);
        metadata.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    })
}

#[cfg(test)]
mod tests;
