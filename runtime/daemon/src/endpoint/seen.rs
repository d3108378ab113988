// SPDX-License-Identifier: Apache-2.0
//! Where the pods are for which kubelet asks about images.
//!
//! `ImageStatus` names no pod. But kubelet sends the pod's annotations in it, as it does in `RunPodSandbox`, and one of
//! them is the time when it first saw the pod, to the nanosecond. A kubelet that was started again sees its pods anew;
//! then the first `CreateContainer` tells which pod it is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_proto::cri;

use super::sides::Side;

/// kubelet's annotation with the time. It overwrites what a pod's author has written there.
const SEEN: &str = "kubernetes.io/config.seen";
/// The longest time that is remembered: RFC 3339 with nanoseconds and a time zone is shorter.
const TIME_BYTES: usize = 64;
/// How many pods are remembered. A node has some hundreds.
const MOST: usize = 10_000;

/// The sides of pods, by the time when kubelet first saw them. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct SeenPods(Arc<Mutex<HashMap<String, Side>>>);

impl SeenPods {
    /// Remembers that a pod with these annotations is on this side.
    pub fn learn(&self, annotations: &HashMap<String, String>, side: &Side) {
        let Some(time) = time(annotations) else {
            return;
        };
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MOST {
            // Pods that still run are found in the lists of pods again.
            known.clear();
        }
        known.insert(time.to_owned(), side.clone());
    }

    pub fn find(&self, annotations: &HashMap<String, String>) -> Option<Side> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(time(annotations)?).cloned()
    }
}

/// The pod for which something is asked, as far as a request names it.
#[derive(Clone, Copy, Debug)]
pub struct Named<'a> {
    annotations: &'a HashMap<String, String>,
    metadata: Option<&'a cri::PodSandboxMetadata>,
}

impl<'a> Named<'a> {
    /// `None` if the request names no pod.
    pub fn of(spec: &'a cri::ImageSpec, pod: Option<&'a cri::PodSandboxConfig>) -> Option<Self> {
        let of_pod = pod.map(|pod| &pod.annotations);
        let named = Self {
            annotations: of_pod
                .filter(|annotations| time(annotations).is_some())
                .unwrap_or(&spec.annotations),
            metadata: pod.and_then(|pod| pod.metadata.as_ref()),
        };
        let anything = named.metadata.is_some() || time(named.annotations).is_some();
        anything.then_some(named)
    }

    pub fn annotations(&self) -> &'a HashMap<String, String> {
        self.annotations
    }

    /// Whether it is this pod. Its name decides, if the request has it.
    pub fn is(&self, pod: &cri::PodSandbox) -> bool {
        if let (Some(named), Some(found)) = (self.metadata, &pod.metadata) {
            return (&named.uid, &named.name, &named.namespace)
                == (&found.uid, &found.name, &found.namespace);
        }
        let named = time(self.annotations);
        named.is_some() && named == time(&pod.annotations)
    }
}

fn time(annotations: &HashMap<String, String>) -> Option<&str> {
    let time = annotations.get(SEEN)?;
    (!time.is_empty() && time.len() <= TIME_BYTES).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(time: &str) -> HashMap<String, String> {
        [(SEEN.to_owned(), time.to_owned())].into()
    }

    fn metadata(uid: &str) -> Option<cri::PodSandboxMetadata> {
        Some(cri::PodSandboxMetadata {
            name: "pod".into(),
            uid: uid.into(),
            ..Default::default()
        })
    }

    #[test]
    fn a_pod_is_found_by_the_time_when_kubelet_saw_it() {
        let seen = SeenPods::default();
        let side = Side::Delegate(0, String::new());
        seen.learn(&annotations("1"), &side);
        seen.learn(&annotations("2"), &Side::Ours);
        seen.learn(&HashMap::new(), &side);
        seen.learn(&annotations(&"9".repeat(TIME_BYTES + 1)), &side);
        assert_eq!(seen.find(&annotations("1")), Some(side));
        assert_eq!(seen.find(&annotations("2")), Some(Side::Ours));
        assert_eq!(seen.find(&annotations("3")), None);
        assert_eq!(seen.find(&HashMap::new()), None);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let seen = SeenPods::default();
        for time in 0..=MOST {
            seen.learn(&annotations(&time.to_string()), &Side::Ours);
        }
        assert_eq!(seen.0.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_request_names_a_pod_by_time_or_by_metadata() {
        let spec = |time: &str| cri::ImageSpec {
            annotations: annotations(time),
            ..Default::default()
        };
        let pod = |time: &str, uid: &str| cri::PodSandbox {
            annotations: annotations(time),
            metadata: metadata(uid),
            ..Default::default()
        };
        let config = cri::PodSandboxConfig {
            metadata: metadata("a"),
            ..Default::default()
        };
        assert!(Named::of(&cri::ImageSpec::default(), None).is_none());
        let seen = spec("1");
        let named = Named::of(&seen, None).unwrap();
        assert!(named.is(&pod("1", "a")) && !named.is(&pod("2", "a")));
        let named = Named::of(&seen, Some(&config)).unwrap();
        assert!(named.is(&pod("2", "a")) && !named.is(&pod("1", "b")));
    }
}
