// SPDX-License-Identifier: Apache-2.0
//! Who serves which pods: this runtime, or another CRI server to which the administrator delegates them.
//!
//! Only this configuration decides where pods may go. A pod can choose between the handlers that are named here, and
//! nothing else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::raw::RawRuntime;

/// This runtime's own handler. A RuntimeClass names it.
pub const HANDLER: &str = "bulkhead";
const SCHEME: &str = "unix://";
/// The longest handler that Kubernetes accepts in a RuntimeClass: a DNS label.
const NAME_BYTES: usize = 63;

/// Who serves a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handler {
    Bulkhead,
    /// The name of a delegate.
    Delegate(String),
}

/// Who serves which pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runtimes {
    /// Who serves pods that name no handler.
    pub default: Handler,
    /// The delegate that serves pods that name no handler and need the host's network, PID or IPC namespace.
    pub host_namespaces: Option<String>,
    /// By the name of the RuntimeClass handler.
    pub delegates: BTreeMap<String, DelegateConfig>,
}

/// A CRI server that serves pods of one RuntimeClass handler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DelegateConfig {
    pub socket: PathBuf,
    /// The handler that is passed on. The empty one is that server's default.
    pub handler: String,
}

/// Why the runtimes cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimesError {
    #[error("{key} is {name:?}, but there is only {known:?}: add the table [runtimes.{name}]")]
    Unknown {
        key: &'static str,
        name: String,
        known: Vec<String>,
    },
    #[error(
        "host_namespaces_handler is {HANDLER:?}, whose pods cannot share the host's namespaces: name one of [runtimes], \
         or leave the key out"
    )]
    NoHostNamespaces,
    #[error(
        "[runtimes.{HANDLER}]: this is the name of this runtime's own handler, choose another one"
    )]
    Reserved,
    #[error(
        "[runtimes.{name:?}]: a handler's name has 1 to {NAME_BYTES} lower-case letters, digits and dashes, as in a \
         RuntimeClass"
    )]
    Name { name: String },
    #[error("runtimes.{name}.cri is {cri:?}, but it must be {SCHEME} with an absolute path")]
    Socket { name: String, cri: String },
    #[error("runtimes.{name}.cri is this daemon's own socket: pods would be passed on for ever")]
    Own { name: String },
}

impl Runtimes {
    pub(super) fn check(
        default: Option<String>,
        host_namespaces: Option<String>,
        runtimes: BTreeMap<String, RawRuntime>,
        own_socket: &Path,
    ) -> Result<Self, RuntimesError> {
        let own_socket = resolved(own_socket);
        let delegates = runtimes
            .into_iter()
            .map(|(name, raw)| {
                check_name(&name)?;
                let socket = socket(&name, raw.cri)?;
                if socket == own_socket {
                    return Err(RuntimesError::Own { name });
                }
                let handler = raw.handler;
                Ok((name, DelegateConfig { socket, handler }))
            })
            .collect::<Result<BTreeMap<_, _>, _>>()?;
        let known = |key, name: String| {
            if name == HANDLER {
                return Ok(Handler::Bulkhead);
            }
            if delegates.contains_key(&name) {
                return Ok(Handler::Delegate(name));
            }
            let own = [HANDLER.to_owned()].into_iter();
            Err(RuntimesError::Unknown {
                key,
                name,
                known: own.chain(delegates.keys().cloned()).collect(),
            })
        };
        let default = match default {
            None => Handler::Bulkhead,
            Some(name) => known("default_handler", name)?,
        };
        let host_namespaces = match host_namespaces {
            None => None,
            Some(name) => match known("host_namespaces_handler", name)? {
                Handler::Bulkhead => return Err(RuntimesError::NoHostNamespaces),
                Handler::Delegate(name) => Some(name),
            },
        };
        Ok(Self {
            default,
            host_namespaces,
            delegates,
        })
    }
}

