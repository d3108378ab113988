// SPDX-License-Identifier: Apache-2.0
//! The sides of the endpoint, and which of them serves a new pod.
//!
//! Only the configuration decides where pods go. A pod that names a handler goes to that handler or nowhere.

use std::collections::BTreeMap;
use std::sync::Arc;

use bulkhead_delegate::{Delegate, Limits};
use bulkhead_proto::cri;
use tonic::Status;

use crate::config::{HANDLER, Handler, Runtimes};

/// The delegates of a node, and the rules for new pods. Clones share the delegates.
#[derive(Clone, Debug)]
pub struct Sides {
    runtimes: Runtimes,
    /// One for each socket: several handlers may belong to one server.
    delegates: Arc<[Delegate]>,
    /// By name.
    handlers: BTreeMap<String, Passed>,
}

/// A handler that a delegate serves.
#[derive(Clone, Debug)]
pub struct Passed {
    /// The index of the delegate.
    pub delegate: usize,
    /// The handler that is passed on to it.
    pub handler: String,
}

/// Who serves a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Side {
    Ours,
    /// The index of the delegate, and the handler that is passed on.
    Delegate(usize, String),
}

impl Side {
    /// Whether both have the same pods and images, whatever handler is passed on.
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Ours, Self::Ours) => true,
            (Self::Delegate(one, _), Self::Delegate(other, _)) => one == other,
            _ => false,
        }
    }
}

impl Sides {
    pub fn new(runtimes: Runtimes, limits: Limits) -> Self {
        let mut sockets: Vec<(std::path::PathBuf, Vec<String>)> = Vec::new();
        let mut handlers = BTreeMap::new();
        for (name, config) in &runtimes.delegates {
            let known = sockets.iter().position(|(path, _)| *path == config.socket);
            let delegate = known.unwrap_or_else(|| {
                sockets.push((config.socket.clone(), Vec::new()));
                sockets.len() - 1
            });
            if let Some((_, names)) = sockets.get_mut(delegate) {
                names.push(name.clone());
            }
            let handler = config.handler.clone();
            handlers.insert(name.clone(), Passed { delegate, handler });
        }
        let delegates = sockets
            .into_iter()
            .map(|(socket, names)| Delegate::new(names.join(","), socket, limits))
            .collect();
        Self {
            runtimes,
            delegates,
            handlers,
        }
    }

    /// The name of the delegate that serves pods without a handler, if it is not Bulkhead.
    pub fn default(&self) -> Option<&str> {
        match &self.runtimes.default {
            Handler::Bulkhead => None,
            Handler::Delegate(name) => Some(name),
        }
    }

    pub fn delegates(&self) -> &[Delegate] {
        &self.delegates
    }

    /// All sides. The one that serves by default is the first: if a name means different images, its image counts.
    pub fn all(&self) -> Vec<Side> {
        let delegates = (0..self.delegates.len()).map(|index| Side::Delegate(index, String::new()));
        let mut all: Vec<_> = std::iter::once(Side::Ours).chain(delegates).collect();
        let default = self.of_handler("").ok();
        all.sort_by_key(|side| {
            default
                .as_ref()
                .is_none_or(|default| !side.is_same(default))
        });
        all
    }

    /// The delegate that is this side.
    pub fn delegate_at(&self, side: &Side) -> Option<&Delegate> {
        match side {
            Side::Ours => None,
            Side::Delegate(index, _) => self.delegates.get(*index),
        }
    }

    /// The handlers that delegates serve, by name.
    pub fn handlers(&self) -> impl Iterator<Item = (&str, &Passed, &Delegate)> {
        self.handlers.iter().filter_map(|(name, passed)| {
            let delegate = self.delegates.get(passed.delegate)?;
            Some((name.as_str(), passed, delegate))
        })
    }

    /// Who serves what is meant for this handler. The empty one is the default.
    pub fn of_handler(&self, handler: &str) -> Result<Side, Status> {
        if handler == HANDLER {
            return Ok(Side::Ours);
        }
        let name: &str = match (handler, &self.runtimes.default) {
            ("", Handler::Bulkhead) => return Ok(Side::Ours),
            ("", Handler::Delegate(name)) => name,
            (name, _) => name,
        };
        self.delegate(name).ok_or_else(|| {
            let known: Vec<_> = ["", HANDLER]
                .into_iter()
                .chain(self.handlers.keys().map(String::as_str))
                .collect();
            Status::invalid_argument(format!(
                "runtime handler {handler:?} is not one of this runtime's handlers: {known:?}"
            ))
        })
    }

    /// Who serves a new pod.
    pub fn of_new_pod(
        &self,
        handler: &str,
        config: Option<&cri::PodSandboxConfig>,
    ) -> Result<Side, Status> {
        let host = self.runtimes.host_namespaces.as_ref();
        if let Some(name) = host.filter(|_| handler.is_empty() && needs_host(config))
            && let Some(side) = self.delegate(name)
        {
            return Ok(side);
        }
        self.of_handler(handler)
    }

