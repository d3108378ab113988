// SPDX-License-Identifier: Apache-2.0
//! Which volumes of the guest containers mount, and whether a container that is brought back mounts what it had. Pure.
//!
//! What was saved keeps its names in the guest. kubelet's names may differ: it calls the volume with a service account's
//! token otherwise in each pod. So mounts are compared by their places in the container. A mirror with another name is
//! the old volume, with a new source, but one volume of the guest never gets two sources.

use std::collections::{BTreeMap, BTreeSet};
use std::iter;
use std::path::PathBuf;

use super::mounts::{FoundMount, FoundSource};
use crate::pod::checkpoint::CheckpointError;
use crate::pod::life::record::{ContainerRecord, MirrorSource};
use crate::pod::life::volume::{VolumeKind, VolumeMount};
use crate::pod::volumes::{Found, HostSide, InGuest, text};

/// The sources of mirrors, by the volumes' names in the guest.
type Mirrors = BTreeMap<String, MirrorSource>;

/// kubelet's file for the container's termination message, if the container mounts one.
pub(super) fn termination_log(mounts: &[FoundMount]) -> Option<PathBuf> {
    mounts
        .iter()
        .find_map(|found| match &found.in_guest()?.host {
            HostSide::CopiedBack(path) => Some(path.clone()),
            _ => None,
        })
}

/// The emptyDirs that the container mounts: kubelet's directory for each, by the volume's name in the guest.
pub(super) fn empty_dirs(mounts: &[FoundMount]) -> BTreeMap<String, PathBuf> {
    let one = |found: &FoundMount| {
        let found = found.in_guest()?;
        match &found.host {
            HostSide::Disk(directory) | HostSide::Memory(directory) => {
                Some((found.volume.name.clone(), directory.clone()))
            }
            _ => None,
        }
    };
    mounts.iter().filter_map(one).collect()
}

/// The volumes of the guest that the container mounts, by their places in it.
pub(super) fn volumes(mounts: &[FoundMount]) -> BTreeMap<String, VolumeMount> {
    let one = |found: &FoundMount| {
        let volume = stored(found.in_guest()?)?;
        Some((found.mount.container_path.clone(), volume))
    };
    mounts.iter().filter_map(one).collect()
}

fn stored(found: &InGuest) -> Option<VolumeMount> {
    Some(VolumeMount {
        volume: found.volume.name.clone(),
        sub_path: text(&found.sub_path),
        kind: found.volume.kind.as_ref()?.into(),
    })
}

/// Gives another name to each mirror whose name in the guest is taken by a mirror of another source: by one that was
/// brought back and has its old name.
pub(super) fn name_mirrors(mounts: &mut [FoundMount], mirrors: &Mirrors) {
    let mut taken = mirrors.clone();
    for found in mounts.iter_mut().filter_map(FoundMount::in_guest_mut) {
        let HostSide::Mirrored(source) = &found.host else {
            continue;
        };
        let wanted = &found.volume.name;
        // No name of a Kubernetes volume has a dot.
        let others = (2u64..).map(|number| format!("{wanted}.{number}"));
        let is_free = |name: &String| taken.get(name).is_none_or(|known| known == source);
        let free = iter::once(wanted.clone()).chain(others).find(is_free);
        if let Some(name) = free {
            taken.insert(name.clone(), source.clone());
            found.volume.name = name;
        }
    }
}

/// The new sources of the mirrors of a container that is brought back, by the names of the volumes, which its guest has
/// already and which follow `followed` so far. An error if a mount is not what it was.
pub(super) fn kept_volumes(
    mounts: &[FoundMount],
    saved: &ContainerRecord,
    followed: &Mirrors,
) -> Result<Mirrors, CheckpointError> {
    let mut mirrors = Mirrors::new();
    for FoundMount { mount, source } in mounts {
        let path = &mount.container_path;
        let kept = match source {
            FoundSource::Image { .. } => Ok(()),
            FoundSource::Host(Found::Shared(_)) => {
                Err("is a directory of the host, which the saved VM does not have".to_owned())
            }
            FoundSource::Host(Found::Guest(found)) => match saved.volumes.get(path) {
                None => Err("had no volume when it was saved".to_owned()),
                Some(was) => same(found, was, followed, &mut mirrors),
            },
        };
        kept.map_err(|what| {
            let name = &saved.spec.name;
            CheckpointError::Unlike(format!("container {name}: the mount at {path} {what}"))
        })?;
    }
    Ok(mirrors)
}

