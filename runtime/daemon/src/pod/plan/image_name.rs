// SPDX-License-Identifier: Apache-2.0
//! The name under which the image of a container is shown. kubelet creates containers by an image's id, and tells beside
//! it what the user wrote. Pods, metrics and people know the image by that. Pure.

use bulkhead_image::{Image, Reference};

use crate::pod::life::spec::ContainerSpec;

/// The reference with which the container was created: as CRI gave it, or in full what the user wrote if CRI gave an id.
/// If nobody named the image, the name that it has in the store.
pub fn of(spec: &ContainerSpec, image: &Image) -> String {
    let digits = spec.image.strip_prefix("sha256:").unwrap_or(&spec.image);
    if !image.id.hex().starts_with(digits) {
        return spec.image.clone();
    }
    let written = spec.user_image.as_str();
    let full = written.parse().map(|full: Reference| full.to_string());
    let written = (!written.is_empty()).then(|| full.unwrap_or_else(|_| written.to_owned()));
    let stored = image.repo_tags.first().or(image.repo_digests.first());
    written
        .or_else(|| stored.cloned())
        .unwrap_or_else(|| spec.image.clone())
}

#[cfg(test)]
mod tests {
    use bulkhead_image::{Digest, ImageDefaults};

    use super::*;
    use crate::pod::fixtures;

    #[test]
    fn an_image_is_shown_by_the_reference_with_which_the_container_was_created() {
        let id = Digest::of(b"configuration");
        let short = &id.hex()[..12];
        let tag = "docker.io/library/app:1";
        let digest = format!("docker.io/library/app@{id}");
        let table = [
            ("app:1", "", &[tag][..], "app:1"),
            ("app:1", "other", &[tag], "app:1"),
            (id.as_str(), "app", &[tag], "docker.io/library/app:latest"),
            (id.hex(), "host.io/app:2", &[tag], "host.io/app:2"),
            (short, "no reference!", &[tag], "no reference!"),
            (id.as_str(), &digest, &[tag], &digest),
            (id.as_str(), "", &[tag], tag),
            (id.as_str(), "", &[], id.as_str()),
        ];
        for (asked, written, tags, shown) in table {
            let spec = ContainerSpec {
                image: asked.to_owned(),
                user_image: written.to_owned(),
                ..fixtures::container_spec()
            };
            let image = Image {
                id: id.clone(),
                repo_tags: tags.iter().map(ToString::to_string).collect(),
                repo_digests: Vec::new(),
                size_bytes: 1,
                pinned: false,
                defaults: ImageDefaults::default(),
                artifact_type: None,
            };
            assert_eq!(of(&spec, &image), shown, "{asked} {written}");
        }
    }
}
