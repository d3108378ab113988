// SPDX-License-Identifier: Apache-2.0
//! Whether a pod that is to be brought back is the one that was saved. Pure.
//!
//! A checkpoint has processes and files as they are, so what they were started with cannot be another now (cri-api,
//! `RestorePodRequest`). Names, labels, annotations, logs, addresses and the sources of mounts are taken from the new
//! settings.

use std::collections::{BTreeMap, BTreeSet};

use super::CheckpointError;
use crate::pod::life::record::{ContainerRecord, PodRecord};
use crate::pod::life::spec::{ContainerSpec, Mount, MountSource, PidMode, PodSpec};

/// Why this pod cannot be saved. `None` if it can.
pub fn obstacle(pod: &PodRecord, containers: &[ContainerRecord]) -> Option<String> {
    let shares = pod.shares.iter().map(|share| share.path.display());
    let shares: Vec<String> = shares.map(|path| path.to_string()).collect();
    let disks = pod.disks.iter().flatten();
    let disks: Vec<&str> = disks.map(|(name, _)| name.as_str()).collect();
    if !shares.is_empty() {
        return Some(format!(
            "it mounts directories of the host, whose open files cannot be saved: {}",
            shares.join(", ")
        ));
    }
    if !pod.blocks.is_empty() {
        let paths = pod.blocks.iter().map(|one| one.path.display().to_string());
        let paths: Vec<_> = paths.collect();
        return Some(format!(
            "it uses block devices of the host: {}",
            paths.join(", ")
        ));
    }
    if !disks.is_empty() {
        return Some(format!(
            "its volumes {} are on disks of their own; an emptyDir with the medium Memory can be saved",
            disks.join(", ")
        ));
    }
    if pod.spec.users.is_some() {
        return Some("it has a user namespace, whose ids are another pod's later".to_owned());
    }
    let joins = |one: &&ContainerRecord| matches!(one.spec.security.pid, PidMode::Target(_));
    containers.iter().find(joins).map(|one| {
        let name = &one.spec.name;
        format!("container {name} shares the processes of another container")
    })
}

/// Compares the settings of the pod.
pub fn pod(saved: &PodSpec, wanted: &PodSpec) -> Result<(), CheckpointError> {
    let same = [
        ("the PID namespace's mode", saved.pid == wanted.pid),
        ("the user namespace", saved.users == wanted.users),
        ("privileged", saved.privileged == wanted.privileged),
        ("sysctls", saved.sysctls == wanted.sysctls),
        (
            "the size of the scratch disk",
            saved.limits.scratch_bytes == wanted.limits.scratch_bytes,
        ),
    ];
    all("the pod", &same)
}

/// Compares the settings of a pod with those of the warmed pod as which it is to begin. Nobody says then what size its VM is
/// to have, so it must ask for what that one asked for.
pub fn warmed(saved: &PodSpec, wanted: &PodSpec) -> Result<(), CheckpointError> {
    pod(saved, wanted)?;
    let same = [
        (
            "resources",
            saved.limits.resources == wanted.limits.resources,
        ),
        ("overhead", saved.limits.overhead == wanted.limits.overhead),
    ];
    all("the pod", &same)
}

/// Finds for each saved container what it is to be, by its name: there must be exactly one for each.
pub fn containers(
    saved: &[ContainerRecord],
    wanted: Vec<ContainerSpec>,
) -> Result<Vec<(ContainerRecord, ContainerSpec)>, CheckpointError> {
    let unlike = |what: String| Err(CheckpointError::Unlike(what));
    let mut known: BTreeMap<&str, &ContainerRecord> = saved
        .iter()
        .map(|one| (one.spec.name.as_str(), one))
        .collect();
    let mut found = Vec::new();
    for spec in wanted {
        let Some(one) = known.remove(spec.name.as_str()) else {
            let name = &spec.name;
            return unlike(format!(
                "it has no container {name:?}, or that is asked for twice"
            ));
        };
        container(&one.spec, &spec)?;
        found.push((one.clone(), spec));
    }
    let left: Vec<&str> = known.into_keys().collect();
    match left.as_slice() {
        [] => Ok(found),
        names => unlike(format!(
            "container_configs lacks its containers {}",
            names.join(", ")
        )),
    }
}