/// Whether a mount is what it was, and whether the volume has this source alone. If not, says how it differs.
fn same(
    found: &InGuest,
    was: &VolumeMount,
    followed: &Mirrors,
    mirrors: &mut Mirrors,
) -> Result<(), String> {
    let now = stored(found).ok_or("has a volume of no kind")?;
    let (volume, kind) = (&was.volume, was.kind);
    if now.kind != kind {
        return Err(format!("is {}, and was {kind} when it was saved", now.kind));
    }
    if now.sub_path != was.sub_path {
        return Err(format!(
            "is {}, and was {} when it was saved",
            part(&now),
            part(was)
        ));
    }
    let source = match &found.host {
        HostSide::Mirrored(source) => source,
        // A volume with content of its own keeps its name, by which containers of the pod share it.
        HostSide::Memory(_) | HostSide::Disk(_) if now.volume != *volume => {
            return Err(format!(
                "is the volume {}, and was {volume} when it was saved",
                now.volume
            ));
        }
        HostSide::Memory(_) | HostSide::Disk(_) | HostSide::CopiedBack(_) => return Ok(()),
    };
    let shown = source.path.display();
    let known = mirrors.get(volume).or_else(|| followed.get(volume));
    if let Some(other) = known.filter(|known| *known != source) {
        let other = other.path.display();
        return Err(format!(
            "is {shown}, and shared its volume when it was saved with what is {other} now"
        ));
    }
    if mirrors
        .iter()
        .any(|(name, known)| name != volume && known == source)
    {
        return Err(format!(
            "is {shown} as another mount, with which it shared no volume when it was saved"
        ));
    }
    mirrors.insert(volume.clone(), source.clone());
    Ok(())
}

fn part(of: &VolumeMount) -> String {
    match of.sub_path.as_str() {
        "" => "a whole volume".to_owned(),
        sub_path => format!("the sub-path {sub_path} of a volume"),
    }
}

/// Whether a volume that the guest has for `kept` is of another kind than one that is asked for under its name.
pub(super) fn clash(
    kept: &BTreeMap<String, VolumeMount>,
    wanted: &BTreeMap<String, VolumeMount>,
) -> Option<(String, VolumeKind, VolumeKind)> {
    kept.values().find_map(|was| {
        let is_other = |now: &&VolumeMount| now.volume == was.volume && now.kind != was.kind;
        let now = wanted.values().find(is_other)?;
        Some((was.volume.clone(), was.kind, now.kind))
    })
}

