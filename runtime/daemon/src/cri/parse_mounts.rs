// SPDX-License-Identifier: Apache-2.0
//! Parses CRI's mounts.

use std::collections::HashMap;
use std::path::{Component, Path};

use bulkhead_proto::cri;

use super::parse_security::id_range;
use super::refusal::{ParseError, check_handler, wrong};
use crate::pod::life::spec::{
    ImageWords, Mount, MountOptions, MountSource, MountWords, Propagation, UserNamespace,
};
use crate::pod::plan::container_path;

/// A mount must not cover /proc. The agent checks this again, because only it can resolve links in the container.
const PROC: &str = "/proc";

pub fn mounts(given: Vec<cri::Mount>) -> Result<Vec<Mount>, ParseError> {
    given.into_iter().map(mount).collect()
}

pub(super) fn mount(given: cri::Mount) -> Result<Mount, ParseError> {
    let container_path = container_path(&given.container_path)?;
    let propagation = match given.propagation() {
        cri::MountPropagation::PropagationPrivate => Propagation::Private,
        cri::MountPropagation::PropagationHostToContainer => Propagation::HostToContainer,
        cri::MountPropagation::PropagationBidirectional => {
            return Err(wrong(
                "bidirectional propagation (the pod has a kernel of its own, whose mounts the host cannot see) at",
                container_path,
            ));
        }
    };
    let users = if given.uid_mappings.is_empty() && given.gid_mappings.is_empty() {
        None
    } else {
        Some(UserNamespace {
            uids: id_range(&given.uid_mappings)?,
            gids: id_range(&given.gid_mappings)?,
        })
    };
    let options = mount_options(&given)?;
    if given.recursive_read_only {
        if !given.readonly {
            return Err(wrong(
                "recursive_read_only without readonly at",
                container_path,
            ));
        }
        if propagation != Propagation::Private {
            return Err(wrong(
                "recursive_read_only with a propagation that is not private at",
                container_path,
            ));
        }
    }
    let image = given.image.filter(|image| !image.image.is_empty());
    if image.is_some() && !given.readonly {
        return Err(wrong(
            "mount of an image that is not read-only at",
            container_path,
        ));
    }
    let mut words = MountWords {
        selinux_relabel: given.selinux_relabel,
        ..MountWords::default()
    };
    if given.container_path != container_path {
        words.container_path = given.container_path;
    }
    let source = match image {
        Some(_) if !given.host_path.is_empty() => {
            return Err(wrong(
                "a mount of an image and a host path at",
                container_path,
            ));
        }
        Some(image) => {
            words.user_image = image.user_specified_image;
            words.image = image_words(image.annotations, image.runtime_handler)?;
            MountSource::Image {
                image: image.image,
                sub_path: sub_path(given.image_sub_path)?,
                id: String::new(),
            }
        }
        // kubelet also sets image_sub_path for a host path with a sub-path. There it is ignored: it is in host_path
        // already.
        None if !Path::new(&given.host_path).is_absolute() => {
            return Err(wrong("host_path of a mount", given.host_path));
        }
        None => MountSource::Host(given.host_path.into()),
    };
    Ok(Mount {
        container_path,
        source,
        readonly: given.readonly,
        recursive_readonly: given.recursive_read_only,
        users,
        propagation,
        options,
        words,
    })
}

/// kubelet knows `noexec`, `nosuid` and `nodev`. `ro` and `rw` may only repeat what `readonly` says.
fn mount_options(given: &cri::Mount) -> Result<MountOptions, ParseError> {
    let mut options = MountOptions::default();
    for option in &given.mount_options {
        match option.as_str() {
            "noexec" => options.no_exec = true,
            "nosuid" => options.no_suid = true,
            "nodev" => options.no_dev = true,
            "ro" if given.readonly => {}
            "rw" if !given.readonly => {}
            "ro" => return Err(wrong("a mount without readonly with the option", option)),
            "rw" => return Err(wrong("a mount with readonly and the option", option)),
            _ => {
                return Err(wrong(
                    "mount option other than noexec, nosuid, nodev:",
                    option,
                ));
            }
        }
    }
    Ok(options)
}

/// What CRI tells of an image besides its name. Used for a container's image and for one that is mounted.
pub fn image_words(
    annotations: HashMap<String, String>,
    runtime_handler: String,
) -> Result<ImageWords, ParseError> {
    check_handler(&runtime_handler)?;
    Ok(ImageWords {
        annotations: annotations.into_iter().collect(),
        runtime_handler,
    })
}