    /// The handler that kubelet sent for a pod that a delegate shows with the handler `shown`, as far as it can be told
    /// afterwards.
    pub fn as_sent(&self, delegate: usize, shown: &str) -> String {
        let is_it = |passed: &Passed| passed.delegate == delegate && passed.handler == shown;
        if let Handler::Delegate(default) = &self.runtimes.default
            && self.handlers.get(default).is_some_and(is_it)
        {
            return String::new();
        }
        let found = self.handlers.iter().find(|(_, passed)| is_it(passed));
        found.map_or(shown, |(name, _)| name).to_owned()
    }

    /// The handler that a delegate knows by another name, in what is passed on to it.
    pub fn as_passed(&self, delegate: usize, sent: &str) -> String {
        let passed = self.handlers.get(sent);
        let passed = passed.filter(|passed| passed.delegate == delegate);
        passed.map_or(sent, |passed| &passed.handler).to_owned()
    }

    fn delegate(&self, name: &str) -> Option<Side> {
        let passed = self.handlers.get(name)?;
        Some(Side::Delegate(passed.delegate, passed.handler.clone()))
    }
}

/// Whether a pod needs the host's network, PID or IPC namespace.
fn needs_host(config: Option<&cri::PodSandboxConfig>) -> bool {
    let linux = config.and_then(|config| config.linux.as_ref());
    let context = linux.and_then(|linux| linux.security_context.as_ref());
    let options = context.and_then(|context| context.namespace_options.as_ref());
    options.is_some_and(|options| {
        [options.network(), options.pid(), options.ipc()].contains(&cri::NamespaceMode::Node)
    })
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::config::DelegateConfig;
    use std::time::Duration;

    pub fn sides(default: &str, host: Option<&str>, delegates: &[(&str, &str, &str)]) -> Sides {
        let delegates = delegates.iter().map(|(name, socket, handler)| {
            let config = DelegateConfig {
                socket: socket.into(),
                handler: (*handler).to_owned(),
            };
            ((*name).to_owned(), config)
        });
        let runtimes = Runtimes {
            default: match default {
                HANDLER => Handler::Bulkhead,
                name => Handler::Delegate(name.to_owned()),
            },
            host_namespaces: host.map(ToOwned::to_owned),
            delegates: delegates.collect(),
        };
        let limits = Limits {
            list: Duration::from_secs(1),
            ..Limits::default()
        };
        Sides::new(runtimes, limits)
    }

    fn pod(network: cri::NamespaceMode, pid: cri::NamespaceMode) -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(cri::NamespaceOption {
                        network: network.into(),
                        pid: pid.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn a_new_pod_goes_where_its_handler_says_and_the_administrator_allowed() {
        use cri::NamespaceMode::{Node, Pod};
        let runc = [("runc", "/c.sock", "")];
        let delegated = || Some(Side::Delegate(0, String::new()));
        let (plain, network, pid) = (pod(Pod, Pod), pod(Node, Pod), pod(Pod, Node));
        for (case, default, host, handler, config, expected) in [
            ("default", "bulkhead", None, "", &plain, Some(Side::Ours)),
            ("by name", "bulkhead", None, "runc", &plain, delegated()),
            ("other default", "runc", None, "", &plain, delegated()),
            (
                "ours by name",
                "runc",
                None,
                "bulkhead",
                &plain,
                Some(Side::Ours),
            ),
            (
                "host network",
                "bulkhead",
                Some("runc"),
                "",
                &network,
                delegated(),
            ),
            ("host PID", "bulkhead", Some("runc"), "", &pid, delegated()),
            (
                "not host",
                "bulkhead",
                Some("runc"),
                "",
                &plain,
                Some(Side::Ours),
            ),
            (
                "not allowed",
                "bulkhead",
                None,
                "",
                &network,
                Some(Side::Ours),
            ),
            (
                "explicit",
                "bulkhead",
                Some("runc"),
                "bulkhead",
                &network,
                Some(Side::Ours),
            ),
            ("unknown", "runc", Some("runc"), "kata", &network, None),
        ] {
            let sides = sides(default, host, &runc);
            let found = sides.of_new_pod(handler, Some(config)).ok();
            assert_eq!(found, expected, "{case}");
        }
    }

    #[tokio::test]
    async fn an_unknown_handlers_error_names_those_that_exist() {
        let sides = sides("bulkhead", None, &[("runc", "/c.sock", "")]);
        let error = sides.of_handler("kata").unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument);
        assert!(error.message().contains("\"kata\""), "{error}");
        assert!(
            error.message().contains("[\"\", \"bulkhead\", \"runc\"]"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn handlers_with_one_socket_share_a_delegate() {
        let sides = sides(
            "runc",
            None,
            &[
                ("gvisor", "/c.sock", "runsc"),
                ("other", "/o.sock", ""),
                ("runc", "/c.sock", ""),
            ],
        );
        assert_eq!(sides.delegates().len(), 2);
        assert_eq!(sides.delegates()[0].name(), "gvisor,runc");
        assert_eq!(sides.as_sent(0, "runsc"), "gvisor");
        assert_eq!(sides.as_sent(0, ""), "", "the default");
        assert_eq!(sides.as_sent(1, ""), "other");
        assert_eq!(sides.as_sent(1, "unknown"), "unknown");
        assert_eq!(sides.as_passed(0, "gvisor"), "runsc");
        assert_eq!(sides.as_passed(1, "gvisor"), "gvisor");
    }
}
