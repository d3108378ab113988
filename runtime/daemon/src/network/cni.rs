// SPDX-License-Identifier: Apache-2.0
//! The runtime's side of CNI: find the configuration, run its plugins in a chain, read their result.
//!
//! Source: the CNI specification, 1.0.0 ("Execution Protocol", "Result types"); 0.3 and 0.4 results are alike in what
//! is read here. A plugin is the administrator's program, but its output is read like anybody's: bounded and checked.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::{AttachRequest, Dns, INTERFACE, PortMapping};

/// The most bytes of a configuration file or a plugin's output that are read.
const TEXT_BYTES: u64 = 1 << 20;
const MOST_PLUGINS: usize = 32;
/// How much of what a plugin said goes into an error.
const SAID_BYTES: usize = 500;
const DEFAULT_VERSION: &str = "0.4.0";

/// An error in CNI's configuration or from a plugin.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    #[error("read {path}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} is not a CNI configuration: {why}")]
    Configuration { path: PathBuf, why: String },
    #[error("plugin {name} is in none of the plugin directories")]
    Missing { name: String },
    #[error("run plugin {name}")]
    Run {
        name: String,
        source: std::io::Error,
    },
    #[error("plugin {name} did not finish {command} in {seconds} s and was killed")]
    Late {
        name: String,
        command: &'static str,
        seconds: u64,
    },
    #[error("plugin {name} failed {command}: {said}")]
    Failed {
        name: String,
        command: &'static str,
        said: String,
    },
    #[error("plugin {name} answered {command} with {why}")]
    Answer {
        name: String,
        command: &'static str,
        why: String,
    },
}

/// A network: a chain of plugins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflist {
    name: String,
    version: String,
    plugins: Vec<Plugin>,
}

/// One plugin with its configuration as written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Plugin {
    program: String,
    configuration: Map<String, Value>,
}

/// Where plugins are, and how long one may take.
#[derive(Clone, Copy, Debug)]
pub struct Plugins<'a> {
    pub directories: &'a [PathBuf],
    pub timeout: Duration,
}

/// What every plugin of a pod is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invocation {
    container_id: String,
    netns: PathBuf,
    arguments: String,
    port_mappings: Vec<PortMapping>,
}

/// The end result of a chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddResult {
    /// As the last plugin wrote it: `DEL` wants it back.
    pub text: String,
    pub addresses: Vec<String>,
    pub routes: Vec<(String, String)>,
    pub dns: Dns,
}

#[derive(Deserialize)]
struct RawResult {
    #[serde(default)]
    interfaces: Vec<RawInterface>,
    #[serde(default)]
    ips: Vec<RawIp>,
    #[serde(default)]
    routes: Vec<RawRoute>,
    #[serde(default)]
    dns: RawDns,
}

#[derive(Deserialize)]
struct RawInterface {
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct RawIp {
    address: String,
    #[serde(default)]
    gateway: String,
    interface: Option<usize>,
}

#[derive(Deserialize)]
struct RawRoute {
    dst: String,
    #[serde(default)]
    gw: String,
}

#[derive(Default, Deserialize)]
struct RawDns {
    #[serde(default)]
    nameservers: Vec<String>,
    #[serde(default)]
    search: Vec<String>,
    #[serde(default)]
    options: Vec<String>,
}

impl Conflist {
    /// The first valid configuration of a directory by file name, as kubelet's own runtimes choose; `None` if there
    /// is no file at all.
    pub fn load(directory: &Path) -> Result<Option<Self>, CniError> {
        let mut paths = match std::fs::read_dir(directory) {
            Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(source) => {
                return Err(CniError::Read {
                    path: directory.to_owned(),
                    source,
                });
            }
        };
        paths.retain(|path| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            matches!(extension, Some("conflist" | "conf" | "json"))
        });
        paths.sort();
        let mut first_error = None;
        for path in &paths {
            match Self::read(path) {
                Ok(conflist) => return Ok(Some(conflist)),
                Err(e) => first_error = first_error.or(Some(e)),
            }
        }
        first_error.map_or(Ok(None), Err)
    }

