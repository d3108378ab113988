// SPDX-License-Identifier: Apache-2.0
//! The volumes that an image declares (`VOLUME` of a Dockerfile): which of them a container gets. The agent makes them,
//! with what the image has at their paths. Pure.

use std::collections::BTreeSet;
use std::path::Path;

use bulkhead_image::ImageDefaults;

use super::container_path;
use crate::pod::life::spec::Mount;

/// A path at which no volume can be.
#[derive(Debug, thiserror::Error)]
#[error(
    "volume {0:?} that the image declares is not a path below the root: use an image that declares it rightly or not at \
     all"
)]
pub struct BadVolume(String);

/// The paths of a container's declared volumes. Where the container has a mount of its own, at that path or above it,
/// that one is what it sees. A mount below such a volume is made inside it.
pub fn volumes(image: &ImageDefaults, mounts: &[Mount]) -> Result<Vec<String>, BadVolume> {
    let normalized = |path: &String| {
        let found = container_path::normalized(path);
        found.ok_or_else(|| BadVolume(path.clone()))
    };
    let paths = image.volumes.iter().map(normalized);
    let paths: BTreeSet<String> = paths.collect::<Result<_, _>>()?;
    let is_covered = |path: &String| {
        let mut mounts = mounts.iter();
        mounts.any(|mount| Path::new(path).starts_with(&mount.container_path))
    };
    Ok(paths.into_iter().filter(|path| !is_covered(path)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::fixtures;

    fn found(declared: &[&str], mounted: &[&str]) -> Result<Vec<String>, BadVolume> {
        let image = ImageDefaults {
            volumes: declared.iter().map(ToString::to_string).collect(),
            ..ImageDefaults::default()
        };
        let mounts: Vec<_> = mounted.iter().map(|path| fixtures::mount(path)).collect();
        volumes(&image, &mounts)
    }

    #[test]
    fn a_mount_at_a_volumes_path_or_above_it_wins() {
        let declared = ["/data", "/var/lib/docker", "/a/b/c"];
        for (mounted, expected) in [
            (&[][..], &["/a/b/c", "/data", "/var/lib/docker"][..]),
            (&["/data"], &["/a/b/c", "/var/lib/docker"]),
            (&["/var/lib", "/a"], &["/data"]),
            (
                &["/data/below", "/dat", "/a/b/c/d"],
                &["/a/b/c", "/data", "/var/lib/docker"],
            ),
        ] {
            assert_eq!(found(&declared, mounted).unwrap(), expected, "{mounted:?}");
        }
    }

    #[test]
    fn paths_are_made_absolute_and_appear_once() {
        let declared = ["data", "/data/", "//data/.", "/x"];
        assert_eq!(found(&declared, &[]).unwrap(), ["/data", "/x"]);
    }

    #[test]
    fn a_path_that_leads_out_of_the_root_or_is_the_root_is_refused_by_name() {
        for path in ["/", "", ".", "/a/../..", "../x", "/a\0b"] {
            let error = found(&[path], &[]).unwrap_err();
            assert!(error.to_string().contains(&format!("{path:?}")), "{error}");
        }
    }
}
