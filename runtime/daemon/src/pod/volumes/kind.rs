// SPDX-License-Identifier: Apache-2.0
//! Recognizes what a host path is that a container mounts: one of kubelet's volumes, by its place, or any other path.
//! Pure.
//!
//! ```text
//! <root>/pods/<uid>/volumes/kubernetes.io~empty-dir/<volume>        made in the guest
//! <root>/pods/<uid>/volumes/kubernetes.io~{configmap,secret,
//!                           projected,downward-api}/<volume>        mirrored into the guest
//! <root>/pods/<uid>/volume-subpaths/<volume>/<container>/<n>        a bind mount of a path in a volume
//! <root>/pods/<uid>/etc-hosts                                       mirrored into the guest
//! <root>/pods/<uid>/containers/<container>/<file>                   written in the guest, copied back
//! ```
//! Every other path is shared as it is, also the volumes of other pods.

use std::path::{Component, Path, PathBuf};

use super::mountinfo::{Mounts, join};

const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
const CONFIG_MAP: &str = "kubernetes.io~configmap";
const MIRRORED: [&str; 4] = [
    CONFIG_MAP,
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];

/// What the source of a mount is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// An emptyDir, or the path `sub_path` in it (empty for the whole volume).
    EmptyDir {
        volume: String,
        directory: PathBuf,
        sub_path: PathBuf,
    },
    /// A volume that kubelet fills and refreshes.
    Mirrored {
        volume: String,
        directory: PathBuf,
        sub_path: PathBuf,
        /// Whether the guest must keep it in memory, as kubelet does, because it may be secret.
        in_memory: bool,
    },
    /// The pod's /etc/hosts.
    EtcHosts,
    TerminationLog,
    /// A sub-path whose mount or volume no longer exists.
    Lost,
    Shared,
}

