// SPDX-License-Identifier: Apache-2.0
//! The names and places of cgroups, as kubelet and systemd have them. Pure: nothing here looks at the host.

use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

const SLICE: &str = ".slice";
pub const SCOPE: &str = ".scope";
/// The name of the daemon's cgroup in a scope.
const IN_SCOPE: &str = "vm";

/// Converts a cgroup parent of kubelet to a path below the root. With the cgroupfs driver it is a path
/// ("/kubepods/burstable/pod1"), with systemd's driver the name of a slice, which contains the names of its parents.
/// `None` if it is not valid.
pub fn relative(wanted: &str) -> Option<PathBuf> {
    let path = Path::new(wanted.trim_matches('/'));
    let plain = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if !plain || path.as_os_str().is_empty() || wanted.contains('\0') {
        return None;
    }
    match path.to_str()? {
        name if name.ends_with(SLICE) && !name.contains('/') => slice(name),
        _ => Some(path.to_owned()),
    }
}

/// The path of a slice, whose name may lack its end: that of a-b-c is a.slice/a-b.slice/a-b-c.slice
/// (systemd.slice(5)).
pub fn slice(name: &str) -> Option<PathBuf> {
    let name = name.strip_suffix(SLICE).unwrap_or(name);
    if name.is_empty() || name.split('-').any(str::is_empty) {
        return None;
    }
    let ends = name.match_indices('-').map(|(end, _)| end);
    let names = ends.chain([name.len()]).filter_map(|end| name.get(..end));
    Some(names.map(|name| format!("{name}{SLICE}")).collect())
}

/// Whether this is the cgroup of a slice.
pub fn is_slice(path: &Path) -> bool {
    path.extension() == Some(OsStr::new("slice"))
}

/// The daemon's cgroup in the scope `name` of a slice.
pub fn in_scope(slice: &Path, name: &str) -> PathBuf {
    slice.join(format!("{name}{SCOPE}")).join(IN_SCOPE)
}

/// The scope that contains a VM's cgroup, if systemd made one.
pub fn scope_of(path: &Path) -> Option<&Path> {
    let scope = path.parent()?;
    (scope.extension() == Some(OsStr::new("scope"))).then_some(scope)
}

pub fn name_of(path: &Path) -> &str {
    let name = path.file_name().and_then(OsStr::to_str);
    name.unwrap_or_default()
}

/// Whether this is the name of the cgroup or scope of a VM whose pod's id begins with `digits`.
pub fn is_of_pod(path: &Path, digits: &str) -> bool {
    let name = name_of(scope_of(path).unwrap_or(path));
    let name = name.strip_suffix(SCOPE).unwrap_or(name);
    let id = ["bulkhead-", "pod-"]
        .iter()
        .find_map(|start| name.strip_prefix(start));
    !digits.is_empty() && id.is_some_and(|id| id.starts_with(digits))
}

/// The cgroup of kubelet or of the daemon that contains the VM's cgroup `path`.
pub fn around(path: &Path) -> Option<&Path> {
    scope_of(path).unwrap_or(path).parent()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_a_path_or_a_slice_and_never_leads_elsewhere() {
        for (wanted, expected) in [
            ("/kubepods/burstable/pod1", Some("kubepods/burstable/pod1")),
            ("kubepods", Some("kubepods")),
            (
                "kubepods-burstable-pod1_2.slice",
                Some("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"),
            ),
            ("/a.slice/a-b.slice", Some("a.slice/a-b.slice")),
            ("../etc", None),
            ("/a/../../b", None),
            ("/", None),
            ("a--b.slice", None),
            (".slice", None),
            ("a\0b", None),
        ] {
            assert_eq!(relative(wanted), expected.map(PathBuf::from), "{wanted:?}");
        }
    }

    #[test]
    fn a_vms_cgroup_is_told_from_all_others_by_its_name() {
        let id = "0123456789abcdef";
        for (path, expected) in [
            ("/kubepods/pod1/bulkhead-0123456789abcdef77", true),
            ("/bulkhead/pod-0123456789abcdef77", true),
            ("/b.slice/bulkhead-0123456789abcdef77.scope/vm", true),
            ("/bulkhead/pod-1123456789abcdef77", false),
            ("/kubepods/pod0123456789abcdef", false),
            ("/system.slice/bulkhead.service", false),
            ("/", false),
        ] {
            assert_eq!(is_of_pod(Path::new(path), id), expected, "{path}");
        }
        assert!(!is_of_pod(Path::new("/bulkhead/pod-x"), ""));
    }

    #[test]
    fn the_cgroup_around_a_vm_is_that_around_its_scope_if_it_has_one() {
        let slice = Path::new("/kubepods.slice/kubepods-pod1.slice");
        let own = in_scope(slice, "bulkhead-x");
        assert_eq!(own, slice.join("bulkhead-x.scope/vm"));
        assert_eq!(scope_of(&own).map(name_of), Some("bulkhead-x.scope"));
        assert_eq!(around(&own), Some(slice));
        let plain = Path::new("/kubepods/pod1");
        assert_eq!(around(&plain.join("bulkhead-x")), Some(plain));
        assert!(is_slice(slice) && !is_slice(plain));
    }
}