/// A path in the container at which something may be mounted.
pub(super) fn container_path(given: &str) -> Result<String, ParseError> {
    let path = container_path::normalized(given).filter(|path| path != PROC);
    path.ok_or_else(|| wrong("container_path", given))
}

fn sub_path(given: String) -> Result<String, ParseError> {
    let inside = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    if !Path::new(&given).components().all(inside) || given.contains('\0') {
        return Err(wrong("image_sub_path", given));
    }
    Ok(given)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given() -> cri::Mount {
        cri::Mount {
            container_path: "/data".into(),
            host_path: "/srv".into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_mount_of_a_host_path_is_taken_as_it_is() {
        let parsed = mount(cri::Mount {
            container_path: "data//x/.".into(),
            readonly: true,
            recursive_read_only: true,
            selinux_relabel: true,
            ..given()
        })
        .unwrap();
        assert_eq!(
            parsed,
            Mount {
                container_path: "/data/x".into(),
                source: MountSource::Host("/srv".into()),
                readonly: true,
                recursive_readonly: true,
                propagation: Propagation::Private,
                options: MountOptions::default(),
                users: None,
                words: MountWords {
                    container_path: "data//x/.".into(),
                    selinux_relabel: true,
                    ..MountWords::default()
                },
            }
        );
    }

    #[test]
    fn an_image_is_mounted_read_only_or_not_at_all() {
        let image = |readonly| cri::Mount {
            host_path: String::new(),
            image: Some(cri::ImageSpec {
                image: "busybox".into(),
                ..Default::default()
            }),
            image_sub_path: "etc".into(),
            readonly,
            ..given()
        };
        assert!(mount(image(false)).is_err());
        assert_eq!(
            mount(image(true)).unwrap().source,
            MountSource::Image {
                image: "busybox".into(),
                sub_path: "etc".into(),
                id: String::new(),
            }
        );
    }

    #[test]
    fn mount_options_take_something_away_and_may_repeat_what_is_said() {
        let with = |readonly, options: &[&str]| {
            mount(cri::Mount {
                readonly,
                mount_options: options.iter().map(ToString::to_string).collect(),
                ..given()
            })
        };
        let options = |no_exec, no_suid, no_dev| MountOptions {
            no_exec,
            no_suid,
            no_dev,
        };
        for (readonly, given, expected) in [
            (false, &["rw"][..], options(false, false, false)),
            (true, &["ro", "noexec"], options(true, false, false)),
            (
                false,
                &["nosuid", "nodev", "nosuid"],
                options(false, true, true),
            ),
        ] {
            assert_eq!(
                with(readonly, given).unwrap().options,
                expected,
                "{given:?}"
            );
        }
        for (readonly, option) in [(false, "ro"), (true, "rw"), (true, "sync"), (true, "")] {
            let error = with(readonly, &[option]).unwrap_err().to_string();
            assert!(error.contains(&format!("{option:?}")), "{error}");
        }
    }

    #[test]
    fn kubelet_names_an_images_sub_path_where_there_is_no_image() {
        let given = cri::Mount {
            image_sub_path: "deep/down".into(),
            ..given()
        };
        let source = mount(given).unwrap().source;
        assert_eq!(source, MountSource::Host("/srv".into()));
    }

    #[test]
    fn what_is_not_possible_is_refused_with_the_place_that_was_meant() {
        type Change = fn(&mut cri::Mount);
        let table: [(Change, &str); 12] = [
            (|m| m.container_path.clear(), "container_path"),
            (|m| m.container_path = "/".into(), "container_path"),
            (|m| m.container_path = "/a/../..".into(), "container_path"),
            (|m| m.container_path = "/proc".into(), "/proc"),
            (|m| m.host_path = "srv".into(), "host_path"),
            (|m| m.host_path.clear(), "host_path"),
            (|m| m.propagation = 2, "bidirectional"),
            (
                |m| m.uid_mappings = vec![cri::IdMapping::default()],
                "mapping",
            ),
            (|m| m.recursive_read_only = true, "without readonly"),
            (
                |m| {
                    (m.recursive_read_only, m.readonly, m.propagation) = (true, true, 1);
                },
                "propagation",
            ),
            (|m| m.mount_options = vec!["sync".into()], "sync"),
            (
                |m| {
                    m.host_path.clear();
                    m.readonly = true;
                    m.image = Some(cri::ImageSpec {
                        image: "busybox".into(),
                        runtime_handler: "runc".into(),
                        ..Default::default()
                    });
                },
                "handler \"runc\"",
            ),
        ];
        for (change, word) in table {
            let mut one = given();
            change(&mut one);
            let error = mount(one).unwrap_err().to_string();
            assert!(error.contains(word), "{word}: {error}");
        }
    }
}
