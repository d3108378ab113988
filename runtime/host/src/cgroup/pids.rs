// SPDX-License-Identifier: Apache-2.0
//! How many processes kubelet allows a pod. kubelet writes `podPidsLimit` only into the cgroup that it makes for the
//! pod; CRI does not tell it.

use std::fs;

use super::{Cgroups, relative};

/// The limit of processes in the cgroup of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PidsLimit {
    None,
    AtMost(i64),
}

impl Cgroups {
    /// The limit in the cgroup `wanted`, the pod's cgroup parent in CRI. `None` if that does not exist, or has no pids
    /// controller.
    pub fn pids_limit(&self, wanted: &str) -> Option<PidsLimit> {
        self.parent.as_ref()?;
        let path = self.root.join(relative(wanted)?).join("pids.max");
        parse(&fs::read_to_string(path).ok()?)
    }
}

fn parse(text: &str) -> Option<PidsLimit> {
    match text.trim() {
        "max" => Some(PidsLimit::None),
        number => number.parse().ok().map(PidsLimit::AtMost),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_limit_is_that_of_the_cgroup_which_kubelet_named() {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("kubepods/pod1");
        fs::create_dir_all(&pod).unwrap();
        let cgroups = Cgroups::below(root.path(), Some(Path::new("bulkhead")), None);
        assert_eq!(cgroups.pids_limit("/kubepods/pod1"), None);
        for (text, expected) in [
            ("max\n", Some(PidsLimit::None)),
            ("64\n", Some(PidsLimit::AtMost(64))),
            ("many\n", None),
        ] {
            fs::write(pod.join("pids.max"), text).unwrap();
            assert_eq!(cgroups.pids_limit("/kubepods/pod1"), expected, "{text:?}");
        }
        for wanted in ["", "/kubepods/../kubepods/pod1"] {
            assert_eq!(cgroups.pids_limit(wanted), None, "{wanted:?}");
        }
        let without = Cgroups::below(root.path(), None, None);
        assert_eq!(without.pids_limit("/kubepods/pod1"), None);
    }
}
