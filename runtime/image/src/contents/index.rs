// SPDX-License-Identifier: Apache-2.0
//! What the records say, in memory: which image has a name, and which layers are named. So a question about one image
//! reads one record, and a removal none.
//!
//! The names and layers of an image are bounded by its manifest; its defaults, which may be long, are only in the record.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;

use super::ImageRecord;
use crate::digest::Digest;

/// The index.
#[derive(Debug, Default)]
pub struct Index {
    /// In order, so that ids with the same beginning are neighbours.
    images: BTreeMap<Digest, Indexed>,
    /// Tags and digests. Each is the name of one image.
    names: HashMap<String, Digest>,
    leases: BTreeMap<String, HashSet<Digest>>,
}

#[derive(Debug)]
struct Indexed {
    names: Vec<String>,
    layers: Vec<Digest>,
}

impl Index {
    pub fn new(images: Vec<ImageRecord>, leases: Vec<(String, Vec<Digest>)>) -> Self {
        let mut index = Self::default();
        for image in images {
            index.add_image(&image);
        }
        for (holder, layers) in leases {
            index.add_lease(&holder, &layers);
        }
        index
    }

    /// Adds an image, or replaces it. Its names are taken away from other images.
    pub fn add_image(&mut self, record: &ImageRecord) {
        let names = record.repo_tags.iter().chain(&record.repo_digests);
        let names: Vec<String> = names.cloned().collect();
        for name in &names {
            self.names.insert(name.clone(), record.id.clone());
        }
        let layers = record.layers.clone();
        self.images
            .insert(record.id.clone(), Indexed { names, layers });
    }

    pub fn remove_image(&mut self, id: &Digest) {
        for name in self.images.remove(id).into_iter().flat_map(|it| it.names) {
            // Another image may have taken the name.
            if self.names.get(&name) == Some(id) {
                self.names.remove(&name);
            }
        }
    }

    pub fn add_lease(&mut self, holder: &str, layers: &[Digest]) {
        let held = self.leases.entry(holder.to_owned()).or_default();
        held.extend(layers.iter().cloned());
    }

    pub fn remove_lease(&mut self, holder: &str) {
        self.leases.remove(holder);
    }

    pub fn ids(&self) -> Vec<Digest> {
        self.images.keys().cloned().collect()
    }

    pub fn holders(&self) -> Vec<String> {
        self.leases.keys().cloned().collect()
    }

    /// The image that has this tag or digest.
    pub fn named(&self, name: &str) -> Option<&Digest> {
        self.names.get(name)
    }

    /// The images whose id begins with `digits`, in order.
    pub fn beginning_with(&self, digits: &str) -> impl Iterator<Item = &Digest> {
        let beginning = format!("sha256:{digits}");
        let from = (Bound::Included(beginning.as_str()), Bound::Unbounded);
        let from = self.images.range::<str, _>(from);
        from.map(|(id, _)| id)
            .take_while(move |id| id.as_str().starts_with(&beginning))
    }

    /// The layers that an image or a lease names.
    pub fn layers(&self) -> HashSet<Digest> {
        let of_images = self.images.values().flat_map(|image| &image.layers);
        let of_leases = self.leases.values().flatten();
        of_images.chain(of_leases).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn record(id: &[u8], tags: &[&str], layers: &[&[u8]]) -> ImageRecord {
        ImageRecord {
            id: Digest::of(id),
            repo_tags: tags.iter().map(ToString::to_string).collect(),
            repo_digests: BTreeSet::from([format!("digest of {id:?}")]),
            layers: layers.iter().map(|layer| Digest::of(layer)).collect(),
            defaults: Default::default(),
            metadata_bytes: 0,
            artifact_type: None,
        }
    }

    #[test]
    fn a_name_is_that_of_the_image_that_got_it_last() {
        let mut index = Index::default();
        index.add_image(&record(b"a", &["1", "latest"], &[]));
        index.add_image(&record(b"b", &["2", "latest"], &[]));
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        assert_eq!(index.named("1"), Some(&a));
        assert_eq!(index.named("latest"), Some(&b));
        index.remove_image(&a);
        assert_eq!(index.named("1"), None);
        assert_eq!(index.named("latest"), Some(&b));
        index.remove_image(&b);
        assert!(index.names.is_empty() && index.ids().is_empty());
    }

    #[test]
    fn ids_are_found_by_their_beginning() {
        let records = (0u32..1000).map(|number| record(&number.to_le_bytes(), &[], &[]));
        let index = Index::new(records.collect(), Vec::new());
        for id in index.ids() {
            for digits in [&id.hex()[..2], &id.hex()[..5], id.hex()] {
                let all = index.ids();
                let expected: Vec<_> = all
                    .iter()
                    .filter(|id| id.hex().starts_with(digits))
                    .collect();
                let found: Vec<_> = index.beginning_with(digits).collect();
                assert_eq!(found, expected, "{digits}");
            }
        }
        assert_eq!(index.beginning_with("zz").count(), 0);
    }

    #[test]
    fn layers_are_named_by_images_and_leases() {
        let mut index = Index::default();
        index.add_image(&record(b"a", &[], &[b"1", b"2"]));
        index.add_lease("pod", &[Digest::of(b"2")]);
        index.add_lease("pod", &[Digest::of(b"3")]);
        assert_eq!(index.layers().len(), 3);
        index.remove_image(&Digest::of(b"a"));
        assert_eq!(index.layers().len(), 2);
        assert_eq!(index.holders(), ["pod"]);
        index.remove_lease("pod");
        assert!(index.layers().is_empty());
    }
}