/// The volumes that only this container mounts. `containers` are all of the pod.
pub(super) fn only_of<'a>(
    gone: &ContainerRecord,
    containers: impl IntoIterator<Item = &'a ContainerRecord>,
) -> BTreeSet<String> {
    let names = |of: &ContainerRecord| -> BTreeSet<String> {
        let mounts = of.volumes.values();
        mounts.map(|mount| mount.volume.clone()).collect()
    };
    let others = containers.into_iter().filter(|one| one.id != gone.id);
    let used: BTreeSet<String> = others.flat_map(names).collect();
    names(gone).difference(&used).cloned().collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bulkhead_guest::protocol::volume::Kind;
    use bulkhead_guest::protocol::{
        HugePageDirectory, MemoryDirectory, Mirror, Volume, WritableFile,
    };

    use super::*;
    use crate::pod::fixtures;

    /// What is mounted: where, which volume under which name in the guest, and which part of it.
    fn found(at: &str, name: &str, sub_path: &str, kind: Kind) -> FoundMount {
        let path = Path::new("/k").join(name);
        let host = match kind {
            Kind::Mirror(_) => HostSide::Mirrored(MirrorSource { path }),
            Kind::Directory(_) => HostSide::Disk(path),
            Kind::File(_) => HostSide::CopiedBack(path),
            Kind::Memory(_) | Kind::HugePages(_) => HostSide::Memory(path),
        };
        FoundMount {
            mount: fixtures::mount(at),
            source: FoundSource::Host(Found::Guest(InGuest {
                volume: Volume {
                    name: name.into(),
                    ownership: None,
                    kind: Some(kind),
                },
                sub_path: sub_path.into(),
                made_as: None,
                host,
            })),
        }
    }

    fn memory(size_bytes: u64) -> Kind {
        Kind::Memory(MemoryDirectory { size_bytes })
    }

    fn huge_pages(page_size_bytes: u64) -> Kind {
        Kind::HugePages(HugePageDirectory { page_size_bytes })
    }

    fn mirror(in_memory: bool) -> Kind {
        Kind::Mirror(Mirror {
            single_file: false,
            in_memory,
        })
    }

    fn config_map(at: &str, name: &str) -> FoundMount {
        found(at, name, "", mirror(false))
    }

    fn source(name: &str) -> MirrorSource {
        MirrorSource {
            path: Path::new("/k").join(name),
        }
    }

    fn mirrors(of: &[(&str, &str)]) -> Mirrors {
        let of = of.iter();
        of.map(|(name, path)| ((*name).to_owned(), source(path)))
            .collect()
    }

    fn saved_with(mounts: &[FoundMount]) -> ContainerRecord {
        ContainerRecord {
            volumes: volumes(mounts),
            ..fixtures::container_record()
        }
    }

    fn compare(
        saved: &[FoundMount],
        wanted: &[FoundMount],
        followed: &Mirrors,
    ) -> Result<Mirrors, String> {
        let kept = kept_volumes(wanted, &saved_with(saved), followed);
        kept.map_err(|error| error.to_string())
    }

    #[test]
    fn a_mirror_is_the_one_that_was_at_its_place_and_gets_its_new_source() {
        let token = |name| found("/token", name, "", mirror(true));
        let log = |name| found("/log", name, "", Kind::File(WritableFile {}));
        let saved = [
            token("mirror-aaaaa"),
            config_map("/c", "mirror-c"),
            config_map("/again", "mirror-c"),
            log("termination-log-1"),
            found("/e", "empty-dir-e", "part", memory(1)),
        ];
        let wanted = [
            token("mirror-bbbbb"),
            config_map("/c", "mirror-d"),
            config_map("/again", "mirror-d"),
            log("termination-log-2"),
            found("/e", "empty-dir-e", "part", memory(1)),
        ];
        let expected = mirrors(&[("mirror-aaaaa", "mirror-bbbbb"), ("mirror-c", "mirror-d")]);
        assert_eq!(
            compare(&saved, &wanted, &Mirrors::new()).as_ref(),
            Ok(&expected)
        );
        // Another container of the pod has them already.
        assert_eq!(compare(&saved, &wanted, &expected).as_ref(), Ok(&expected));
        // One that waits is compared with what it had, too.
        let waiting = ContainerRecord {
            is_waiting: true,
            ..saved_with(&saved)
        };
        let kept = kept_volumes(&wanted, &waiting, &Mirrors::new());
        assert_eq!(kept.unwrap(), expected);
    }

    #[test]
    fn a_mount_that_is_not_what_it_was_is_refused_by_its_place_and_by_what_differs() {
        let one = |kind| vec![found("/m", "empty-dir-m", "", kind)];
        let part = |sub_path| vec![found("/m", "mirror-m", sub_path, mirror(false))];
        let two = |x, y| vec![found("/x", x, "", memory(1)), found("/y", y, "", memory(1))];
        let maps = |x, y| vec![config_map("/x", x), config_map("/y", y)];
        let secret = || vec![found("/m", "mirror-m", "", mirror(true))];
        let disk = || Kind::Directory(Default::default());
        let ab = || two("empty-dir-a", "empty-dir-b");
        let xy = || maps("mirror-x", "mirror-y");
        let xx = || maps("mirror-x", "mirror-x");
        let cases = [
            (
                one(memory(1)),
                one(memory(2)),
                "at /m is an emptyDir in memory of 2 bytes, and was an emptyDir in memory of 1 bytes when",
            ),
            (
                one(memory(1)),
                one(huge_pages(1)),
                "at /m is an emptyDir of huge pages of 1 bytes, and was an emptyDir in memory",
            ),
            (
                one(huge_pages(1)),
                one(huge_pages(2)),
                "of 2 bytes, and was an emptyDir of huge pages of 1 bytes",
            ),
            (one(memory(1)), one(disk()), "is an emptyDir on disk, and"),
            (
                part(""),
                secret(),
                "is a Secret, projected or downwardAPI volume, and was a ConfigMap when",
            ),
            (
                part("..data/a"),
                part("..data/b"),
                "is the sub-path ..data/b of a volume, and was the sub-path ..data/a of",
            ),
            (
                part("..data/a"),
                part(""),
                "is a whole volume, and was the sub-path ..data/a of",
            ),
            (
                part(""),
                part("..data/b"),
                "is the sub-path ..data/b of a volume, and was a whole volume when",
            ),
            (
                ab(),
                two("empty-dir-b", "empty-dir-a"),
                "at /x is the volume empty-dir-b, and was empty-dir-a when",
            ),
            (
                two("empty-dir-a", "empty-dir-a"),
                ab(),
                "at /y is the volume empty-dir-b, and was empty-dir-a when",
            ),
            (
                xx(),
                xy(),
                "at /y is /k/mirror-y, and shared its volume when it was saved with what is /k/mirror-x now",
            ),
            (
                xy(),
                xx(),
                "at /y is /k/mirror-x as another mount, with which it shared no volume when",
            ),
            (
                Vec::new(),
                part(""),
                "at /m had no volume when it was saved",
            ),
        ];
        for (saved, wanted, words) in cases {
            let said = compare(&saved, &wanted, &Mirrors::new()).unwrap_err();
            assert!(said.contains("container main: the mount at /"), "{said}");
            assert!(said.contains(words), "{said}: {words}");
        }
        // Another container of the pod has it already, with another source.
        let followed = mirrors(&[("mirror-m", "other")]);
        let said = compare(&part(""), &part(""), &followed).unwrap_err();
        assert!(
            said.contains("at /m is /k/mirror-m, and shared its volume when it was saved with what is /k/other"),
            "{said}"
        );
    }

    #[test]
    fn a_new_mirror_leaves_another_one_of_its_name_alone() {
        let name = |name: &str, known: &[(&str, &str)]| {
            let mut mounts = [config_map("/m", name)];
            name_mirrors(&mut mounts, &mirrors(known));
            volumes(&mounts)["/m"].volume.clone()
        };
        for (known, expected) in [
            (vec![], "x"),
            (vec![("x", "x"), ("y", "y")], "x"),
            (vec![("x", "y")], "x.2"),
            (vec![("x", "y"), ("x.2", "x")], "x.2"),
            (vec![("x", "y"), ("x.2", "z")], "x.3"),
        ] {
            assert_eq!(name("x", &known), expected, "{known:?}");
        }
        let mut mounts = [found("/e", "empty-dir-e", "", memory(1))];
        name_mirrors(&mut mounts, &mirrors(&[("empty-dir-e", "y")]));
        assert_eq!(volumes(&mounts)["/e"].volume, "empty-dir-e");
    }

    #[test]
    fn a_volume_goes_with_the_last_container_that_mounts_it() {
        let of = |id: &str, mounts: &[FoundMount]| ContainerRecord {
            id: id.into(),
            ..saved_with(mounts)
        };
        let gone = of(
            "gone",
            &[
                config_map("/a", "a"),
                config_map("/b", "b"),
                config_map("/c", "c"),
            ],
        );
        let created = of("created", &[config_map("/b", "b")]);
        let mut waiting = of("waiting", &[config_map("/c", "c")]);
        waiting.is_waiting = true;
        let all = [gone.clone(), created.clone(), waiting];
        assert_eq!(only_of(&gone, &all), BTreeSet::from(["a".to_owned()]));
        let left = only_of(&gone, [&gone, &created]);
        assert_eq!(left, BTreeSet::from(["a".to_owned(), "c".to_owned()]));
    }

    #[test]
    fn a_volume_clashes_with_one_of_its_name_that_is_of_another_kind() {
        let one = |name, kind| volumes(&[found("/m", name, "", kind)]);
        let kept = one("v", memory(1));
        for (wanted, clashes) in [
            (one("v", memory(1)), false),
            (one("w", memory(2)), false),
            (one("v", memory(2)), true),
            (one("v", Kind::Directory(Default::default())), true),
        ] {
            assert_eq!(clash(&kept, &wanted).is_some(), clashes, "{wanted:?}");
        }
    }
}