/// What `path` is for the pod `uid`. `root` is kubelet's root directory; both paths must be free of links.
/// `volumes_called` lists the directories of a pod's volumes of a given name, of all kinds.
pub fn place(
    root: &Path,
    uid: &str,
    path: &Path,
    mounts: &Mounts,
    volumes_called: impl Fn(&Path, &str) -> Vec<PathBuf>,
) -> Place {
    let pod = root.join("pods").join(uid);
    let Ok(below) = path.strip_prefix(&pod) else {
        return Place::Shared;
    };
    let names: Option<Vec<&str>> = below
        .components()
        .map(|part| match part {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .collect();
    match names.unwrap_or_default().as_slice() {
        ["etc-hosts"] => Place::EtcHosts,
        ["containers", _, _] => Place::TerminationLog,
        ["volumes", plugin, volume] => volume_place(plugin, volume, path, PathBuf::new()),
        ["volume-subpaths", volume, _, _] => {
            let candidates = volumes_called(&pod, volume);
            sub_path(volume, path, &candidates, mounts)
        }
        _ => Place::Shared,
    }
}

/// Decides by the volume plugin's directory name what a volume is.
fn volume_place(plugin: &str, volume: &str, directory: &Path, sub_path: PathBuf) -> Place {
    let (volume, directory) = (volume.to_owned(), directory.to_owned());
    if !is_label(&volume) {
        return Place::Shared;
    }
    if plugin == EMPTY_DIR {
        return Place::EmptyDir {
            volume,
            directory,
            sub_path,
        };
    }
    if MIRRORED.contains(&plugin) {
        return Place::Mirrored {
            volume,
            directory,
            sub_path,
            in_memory: plugin != CONFIG_MAP,
        };
    }
    Place::Shared
}

/// Finds the volume of a sub-path, which kubelet has bind-mounted: the one whose place on its file system contains the
/// mount's source.
fn sub_path(volume: &str, path: &Path, candidates: &[PathBuf], mounts: &Mounts) -> Place {
    let Some(bind) = mounts.at(path) else {
        return Place::Lost;
    };
    if bind.is_deleted() {
        return Place::Lost;
    }
    for directory in candidates {
        let Some((device, inside)) = mounts.locate(directory) else {
            continue;
        };
        let Ok(below) = bind.root.strip_prefix(&inside) else {
            continue;
        };
        if device != bind.device {
            continue;
        }
        let plugin = directory.parent().and_then(Path::file_name);
        let plugin = plugin.and_then(|name| name.to_str()).unwrap_or_default();
        return volume_place(plugin, volume, directory, below.to_owned());
    }
    // The volume's directory is elsewhere, for example that of a local persistent volume.
    Place::Shared
}

/// The sub-path of a mirrored volume in the newest state of the volume. kubelet has resolved the link `..data` to the
/// directory of the state at that time, which may not exist any more.
pub fn in_newest_state(sub_path: &Path) -> PathBuf {
    let mut parts = sub_path.components();
    match parts.next() {
        Some(Component::Normal(first)) if first.to_string_lossy().starts_with("..") => {
            join(Path::new("..data"), parts.as_path())
        }
        _ => sub_path.to_owned(),
    }
}

/// Whether a name is a DNS label. All names of Kubernetes volumes and namespaces are.
pub fn is_label(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "/k";
    const MOUNTS: &str = "\
22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
30 22 0:50 / /k/pods/u/volumes/kubernetes.io~empty-dir/mem rw - tmpfs tmpfs rw,size=1024k\n\
40 22 8:1 /k/pods/u/volumes/kubernetes.io~empty-dir/data/a/b /k/pods/u/volume-subpaths/data/main/0 rw - ext4 x rw\n\
41 22 0:50 /logs /k/pods/u/volume-subpaths/mem/main/1 rw - tmpfs tmpfs rw\n\
42 22 8:1 /k/pods/u/volumes/kubernetes.io~configmap/cm/..2026_1/key /k/pods/u/volume-subpaths/cm/main/2 rw - ext4 x rw\n\
43 22 8:1 /gone//deleted /k/pods/u/volume-subpaths/data/main/3 rw - ext4 x rw\n\
44 22 9:9 /k/pods/u/volumes/kubernetes.io~empty-dir/data/a /k/pods/u/volume-subpaths/data/main/4 rw - ext4 x rw\n";

    fn at(path: &str) -> Place {
        let called = |pod: &Path, name: &str| {
            ["kubernetes.io~empty-dir", "kubernetes.io~configmap"]
                .map(|plugin| pod.join("volumes").join(plugin).join(name))
                .to_vec()
        };
        place(
            Path::new(ROOT),
            "u",
            Path::new(path),
            &Mounts::parse(MOUNTS.as_bytes()),
            called,
        )
    }

    fn empty_dir(volume: &str, sub_path: &str) -> Place {
        Place::EmptyDir {
            volume: volume.into(),
            directory: format!("/k/pods/u/volumes/kubernetes.io~empty-dir/{volume}").into(),
            sub_path: sub_path.into(),
        }
    }

    #[test]
    fn kubelets_volumes_are_known_by_their_place() {
        assert_eq!(
            at("/k/pods/u/volumes/kubernetes.io~empty-dir/data"),
            empty_dir("data", "")
        );
        for plugin in MIRRORED {
            let path = format!("/k/pods/u/volumes/{plugin}/cm");
            let expected = Place::Mirrored {
                volume: "cm".into(),
                directory: path.clone().into(),
                sub_path: PathBuf::new(),
                in_memory: plugin != CONFIG_MAP,
            };
            assert_eq!(at(&path), expected);
        }
        assert_eq!(at("/k/pods/u/etc-hosts"), Place::EtcHosts);
        assert_eq!(at("/k/pods/u/containers/main/0a1b"), Place::TerminationLog);
    }

    #[test]
    fn everything_else_is_shared() {
        for path in [
            "/srv",
            "/k",
            "/k/pods/u",
            "/k/pods/u/volumes/kubernetes.io~csi/pvc-1/mount",
            "/k/pods/u/volumes/kubernetes.io~empty-dir/data/below",
            "/k/pods/u/volumes/kubernetes.io~empty-dir/.Odd",
            "/k/pods/other/volumes/kubernetes.io~empty-dir/data",
            "/k/pods/u/containers/main",
            "/kk/pods/u/etc-hosts",
        ] {
            assert_eq!(at(path), Place::Shared, "{path}");
        }
    }

    #[test]
    fn a_sub_path_leads_back_to_its_volume() {
        let sub_paths = "/k/pods/u/volume-subpaths";
        assert_eq!(
            at(&format!("{sub_paths}/data/main/0")),
            empty_dir("data", "a/b")
        );
        assert_eq!(
            at(&format!("{sub_paths}/mem/main/1")),
            empty_dir("mem", "logs")
        );
        let Place::Mirrored { sub_path, .. } = at(&format!("{sub_paths}/cm/main/2")) else {
            panic!("a configMap");
        };
        assert_eq!(sub_path, Path::new("..2026_1/key"));
        assert_eq!(at(&format!("{sub_paths}/data/main/3")), Place::Lost);
        assert_eq!(
            at(&format!("{sub_paths}/data/main/4")),
            Place::Shared,
            "the same path of another file system"
        );
        assert_eq!(at(&format!("{sub_paths}/data/main/9")), Place::Lost);
    }

    #[test]
    fn a_state_of_a_mirror_is_its_newest() {
        for (path, expected) in [
            ("..2026_1/key", "..data/key"),
            ("..2026_1", "..data"),
            ("key", "key"),
            ("", ""),
        ] {
            assert_eq!(in_newest_state(Path::new(path)), Path::new(expected));
        }
    }
}
