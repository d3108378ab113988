// SPDX-License-Identifier: Apache-2.0
//! Decides which pods and containers are in a list.

use std::collections::HashMap;

use bulkhead_proto::cri::{
    ContainerFilter, ContainerState, ContainerStatsFilter, PodSandboxFilter, PodSandboxState,
    PodSandboxStatsFilter,
};

use super::show;
use crate::pod::life::record::{ContainerRecord, PodRecord};
use crate::pod::life::spec::Labels;

/// Whether a pod passes the filter. An empty filter passes everything. The filter's id may be a prefix.
pub fn pod(filter: Option<&PodSandboxFilter>, pod: &PodRecord) -> bool {
    let Some(filter) = filter else {
        return true;
    };
    let state = filter
        .state
        .as_ref()
        .map(bulkhead_proto::cri::PodSandboxStateValue::state);
    pod.id.starts_with(&filter.id)
        && state.is_none_or(|state: PodSandboxState| state == show::pod_state(&pod.state))
        && labels(&filter.label_selector, &pod.spec.labels)
}

pub fn container(filter: Option<&ContainerFilter>, container: &ContainerRecord) -> bool {
    let Some(filter) = filter else {
        return true;
    };
    let state = filter
        .state
        .as_ref()
        .map(bulkhead_proto::cri::ContainerStateValue::state);
    container.id.starts_with(&filter.id)
        && container.pod_id.starts_with(&filter.pod_sandbox_id)
        && state
            .is_none_or(|state: ContainerState| state == show::container_state(&container.state))
        && labels(&filter.label_selector, &container.spec.labels)
}

/// The same for statistics, whose filter has no state.
pub fn pod_stats(filter: Option<&PodSandboxStatsFilter>, record: &PodRecord) -> bool {
    filter.is_none_or(|filter| {
        record.id.starts_with(&filter.id) && labels(&filter.label_selector, &record.spec.labels)
    })
}

pub fn container_stats(filter: Option<&ContainerStatsFilter>, record: &ContainerRecord) -> bool {
    filter.is_none_or(|filter| {
        record.id.starts_with(&filter.id)
            && record.pod_id.starts_with(&filter.pod_sandbox_id)
            && labels(&filter.label_selector, &record.spec.labels)
    })
}

/// Whether all labels of the selector exist, with the same values.
fn labels(selector: &HashMap<String, String>, labels: &Labels) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixtures;
    use bulkhead_proto::cri::{ContainerStateValue, PodSandboxStateValue};

    fn record() -> PodRecord {
        PodRecord {
            id: "abcdef".into(),
            ..fixtures::pod_record()
        }
    }

    #[test]
    fn pods_pass_by_id_prefix_state_and_every_label() {
        let state = |state: PodSandboxState| {
            Some(PodSandboxStateValue {
                state: state.into(),
            })
        };
        let label = |value: &str| [("app".to_owned(), value.to_owned())].into();
        let ok = PodSandboxFilter::default();
        for (case, filter, expected) in [
            ("empty", ok.clone(), true),
            (
                "id",
                PodSandboxFilter {
                    id: "abc".into(),
                    ..ok.clone()
                },
                true,
            ),
            (
                "other id",
                PodSandboxFilter {
                    id: "bcd".into(),
                    ..ok.clone()
                },
                false,
            ),
            (
                "ready",
                PodSandboxFilter {
                    state: state(PodSandboxState::SandboxReady),
                    ..ok.clone()
                },
                true,
            ),
            (
                "not ready",
                PodSandboxFilter {
                    state: state(PodSandboxState::SandboxNotready),
                    ..ok.clone()
                },
                false,
            ),
            (
                "label",
                PodSandboxFilter {
                    label_selector: label("web"),
                    ..ok.clone()
                },
                true,
            ),
            (
                "other label",
                PodSandboxFilter {
                    label_selector: label("db"),
                    ..ok
                },
                false,
            ),
        ] {
            assert_eq!(pod(Some(&filter), &record()), expected, "{case}");
        }
        assert!(pod(None, &record()));
    }

    #[test]
    fn containers_pass_by_their_pod_and_state_too() {
        let container_record = ContainerRecord {
            id: "1234".into(),
            pod_id: "abcdef".into(),
            ..fixtures::container_record()
        };
        let state = |state: ContainerState| {
            Some(ContainerStateValue {
                state: state.into(),
            })
        };
        let ok = ContainerFilter::default();
        for (case, filter, expected) in [
            ("empty", ok.clone(), true),
            (
                "pod",
                ContainerFilter {
                    pod_sandbox_id: "abcdef".into(),
                    ..ok.clone()
                },
                true,
            ),
            (
                "other pod",
                ContainerFilter {
                    pod_sandbox_id: "ffff".into(),
                    ..ok.clone()
                },
                false,
            ),
            (
                "created",
                ContainerFilter {
                    state: state(ContainerState::ContainerCreated),
                    ..ok.clone()
                },
                true,
            ),
            (
                "running",
                ContainerFilter {
                    state: state(ContainerState::ContainerRunning),
                    ..ok
                },
                false,
            ),
        ] {
            assert_eq!(
                container(Some(&filter), &container_record),
                expected,
                "{case}"
            );
        }
    }
}