    fn read(path: &Path) -> Result<Self, CniError> {
        use std::io::Read;
        let mut text = String::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(TEXT_BYTES).read_to_string(&mut text))
            .map_err(|source| CniError::Read {
                path: path.to_owned(),
                source,
            })?;
        Self::parse(&text).map_err(|why| CniError::Configuration {
            path: path.to_owned(),
            why,
        })
    }

    /// A list of plugins, or the older form of one plugin.
    fn parse(text: &str) -> Result<Self, String> {
        let whole: Map<String, Value> = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let word = |key: &str| whole.get(key).and_then(Value::as_str).map(str::to_owned);
        let name = word("name")
            .filter(|name| !name.is_empty())
            .ok_or("it has no name")?;
        let version = word("cniVersion").unwrap_or_else(|| DEFAULT_VERSION.to_owned());
        let configurations = match whole.get("plugins") {
            Some(Value::Array(plugins)) => plugins.clone(),
            Some(_) => return Err("plugins is not a list".to_owned()),
            None => vec![Value::Object(whole.clone())],
        };
        if configurations.is_empty() || configurations.len() > MOST_PLUGINS {
            return Err(format!("it has {} plugins", configurations.len()));
        }
        let plugins = configurations.into_iter().map(Plugin::parse);
        Ok(Self {
            name,
            version,
            plugins: plugins.collect::<Result<_, _>>()?,
        })
    }

    /// The first plugin whose program is not to be found.
    pub fn missing_plugin(&self, directories: &[PathBuf]) -> Option<&str> {
        let mut programs = self.plugins.iter().map(|plugin| plugin.program.as_str());
        programs.find(|program| find(program, directories).is_none())
    }

    /// `ADD` of every plugin, each with the result of the one before.
    pub async fn add(
        &self,
        invocation: &Invocation,
        plugins: &Plugins<'_>,
    ) -> Result<AddResult, CniError> {
        let mut previous: Option<Value> = None;
        let mut last = "";
        for plugin in &self.plugins {
            let output = self
                .execute("ADD", plugin, invocation, previous.as_ref(), plugins)
                .await?;
            let result = serde_json::from_slice(&output).map_err(|e| CniError::Answer {
                name: plugin.program.clone(),
                command: "ADD",
                why: format!("{e} in {:?}", excerpt(&output)),
            })?;
            previous = Some(result);
            last = &plugin.program;
        }
        AddResult::parse(previous.unwrap_or_default()).map_err(|why| CniError::Answer {
            name: last.to_owned(),
            command: "ADD",
            why,
        })
    }

    /// `DEL` of every plugin in reverse order. All are tried; the first error is told.
    pub async fn delete(
        &self,
        invocation: &Invocation,
        result: Option<&str>,
        plugins: &Plugins<'_>,
    ) -> Result<(), CniError> {
        let previous = result.and_then(|text| serde_json::from_str(text).ok());
        let mut outcome = Ok(());
        for plugin in self.plugins.iter().rev() {
            let deleted = self
                .execute("DEL", plugin, invocation, previous.as_ref(), plugins)
                .await;
            outcome = outcome.and(deleted.map(drop));
        }
        outcome
    }

    async fn execute(
        &self,
        command: &'static str,
        plugin: &Plugin,
        invocation: &Invocation,
        previous: Option<&Value>,
        plugins: &Plugins<'_>,
    ) -> Result<Vec<u8>, CniError> {
        let name = plugin.program.clone();
        let path = find(&name, plugins.directories).ok_or(CniError::Missing { name })?;
        let input = plugin.input(&self.name, &self.version, invocation, previous);
        let ran = run(&path, command, &input, invocation, plugins);
        let name = plugin.program.clone();
        match tokio::time::timeout(plugins.timeout, ran).await {
            Ok(Ok(Ok(output))) => Ok(output),
            Ok(Ok(Err(said))) => Err(CniError::Failed {
                name,
                command,
                said,
            }),
            Ok(Err(source)) => Err(CniError::Run { name, source }),
            // Dropping the child has killed it.
            Err(_) => Err(CniError::Late {
                name,
                command,
                seconds: plugins.timeout.as_secs(),
            }),
        }
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
        // It becomes a file name.
        if program.is_empty() || program.contains('/') || program == ".." {
            return Err(format!("a plugin has the type {program:?}"));
        }
        Ok(Self {
            program: program.to_owned(),
            configuration,
        })
    }

    /// What the plugin reads from standard input (CNI 1.0.0, "Deriving request configuration").
    fn input(
        &self,
        name: &str,
        version: &str,
        invocation: &Invocation,
        previous: Option<&Value>,
    ) -> Vec<u8> {
        let mut input = self.configuration.clone();
        let capabilities = input.remove("capabilities").unwrap_or_default();
        input.insert("name".into(), name.into());
        input.insert("cniVersion".into(), version.into());
        if let Some(previous) = previous {
            input.insert("prevResult".into(), previous.clone());
        }
        let wants = |capability: &str| capabilities.get(capability) == Some(&Value::Bool(true));
        if wants("portMappings") && !invocation.port_mappings.is_empty() {
            let runtime = json!({ "portMappings": invocation.port_mappings });
            input.insert("runtimeConfig".into(), runtime);
        }
        Value::Object(input).to_string().into_bytes()
    }
}

impl Invocation {
    pub fn new(request: &AttachRequest, netns: &Path) -> Self {
        // A ';' or '=' in a value would end it; names in Kubernetes have neither.
        let clean = |text: &str| text.replace([';', '='], "_");
        Self {
            container_id: request.pod_id.clone(),
            netns: netns.to_owned(),
            arguments: format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
                clean(&request.namespace),
                clean(&request.name),
                request.pod_id,
                clean(&request.uid)
            ),
            port_mappings: request
                .port_mappings
                .iter()
                .filter(|mapping| mapping.host_port != 0)
                .cloned()
                .collect(),
        }
    }
}

