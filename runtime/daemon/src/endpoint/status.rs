// SPDX-License-Identifier: Apache-2.0
//! The status of the node: Bulkhead's own, with what each delegate says of itself.
//!
//! A delegate that is down leaves the conditions `RuntimeReady` and `NetworkReady` true, so that kubelet goes on with
//! Bulkhead's pods. It has a condition of its own.

use bulkhead_delegate::{Delegate, Health, Report};
use bulkhead_proto::cri;

use super::sides::Sides;

/// Adds the delegates to Bulkhead's own status.
pub fn merge(mut status: cri::StatusResponse, sides: &Sides, verbose: bool) -> cri::StatusResponse {
    let conditions = &mut status.status.get_or_insert_default().conditions;
    let features = status.features.get_or_insert_default();
    // Host-network pods are never Bulkhead's, so the delegates alone decide whether they can have user namespaces.
    features.user_namespaces_host_network = true;
    for (name, passed, delegate) in sides.handlers() {
        let report = delegate.report();
        let of_handler = report.features(&passed.handler);
        conditions.push(condition(name, delegate, &report));
        if sides.default() == Some(name) {
            let mut handlers = status.runtime_handlers.iter_mut();
            if let Some(default) = handlers.find(|handler| handler.name.is_empty()) {
                default.features = Some(of_handler);
            }
        }
        status.runtime_handlers.push(cri::RuntimeHandler {
            name: name.to_owned(),
            features: Some(of_handler),
        });
        // These are the node's: true only if every side can do it.
        let theirs = &report.features;
        features.supplemental_groups_policy &= theirs.supplemental_groups_policy;
        features.user_namespaces_host_network &= theirs.user_namespaces_host_network;
        features.mount_options &= theirs.mount_options;
        if verbose {
            let details = details(&passed.handler, delegate, &report);
            status.info.insert(condition_type(name), details);
        }
    }
    status
}

fn condition_type(name: &str) -> String {
    format!("Delegate/{name}")
}

fn condition(name: &str, delegate: &Delegate, report: &Report) -> cri::RuntimeCondition {
    let delegate_name = format!("the delegate {name} at {}", delegate.socket().display());
    let problem = match (delegate.health(), report.unready()) {
        (Health::Unknown, _) => Some(("DelegateUnknown", "it was not asked yet".to_owned())),
        (Health::Slow, _) => Some((
            "DelegateSlow",
            format!("{delegate_name} does not answer in time"),
        )),
        (Health::Down { why }, _) => Some((
            "DelegateDown",
            format!("{delegate_name} does not answer: {why}"),
        )),
        (Health::Up, unready) => match (&report.refusal, unready) {
            (Some(why), _) => Some(("DelegateRefuses", why.clone())),
            (None, Some(unready)) => Some((
                "DelegateNotReady",
                format!(
                    "{}: {}: {}",
                    unready.r#type, unready.reason, unready.message
                ),
            )),
            (None, None) => None,
        },
    };
    let (reason, message) = problem.clone().unwrap_or_default();
    cri::RuntimeCondition {
        r#type: condition_type(name),
        status: problem.is_none(),
        reason: reason.to_owned(),
        message,
    }
}

/// What `crictl info` shows.
fn details(handler: &str, delegate: &Delegate, report: &Report) -> String {
    let conditions = report.conditions.iter().map(|condition| {
        serde_json::json!({
            "type": condition.r#type,
            "status": condition.status,
            "reason": condition.reason,
            "message": condition.message,
        })
    });
    serde_json::json!({
        "cri": delegate.socket(),
        "handler": handler,
        "health": format!("{:?}", delegate.health()),
        "runtime": report.runtime,
        "conditions": conditions.collect::<Vec<_>>(),
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::super::sides::tests::sides;
    use super::*;
    use bulkhead_delegate::fake::Fake;

    fn ours() -> cri::StatusResponse {
        let handler = |name: &str| cri::RuntimeHandler {
            name: name.into(),
            features: Some(cri::RuntimeHandlerFeatures {
                recursive_read_only_mounts: true,
                user_namespaces: true,
            }),
        };
        cri::StatusResponse {
            runtime_handlers: vec![handler(""), handler("bulkhead")],
            features: Some(cri::RuntimeFeatures {
                supplemental_groups_policy: true,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn theirs() -> cri::StatusResponse {
        cri::StatusResponse {
            status: Some(cri::RuntimeStatus {
                conditions: vec![cri::RuntimeCondition {
                    r#type: "NetworkReady".into(),
                    status: false,
                    reason: "NetworkPluginNotReady".into(),
                    message: "no cni".into(),
                }],
            }),
            runtime_handlers: vec![cri::RuntimeHandler {
                name: "runc".into(),
                features: Some(cri::RuntimeHandlerFeatures {
                    recursive_read_only_mounts: false,
                    user_namespaces: true,
                }),
            }],
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn each_handler_has_its_true_features_and_each_delegate_a_condition() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cri.sock");
        let fake = Fake::new("fake");
        fake.world().status = theirs();
        let running = fake.serve(&socket);
        let path = socket.to_str().unwrap();
        let delegates = [("trusted", path, "runc"), ("other", path, "unknown")];
        let sides = sides("trusted", None, &delegates);
        let shown = |status: &cri::StatusResponse| -> Vec<(String, bool)> {
            let handlers = status.runtime_handlers.iter();
            let shown =
                handlers.map(|one| (one.name.clone(), one.features.unwrap().user_namespaces));
            shown.collect()
        };
        let condition = |status: &cri::StatusResponse| {
            let conditions = &status.status.as_ref().unwrap().conditions;
            assert_eq!(conditions.len(), 2);
            let found = conditions
                .iter()
                .find(|one| one.r#type == "Delegate/trusted");
            found.cloned().unwrap()
        };
        let unknown = merge(ours(), &sides, false);
        assert!(!condition(&unknown).status);
        sides.delegates()[0].examine().await;
        let known = merge(ours(), &sides, true);
        let expected = [
            ("", true),
            ("bulkhead", true),
            ("other", false),
            ("trusted", true),
        ];
        let expected = expected.map(|(name, users)| (name.to_owned(), users));
        assert_eq!(shown(&known), expected);
        assert!(
            !known.runtime_handlers[0]
                .features
                .unwrap()
                .recursive_read_only_mounts
        );
        assert!(
            !known.features.unwrap().supplemental_groups_policy,
            "of every side"
        );
        let told = condition(&known);
        assert_eq!(
            (told.status, told.reason.as_str()),
            (false, "DelegateNotReady")
        );
        assert!(told.message.contains("no cni"), "{}", told.message);
        assert!(known.info["Delegate/trusted"].contains("fake 1"));
        fake.world().status.status = None;
        sides.delegates()[0].examine().await;
        assert!(condition(&merge(ours(), &sides, false)).status);
        drop(running);
        sides.delegates()[0].examine().await;
        let down = merge(ours(), &sides, false);
        assert_eq!(condition(&down).reason, "DelegateDown");
        assert_eq!(shown(&down), expected, "features stay known");
    }
}