/// Compares what a container's process was started with.
pub fn container(saved: &ContainerSpec, wanted: &ContainerSpec) -> Result<(), CheckpointError> {
    let same = [
        ("command", saved.command == wanted.command),
        ("args", saved.args == wanted.args),
        (
            "working directory",
            saved.working_directory == wanted.working_directory,
        ),
        (
            "environment",
            environment(&saved.environment) == environment(&wanted.environment),
        ),
        (
            "standard input or terminal",
            (saved.stdin, saved.stdin_once, saved.tty)
                == (wanted.stdin, wanted.stdin_once, wanted.tty),
        ),
        ("security context", saved.security == wanted.security),
        ("resources", saved.resources == wanted.resources),
        ("devices", saved.devices == wanted.devices),
        ("block devices", saved.block_devices == wanted.block_devices),
        ("CDI devices", saved.cdi_devices == wanted.cdi_devices),
        ("hooks", saved.start_hooks == wanted.start_hooks),
        ("mounts", mounts(&saved.mounts) == mounts(&wanted.mounts)),
    ];
    all(&format!("container {}", saved.name), &same)
}

/// The variables without their order, which kubelet does not keep. Of two with one name, the last counts.
fn environment(of: &[(String, Vec<u8>)]) -> BTreeMap<&str, &[u8]> {
    of.iter()
        .map(|(name, value)| (name.as_str(), value.as_slice()))
        .collect()
}

/// The mounts without the places that they come from on the host, which are the new pod's.
fn mounts(of: &[Mount]) -> BTreeSet<String> {
    let shown = |mount: &Mount| {
        let source = match &mount.source {
            // Which volume it is, and which part of it, is compared where that is known: `owner/kept.rs`.
            MountSource::Host(_) => "host".to_owned(),
            MountSource::Image {
                image, sub_path, ..
            } => format!("{image} {sub_path}"),
        };
        let Mount {
            container_path,
            readonly,
            recursive_readonly,
            propagation,
            options,
            users,
            ..
        } = mount;
        format!(
            "{container_path} {source} {readonly} {recursive_readonly} {propagation:?} {options:?} {users:?}"
        )
    };
    of.iter().map(shown).collect()
}