impl AddResult {
    fn parse(value: Value) -> Result<Self, String> {
        let text = value.to_string();
        let raw: RawResult = serde_json::from_value(value).map_err(|e| e.to_string())?;
        // Addresses of the host's end of a veth are in the result too: ours are those with a sandbox.
        let inside = |ip: &RawIp| match ip.interface {
            Some(index) => raw
                .interfaces
                .get(index)
                .is_none_or(|found| !found.sandbox.is_empty()),
            None => true,
        };
        let ips: Vec<_> = raw.ips.iter().filter(|ip| inside(ip)).collect();
        for ip in &ips {
            check_cidr(&ip.address)?;
        }
        let gateway = |ipv6: bool| {
            let mut same_family = ips.iter().filter(|ip| ip.address.contains(':') == ipv6);
            same_family
                .find(|ip| !ip.gateway.is_empty())
                .map(|ip| ip.gateway.clone())
        };
        let mut routes = Vec::new();
        for route in raw.routes {
            check_cidr(&route.dst)?;
            let via = Some(route.gw).filter(|gw| !gw.is_empty());
            let via = via
                .or_else(|| gateway(route.dst.contains(':')))
                .unwrap_or_default();
            routes.push((route.dst, via));
        }
        Ok(Self {
            text,
            addresses: ips.iter().map(|ip| ip.address.clone()).collect(),
            routes,
            dns: Dns {
                servers: raw.dns.nameservers,
                searches: raw.dns.search,
                options: raw.dns.options,
            },
        })
    }
}

fn check_cidr(text: &str) -> Result<(), String> {
    let parsed = text.split_once('/').and_then(|(address, prefix)| {
        let address: std::net::IpAddr = address.parse().ok()?;
        let prefix: u8 = prefix.parse().ok()?;
        Some(prefix <= if address.is_ipv4() { 32 } else { 128 })
    });
    if parsed == Some(true) {
        return Ok(());
    }
    Err(format!("the address {text:?}"))
}

fn find(program: &str, directories: &[PathBuf]) -> Option<PathBuf> {
    let mut paths = directories.iter().map(|directory| directory.join(program));
    paths.find(|path| path.is_file())
}

/// Runs one plugin; the inner error is what it said when it failed.
async fn run(
    path: &Path,
    command: &str,
    input: &[u8],
    invocation: &Invocation,
    plugins: &Plugins<'_>,
) -> std::io::Result<Result<Vec<u8>, String>> {
    let mut child = Command::new(path)
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", &invocation.container_id)
        .env("CNI_NETNS", &invocation.netns)
        .env("CNI_IFNAME", INTERFACE)
        .env("CNI_ARGS", &invocation.arguments)
        .env(
            "CNI_PATH",
            std::env::join_paths(plugins.directories).map_err(std::io::Error::other)?,
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let write = async {
        if let Some(mut stdin) = stdin {
            // A plugin need not read it all: what it says then matters more.
            let _ = stdin.write_all(input).await;
        }
    };
    let (mut output, mut complaint) = (Vec::new(), Vec::new());
    let read = async {
        if let Some(stdout) = stdout {
            stdout.take(TEXT_BYTES).read_to_end(&mut output).await?;
        }
        Ok::<_, std::io::Error>(())
    };
    let listen = async {
        if let Some(stderr) = stderr {
            stderr.take(TEXT_BYTES).read_to_end(&mut complaint).await?;
        }
        Ok::<_, std::io::Error>(())
    };
    let ((), read, listened) = tokio::join!(write, read, listen);
    read.and(listened)?;
    let status = child.wait().await?;
    if status.success() {
        return Ok(Ok(output));
    }
    Ok(Err(said(&output, &complaint, &status.to_string())))
}

/// A failing plugin says why in JSON on standard output (CNI 1.0.0, "Error"); some only complain.
fn said(output: &[u8], complaint: &[u8], status: &str) -> String {
    let error: Option<Value> = serde_json::from_slice(output).ok();
    let word = |key: &str| {
        let found = error
            .as_ref()
            .and_then(|error| error.get(key))
            .and_then(Value::as_str);
        found.unwrap_or_default().to_owned()
    };
    let told = [word("msg"), word("details"), excerpt(complaint)];
    let told: Vec<_> = told.into_iter().filter(|text| !text.is_empty()).collect();
    if told.is_empty() {
        return status.to_owned();
    }
    told.join(": ")
}

fn excerpt(bytes: &[u8]) -> String {
    let end = bytes.len().min(SAID_BYTES);
    let text = String::from_utf8_lossy(bytes.get(..end).unwrap_or_default());
    text.trim().to_owned()
}

#[cfg(test)]
#[path = "cni_tests.rs"]
mod tests;
