// SPDX-License-Identifier: Apache-2.0
//! Joins what several sides answered about images into one answer. Pure.

use bulkhead_proto::cri;

/// One list of all sides' images. An id is the digest of an image's configuration, so the same id is the same image: it
/// appears once, with the names that it has anywhere and the space that it takes everywhere.
pub fn lists(sides: impl IntoIterator<Item = Vec<cri::Image>>) -> Vec<cri::Image> {
    let mut merged: Vec<cri::Image> = Vec::new();
    let mut places = std::collections::HashMap::new();
    for image in sides.into_iter().flatten() {
        let place = *places.entry(image.id.clone()).or_insert(merged.len());
        match merged.get_mut(place) {
            Some(known) => join(known, image),
            None => merged.push(image),
        }
    }
    merged
}

/// The answers of several sides about one name. The first side that has the image says which one it is.
pub fn statuses(
    sides: impl IntoIterator<Item = cri::ImageStatusResponse>,
) -> cri::ImageStatusResponse {
    let mut merged = cri::ImageStatusResponse::default();
    for side in sides {
        for (key, value) in side.info {
            merged.info.entry(key).or_insert(value);
        }
        let Some(image) = side.image else {
            continue;
        };
        match &mut merged.image {
            Some(known) if known.id == image.id => join(known, image),
            Some(_) => {}
            None => merged.image = Some(image),
        }
    }
    merged
}

/// The file systems of all sides. kubelet takes the first of each kind for the node's.
pub fn file_systems(
    sides: impl IntoIterator<Item = cri::ImageFsInfoResponse>,
) -> cri::ImageFsInfoResponse {
    let mut merged = cri::ImageFsInfoResponse::default();
    for side in sides {
        merged.image_filesystems.extend(side.image_filesystems);
        merged
            .container_filesystems
            .extend(side.container_filesystems);
    }
    merged
}

fn join(known: &mut cri::Image, other: cri::Image) {
    add_missing(&mut known.repo_tags, other.repo_tags);
    add_missing(&mut known.repo_digests, other.repo_digests);
    known.size = known.size.saturating_add(other.size);
    // kubelet must not remove it from the side that needs it.
    known.pinned |= other.pinned;
}

fn add_missing(known: &mut Vec<String>, others: Vec<String>) {
    for name in others {
        if !known.contains(&name) {
            known.push(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(id: &str, tags: &[&str], size: u64, pinned: bool) -> cri::Image {
        cri::Image {
            id: id.into(),
            repo_tags: tags.iter().map(ToString::to_string).collect(),
            size,
            pinned,
            ..Default::default()
        }
    }

    #[test]
    fn an_image_of_several_sides_appears_once_with_all_its_names_and_all_its_space() {
        let ours = vec![
            image("a", &["a:1"], 10, false),
            image("b", &["b:1"], 1, false),
        ];
        let theirs = vec![
            image("c", &["c:1"], 2, false),
            image("a", &["a:1", "a:2"], 30, true),
        ];
        assert_eq!(
            lists([ours, theirs, Vec::new()]),
            [
                image("a", &["a:1", "a:2"], 40, true),
                image("b", &["b:1"], 1, false),
                image("c", &["c:1"], 2, false),
            ]
        );
    }

    #[test]
    fn the_first_side_that_has_an_image_says_which_one_it_is() {
        let status = |image: Option<cri::Image>, info: &str| cri::ImageStatusResponse {
            image,
            info: [("info".to_owned(), info.to_owned())].into(),
        };
        let moved = image("new", &["a:1"], 5, false);
        let old = image("old", &["a:1"], 7, false);
        let merged = statuses([
            status(None, "first"),
            status(Some(moved.clone()), "second"),
            status(Some(old), "third"),
        ]);
        assert_eq!(merged, status(Some(moved), "first"));
        assert_eq!(statuses([]), cri::ImageStatusResponse::default());
    }

    #[test]
    fn a_side_that_does_not_tell_its_containers_file_system_takes_no_place() {
        let usage = |place: &str| cri::FilesystemUsage {
            fs_id: Some(cri::FilesystemIdentifier {
                mountpoint: place.into(),
            }),
            ..Default::default()
        };
        let merged = file_systems([
            cri::ImageFsInfoResponse {
                image_filesystems: vec![usage("/ours")],
                container_filesystems: vec![usage("/scratch")],
            },
            cri::ImageFsInfoResponse {
                image_filesystems: vec![usage("/theirs")],
                container_filesystems: Vec::new(),
            },
        ]);
        assert_eq!(merged.image_filesystems, [usage("/ours"), usage("/theirs")]);
        assert_eq!(merged.container_filesystems, [usage("/scratch")]);
    }
}
