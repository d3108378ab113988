//! Indexes whose entries do not say what they are for: the configurations of the images do.

use serde_json::{Value, json};

use super::*;
use crate::registry::fake::{MANIFEST_TYPE, Reply};

const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";

/// A document that a registry has, with its media type.
type Document = (&'static str, Vec<u8>);

fn index(entries: &[&Document]) -> Document {
    let entry = |(media_type, bytes): &&Document| json!({ "mediaType": media_type, "digest": Digest::of(bytes), "size": bytes.len() });
    let entries: Vec<Value> = entries.iter().map(entry).collect();
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries });
    (INDEX_TYPE, index.to_string().into_bytes())
}

fn manifest(image: &FakeImage) -> Document {
    (MANIFEST_TYPE, image.manifest.clone())
}

/// An image for machines of another kind.
fn foreign(image: &FakeImage) -> FakeImage {
    let mut config: Value = serde_json::from_slice(&image.config).unwrap();
    config["architecture"] = "pdp11".into();
    FakeImage::of_parts(config.to_string().into_bytes(), image.layers.clone())
}

/// A registry that has `images` and `documents`. The last document has all tags.
fn registry(images: Vec<FakeImage>, documents: Vec<Document>) -> Fake {
    Fake::start(move |request| {
        if !request.path.contains("/manifests/") {
            let blobs = images.iter().map(|image| image.serve(request));
            return blobs.reduce(Reply::or).unwrap();
        }
        let named = |one: &&Document| request.path.ends_with(Digest::of(&one.1).as_str());
        let found = documents.iter().find(named).or(documents.last());
        let (media_type, bytes) = found.unwrap();
        Reply::new(200, bytes.clone()).with("Content-Type", *media_type)
    })
}

#[tokio::test]
async fn an_entry_without_a_platform_is_taken_if_its_configuration_suits() {
    let image = FakeImage::new("sh", &[b"content"]);
    let other = foreign(&image);
    let chart = json!({ "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "layers": [], "config":
        { "mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": Digest::of(b""), "size": 0 } });
    let chart: Document = (MANIFEST_TYPE, chart.to_string().into_bytes());
    let (ours, foreign) = (manifest(&image), manifest(&other));
    let nested = index(&[&foreign, &ours]);
    let deep = index(&[&index(&[&index(&[&ours])])]);
    let table = [
        (vec![&ours], true),
        (vec![&foreign, &ours], true),
        (vec![&chart, &nested], true),
        (vec![&foreign, &chart], false),
        (vec![&deep], false),
    ];
    for (entries, is_found) in table {
        let top = index(&entries);
        let documents = vec![
            ours.clone(),
            foreign.clone(),
            chart.clone(),
            nested.clone(),
            deep.clone(),
            index(&[&index(&[&ours])]),
            index(&[&ours]),
            top.clone(),
        ];
        let registry = registry(vec![image.clone(), other.clone()], documents);
        let bed = Bed::new(&registry.host());
        let pulled = bed
            .store
            .pull(&format!("{}/app:1", registry.host()), None)
            .await;
        if is_found {
            let pulled = pulled.unwrap();
            assert_eq!(pulled.id, image.id());
            let by_digest = format!("{}/app@{}", registry.host(), Digest::of(&top.1));
            assert_eq!(pulled.repo_digests, [by_digest], "the index is named");
        } else {
            assert!(pulled.is_err(), "{pulled:?}");
        }
    }
}