fn check_name(name: &str) -> Result<(), RuntimesError> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if name == HANDLER {
        return Err(RuntimesError::Reserved);
    }
    if name.is_empty() || name.len() > NAME_BYTES || !name.bytes().all(allowed) {
        let name = name.to_owned();
        return Err(RuntimesError::Name { name });
    }
    Ok(())
}

fn socket(name: &str, cri: String) -> Result<PathBuf, RuntimesError> {
    let path = cri.strip_prefix(SCHEME).map(Path::new);
    match path.filter(|path| path.is_absolute()) {
        Some(path) => Ok(resolved(path)),
        None => Err(RuntimesError::Socket {
            name: name.to_owned(),
            cri,
        }),
    }
}

/// The path without links in its directories, so that two names of one socket are the same path. The socket, and the
/// last directories, need not exist yet.
fn resolved(path: &Path) -> PathBuf {
    let known = path
        .ancestors()
        .find_map(|above| Some((above, above.canonicalize().ok()?)));
    match known {
        Some((above, real)) => match path.strip_prefix(above) {
            Ok(rest) if rest.as_os_str().is_empty() => real,
            Ok(rest) => real.join(rest),
            Err(_) => path.to_owned(),
        },
        None => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(
        default: &str,
        host: Option<&str>,
        runtimes: &[(&str, &str)],
    ) -> Result<Runtimes, RuntimesError> {
        let runtimes = runtimes.iter().map(|(name, cri)| {
            let (cri, handler) = ((*cri).to_owned(), String::new());
            ((*name).to_owned(), RawRuntime { cri, handler })
        });
        Runtimes::check(
            Some(default.to_owned()),
            host.map(ToOwned::to_owned),
            runtimes.collect(),
            Path::new("/no/own.sock"),
        )
    }

    #[test]
    fn handlers_are_those_that_have_a_table_and_bulkhead() {
        let runc = [("runc", "unix:///no/such/containerd.sock")];
        let found = check("runc", Some("runc"), &runc).unwrap();
        assert_eq!(found.default, Handler::Delegate("runc".into()));
        assert_eq!(found.host_namespaces.as_deref(), Some("runc"));
        let socket = &found.delegates["runc"].socket;
        assert_eq!(socket, Path::new("/no/such/containerd.sock"));
        let found = check("bulkhead", None, &[]).unwrap();
        assert_eq!(found.default, Handler::Bulkhead);
        assert!(found.delegates.is_empty());
    }

    #[test]
    fn mistakes_name_their_key() {
        let runc = [("runc", "unix:///c.sock")];
        for (default, host, runtimes, words) in [
            ("kata", None, &runc[..], "default_handler is \"kata\""),
            ("", None, &runc, "default_handler is \"\""),
            (
                "runc",
                Some("kata"),
                &runc,
                "host_namespaces_handler is \"kata\"",
            ),
            (
                "runc",
                Some("bulkhead"),
                &runc,
                "host_namespaces_handler is \"bulkhead\"",
            ),
            (
                "bulkhead",
                None,
                &[("bulkhead", "unix:///c")],
                "[runtimes.bulkhead]",
            ),
            ("bulkhead", None, &[("Runc", "unix:///c")], "Runc"),
            (
                "bulkhead",
                None,
                &[("runc", "/c.sock")],
                "runtimes.runc.cri",
            ),
            (
                "bulkhead",
                None,
                &[("runc", "unix://c.sock")],
                "runtimes.runc.cri",
            ),
            (
                "bulkhead",
                None,
                &[("runc", "tcp:///c.sock")],
                "runtimes.runc.cri",
            ),
            (
                "bulkhead",
                None,
                &[("runc", "unix:///no/own.sock")],
                "own socket",
            ),
        ] {
            let error = check(default, host, runtimes).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_socket_has_one_path_whatever_links_lead_to_it() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().join("run");
        std::fs::create_dir(&real).unwrap();
        let link = directory.path().join("var");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let rest = "containerd/containerd.sock";
        assert_eq!(resolved(&link.join(rest)), resolved(&real.join(rest)));
    }
}
