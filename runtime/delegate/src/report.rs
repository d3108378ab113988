// SPDX-License-Identifier: Apache-2.0
//! What a delegate said last about itself: its conditions, and what its handlers can do.

use std::collections::BTreeMap;

use bulkhead_proto::cri;

use crate::error::{DelegateError, bounded};

/// How many handlers and conditions of a server are kept.
const MOST: usize = 100;
const READY: &str = "RuntimeReady";

/// What a server said. Its texts are printable and bounded.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The runtime's name and version.
    pub runtime: String,
    pub conditions: Vec<cri::RuntimeCondition>,
    /// By handler. An older server says nothing about them.
    handlers: BTreeMap<String, cri::RuntimeHandlerFeatures>,
    pub features: cri::RuntimeFeatures,
    /// Why the server refused to give its status.
    pub refusal: Option<String>,
}

impl Report {
    /// What is known after the server was asked again. If it did not answer, what it can do is still known.
    pub(crate) fn after(
        &self,
        status: Result<cri::StatusResponse, DelegateError>,
        version: Option<cri::VersionResponse>,
    ) -> Self {
        let status = match status {
            Ok(status) => status,
            Err(error) => {
                return Self {
                    refusal: error.refusal().map(|_| error.to_string()),
                    ..self.clone()
                };
            }
        };
        let runtime = version.map(|version| {
            bounded(&format!(
                "{} {}",
                version.runtime_name, version.runtime_version
            ))
        });
        let conditions = status.status.unwrap_or_default().conditions;
        let handlers = status.runtime_handlers.into_iter().take(MOST);
        Self {
            runtime: runtime.unwrap_or_else(|| self.runtime.clone()),
            conditions: conditions
                .into_iter()
                .take(MOST)
                .map(|condition| cri::RuntimeCondition {
                    r#type: bounded(&condition.r#type),
                    status: condition.status,
                    reason: bounded(&condition.reason),
                    message: bounded(&condition.message),
                })
                .collect(),
            handlers: handlers
                .map(|handler| (handler.name, handler.features.unwrap_or_default()))
                .collect(),
            features: status.features.unwrap_or_default(),
            refusal: None,
        }
    }

    /// What a handler of the server can do. What the server does not claim, it cannot do.
    pub fn features(&self, handler: &str) -> cri::RuntimeHandlerFeatures {
        self.handlers.get(handler).copied().unwrap_or_default()
    }

    /// The first condition that is false; that of the runtime before others.
    pub fn unready(&self) -> Option<&cri::RuntimeCondition> {
        let mut unready: Vec<_> = self.conditions.iter().filter(|one| !one.status).collect();
        unready.sort_by_key(|condition| condition.r#type != READY);
        unready.first().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_can_do_stays_known_while_it_is_down() {
        let status = cri::StatusResponse {
            runtime_handlers: vec![cri::RuntimeHandler {
                name: "runc".into(),
                features: Some(cri::RuntimeHandlerFeatures {
                    recursive_read_only_mounts: true,
                    user_namespaces: false,
                }),
            }],
            ..Default::default()
        };
        let report = Report::default().after(Ok(status), None);
        let down = DelegateError::Down {
            name: "runc".into(),
            why: "no such file".into(),
        };
        let report = report.after(Err(down), None);
        assert!(report.features("runc").recursive_read_only_mounts);
        assert!(!report.features("other").recursive_read_only_mounts);
        assert_eq!(report.refusal, None);
    }

    #[test]
    fn a_condition_that_is_false_is_told_printable_and_the_runtimes_first() {
        let condition = |name: &str, status, message: &str| cri::RuntimeCondition {
            r#type: name.into(),
            status,
            reason: String::new(),
            message: message.into(),
        };
        let conditions = vec![
            condition("NetworkReady", false, "no cni"),
            condition("RuntimeReady", false, "not\x1byet"),
        ];
        let status = cri::StatusResponse {
            status: Some(cri::RuntimeStatus { conditions }),
            ..Default::default()
        };
        let report = Report::default().after(Ok(status), None);
        assert_eq!(report.unready().unwrap().message, "not yet");
        assert!(Report::default().unready().is_none());
    }
}