fn all(of: &str, same: &[(&str, bool)]) -> Result<(), CheckpointError> {
    let other: Vec<&str> = same
        .iter()
        .filter(|(_, is_same)| !is_same)
        .map(|(what, _)| *what)
        .collect();
    match other.as_slice() {
        [] => Ok(()),
        other => Err(CheckpointError::Unlike(format!(
            "{of} was saved with another value of: {}",
            other.join(", ")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_host::control::Extent;

    use super::*;
    use crate::pod::fixtures;
    use crate::pod::life::record::DiskRecord;
    use crate::pod::life::spec::{IdRange, UserNamespace};

    fn unlike<T: std::fmt::Debug>(found: Result<T, CheckpointError>) -> String {
        found.unwrap_err().to_string()
    }

    #[test]
    fn names_labels_and_logs_may_differ_and_what_a_process_was_started_with_may_not() {
        let saved = [fixtures::container_record()];
        let change = |change: fn(&mut ContainerSpec)| {
            let mut spec = saved[0].spec.clone();
            change(&mut spec);
            containers(&saved, vec![spec])
        };
        let found = change(|spec| {
            spec.attempt = 7;
            spec.log_path = "other".into();
            spec.labels.insert("a".into(), "b".into());
        });
        assert_eq!(found.unwrap()[0].1.attempt, 7);
        for (other, expected) in [
            (change(|spec| spec.command.push("x".into())), "command"),
            (
                change(|spec| spec.environment.push(("A".into(), vec![1]))),
                "environment",
            ),
            (change(|spec| spec.tty = true), "terminal"),
            (
                change(|spec| spec.security.readonly_root = true),
                "security context",
            ),
            (
                change(|spec| spec.mounts.push(fixtures::mount("/m"))),
                "mounts",
            ),
            (change(|spec| spec.name = "other".into()), "no container"),
        ] {
            let said = unlike(other);
            assert!(said.contains(expected), "{said}");
        }
        let said = unlike(containers(&saved, Vec::new()));
        assert!(said.contains("lacks its containers main"), "{said}");
        let spec = saved[0].spec.clone();
        let said = unlike(containers(&saved, vec![spec.clone(), spec]));
        assert!(said.contains("asked for twice"), "{said}");
    }

    #[test]
    fn variables_may_come_in_another_order() {
        let mut saved = fixtures::container_record();
        let set = |spec: &mut ContainerSpec, pairs: &[(&str, &str)]| {
            let owned =
                |(name, value): &(&str, &str)| (name.to_string(), value.as_bytes().to_vec());
            spec.environment = pairs.iter().map(owned).collect();
        };
        set(&mut saved.spec, &[("A", "old"), ("A", "1"), ("B", "2")]);
        for (pairs, is_same) in [
            (&[("B", "2"), ("A", "1")][..], true),
            (&[("A", "1"), ("B", "2")], true),
            (&[("A", "old"), ("B", "2")], false),
            (&[("A", "1")], false),
            (&[("A", "1"), ("B", "2"), ("C", "")], false),
        ] {
            let mut spec = saved.spec.clone();
            set(&mut spec, pairs);
            let found = containers(std::slice::from_ref(&saved), vec![spec]);
            assert_eq!(found.is_ok(), is_same, "{pairs:?}");
        }
    }

    #[test]
    fn a_mount_may_come_from_another_place() {
        let mut record = fixtures::container_record();
        record.spec.mounts = vec![fixtures::mount("/m")];
        let mut spec = record.spec.clone();
        spec.mounts[0].source = MountSource::Host("/other".into());
        assert!(containers(&[record.clone()], vec![spec.clone()]).is_ok());
        spec.mounts[0].readonly = true;
        let said = unlike(containers(&[record.clone()], vec![spec.clone()]));
        assert!(said.contains("mounts"), "{said}");
        let image = |sub_path: &str| MountSource::Image {
            image: "example/data".into(),
            sub_path: sub_path.into(),
            id: String::new(),
        };
        record.spec.mounts[0].source = image("a");
        spec = record.spec.clone();
        spec.mounts[0].source = image("b");
        let said = unlike(containers(&[record], vec![spec]));
        assert!(said.contains("mounts"), "{said}");
    }

    #[test]
    fn a_pod_that_cannot_be_saved_says_why() {
        let pod = fixtures::pod_record();
        let container = fixtures::container_record();
        assert_eq!(obstacle(&pod, std::slice::from_ref(&container)), None);
        let mut other = pod.clone();
        let ids = IdRange {
            first: 1,
            length: 1,
        };
        other.spec.users = Some(UserNamespace {
            uids: ids,
            gids: ids,
        });
        assert!(obstacle(&other, &[]).unwrap().contains("user namespace"));
        assert!(unlike(super::pod(&pod.spec, &other.spec)).contains("user namespace"));
        let mut other = pod.clone();
        let disk = DiskRecord {
            directory: "/d".into(),
            extent: Extent {
                first_sector: 0,
                sectors: 1,
            },
        };
        other
            .disks
            .get_or_insert_default()
            .insert("empty-dir-a".into(), disk);
        assert!(obstacle(&other, &[]).unwrap().contains("empty-dir-a"));
        let mut joins = container;
        joins.spec.security.pid = PidMode::Target("x".into());
        assert!(obstacle(&pod, &[joins]).unwrap().contains("container main"));
    }
}
