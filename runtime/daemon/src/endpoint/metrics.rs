// SPDX-License-Identifier: Apache-2.0
//! Metrics of all sides as one list with one set of descriptors.
//!
//! kubelet matches the values of a metric's labels with the descriptor's keys by their order. Two sides may describe a
//! metric of the same name differently; then the first description counts, and the values of the others are arranged
//! as it says.

use std::collections::HashMap;

use bulkhead_proto::cri;

/// The keys of each metric's labels, by the metric's name.
type Keys = HashMap<String, Vec<String>>;

/// Adds descriptors of metrics that are not described yet.
pub fn add_descriptors(all: &mut Vec<cri::MetricDescriptor>, others: Vec<cri::MetricDescriptor>) {
    let known = keys(all);
    let new = others.into_iter();
    all.extend(new.filter(|descriptor| !known.contains_key(&descriptor.name)));
}

fn keys(descriptors: &[cri::MetricDescriptor]) -> Keys {
    let keys = descriptors.iter();
    keys.map(|one| (one.name.clone(), one.label_keys.clone()))
        .collect()
}

/// Arranges the metrics of a side, which it describes by `own`, as `shown` describes them.
pub fn arrange(
    pods: &mut [cri::PodSandboxMetrics],
    own: &[cri::MetricDescriptor],
    shown: &[cri::MetricDescriptor],
) {
    let (own, shown) = (keys(own), keys(shown));
    for pod in pods {
        let containers = pod.container_metrics.iter_mut();
        let of_containers = containers.flat_map(|container| &mut container.metrics);
        for metric in pod.metrics.iter_mut().chain(of_containers) {
            if let (Some(from), Some(to)) = (own.get(&metric.name), shown.get(&metric.name))
                && from != to
            {
                metric.label_values = values(from, to, &metric.label_values);
            }
        }
    }
}

/// A label that the metric does not have is empty, which Prometheus takes for the same.
fn values(from: &[String], to: &[String], values: &[String]) -> Vec<String> {
    let value = |key: &String| {
        let at = from.iter().position(|own| own == key);
        at.and_then(|at| values.get(at).cloned())
            .unwrap_or_default()
    };
    to.iter().map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(name: &str, keys: &[&str]) -> cri::MetricDescriptor {
        cri::MetricDescriptor {
            name: name.into(),
            help: String::new(),
            label_keys: keys.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn values_are_arranged_as_the_first_side_describes_them() {
        let mut shown = vec![descriptor("cpu", &["id", "name"])];
        let own = vec![
            descriptor("cpu", &["name", "image", "id"]),
            descriptor("new", &["a"]),
        ];
        add_descriptors(&mut shown, own.clone());
        assert_eq!(shown.len(), 2);
        let metric = |name: &str, values: &[&str]| cri::Metric {
            name: name.into(),
            label_values: values.iter().map(ToString::to_string).collect(),
            ..Default::default()
        };
        let mut pods = vec![cri::PodSandboxMetrics {
            metrics: vec![metric("new", &["x"]), metric("unknown", &["y"])],
            container_metrics: vec![cri::ContainerMetrics {
                metrics: vec![metric("cpu", &["n", "i", "c1"]), metric("cpu", &["n"])],
                ..Default::default()
            }],
            ..Default::default()
        }];
        arrange(&mut pods, &own, &shown);
        assert_eq!(pods[0].metrics[0].label_values, ["x"]);
        assert_eq!(pods[0].metrics[1].label_values, ["y"]);
        let of_container = &pods[0].container_metrics[0].metrics;
        assert_eq!(of_container[0].label_values, ["c1", "n"]);
        assert_eq!(of_container[1].label_values, ["", "n"]);
    }
}
