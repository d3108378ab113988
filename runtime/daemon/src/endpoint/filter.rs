// SPDX-License-Identifier: Apache-2.0
//! Decides which pods and containers of a delegate are in a list. All of them are asked for, so that what it listed last
//! is complete.

use std::collections::HashMap;

use bulkhead_proto::cri;

/// Whether a pod passes the filter. An empty filter passes everything. The filter's id may be a prefix.
pub fn pod(filter: Option<&cri::PodSandboxFilter>, pod: &cri::PodSandbox) -> bool {
    filter.is_none_or(|filter| {
        pod.id.starts_with(&filter.id)
            && filter.state.is_none_or(|wanted| wanted.state == pod.state)
            && labels(&filter.label_selector, &pod.labels)
    })
}

pub fn container(filter: Option<&cri::ContainerFilter>, container: &cri::Container) -> bool {
    filter.is_none_or(|filter| {
        container.id.starts_with(&filter.id)
            && container.pod_sandbox_id.starts_with(&filter.pod_sandbox_id)
            && filter
                .state
                .is_none_or(|wanted| wanted.state == container.state)
            && labels(&filter.label_selector, &container.labels)
    })
}

/// Whether all labels of the selector exist, with the same values.
fn labels(selector: &HashMap<String, String>, labels: &HashMap<String, String>) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_and_containers_pass_by_id_state_and_every_label() {
        let labelled: HashMap<_, _> = [("app".to_owned(), "web".to_owned())].into();
        let shown = cri::PodSandbox {
            id: "abcd".into(),
            labels: labelled.clone(),
            ..Default::default()
        };
        let other: HashMap<_, _> = [("app".to_owned(), "db".to_owned())].into();
        for (id, state, selector, expected) in [
            ("", None, HashMap::new(), true),
            ("abc", Some(0), labelled.clone(), true),
            ("bcd", None, HashMap::new(), false),
            ("", Some(1), HashMap::new(), false),
            ("", None, other, false),
        ] {
            let filter = cri::PodSandboxFilter {
                id: id.into(),
                state: state.map(|state| cri::PodSandboxStateValue { state }),
                label_selector: selector,
            };
            assert_eq!(pod(Some(&filter), &shown), expected, "{filter:?}");
        }
        let shown = cri::Container {
            pod_sandbox_id: "abcd".into(),
            ..Default::default()
        };
        let of = |pod: &str| cri::ContainerFilter {
            pod_sandbox_id: pod.into(),
            ..Default::default()
        };
        assert!(container(Some(&of("ab")), &shown));
        assert!(!container(Some(&of("b")), &shown));
        assert!(container(None, &shown));
    }
}
