//! Artifacts: their blobs become layers with names of their own, and each has an id of its own.

use serde_json::{Value, json};

use super::*;
use crate::registry::fake::{MANIFEST_TYPE, Reply};

const EMPTY: &[u8] = b"{}";

/// A blob with its media type and its title.
type Blob = (&'static str, &'static str, Vec<u8>);

fn artifact(blobs: &[Blob]) -> Vec<u8> {
    let layers = blobs.iter().map(|(media_type, title, bytes)| {
        json!({ "mediaType": media_type, "digest": Digest::of(bytes), "size": bytes.len(),
            "annotations": { "org.opencontainers.image.title": title } })
    });
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "artifactType": "application/vnd.tests",
        "config": { "mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest::of(EMPTY), "size": 2 },
        "layers": layers.collect::<Vec<Value>>(),
    });
    manifest.to_string().into_bytes()
}

/// A registry in which the tag `0` names the first artifact, and so on. It has no configuration.
fn registry(artifacts: Vec<Vec<Blob>>) -> Fake {
    Fake::start(move |request| {
        if let Some((_, version)) = request.path.rsplit_once("/manifests/") {
            let manifest = artifact(&artifacts[version.parse::<usize>().unwrap()]);
            return Reply::new(200, manifest).with("Content-Type", MANIFEST_TYPE);
        }
        let mut blobs = artifacts.iter().flatten();
        match blobs.find(|(.., bytes)| request.path.ends_with(Digest::of(bytes).as_str())) {
            Some((.., bytes)) => Reply::new(200, bytes.clone()).ranged(request),
            None => Reply::new(404, ""),
        }
    })
}

#[tokio::test]
async fn an_artifact_has_its_manifests_digest_and_a_layer_for_each_blob_and_name() {
    let file = || noise(1, LAYER_BYTES);
    let first = vec![("a/b", "one", file()), ("a/b", "two", b"two".to_vec())];
    let renamed = vec![("a/b", "renamed", file())];
    let nothing = Vec::new();
    let ids = [&first, &renamed, &nothing].map(|blobs| Digest::of(&artifact(blobs)));
    let registry = registry(vec![first, renamed, nothing]);
    let bed = Bed::new(&registry.host());
    let name = |tag: usize| format!("{}/app:{tag}", registry.host());
    let pulled = bed.store.pull(&name(0), None).await.unwrap();
    assert_eq!(pulled.id, ids[0]);
    assert_eq!(
        pulled.artifact_type.as_deref(),
        Some("application/vnd.tests")
    );
    assert!(pulled.size_bytes > LAYER_BYTES as u64, "{pulled:?}");
    bed.store.pull(&name(1), None).await.unwrap();
    let empty = bed.store.pull(&name(2), None).await.unwrap();
    assert_eq!(empty.size_bytes, artifact(&[]).len() as u64, "its manifest");
    // The same bytes with another name are another file system.
    assert_eq!(bed.layers(), 3);
    let bed = bed.reopen();
    for (tag, layers) in [(0, 2), (1, 1), (2, 0)] {
        let found = bed.store.find(&name(tag)).unwrap().unwrap();
        assert_eq!(found.id, ids[tag]);
        assert!(found.artifact_type.is_some());
        let leased = bed.store.lease(found.id.as_str(), "pod").unwrap();
        assert_eq!(leased.len(), layers);
        assert!(leased.iter().all(|layer| is_erofs(&layer.path)));
    }
    // What is there is asked for and not downloaded again.
    let downloads = registry.count_of("GET", "/blobs/");
    bed.store.pull(&name(0), None).await.unwrap();
    assert_eq!(registry.count_of("GET", "/blobs/"), downloads);
}

#[tokio::test]
async fn an_artifact_with_a_wrong_name_or_blob_leaves_nothing() {
    let bad = vec![
        ("a/b", "good", b"x".to_vec()),
        ("a/b", "../bad", b"y".to_vec()),
    ];
    let no_archive = vec![("application/x-tar", "", noise(3, 2000))];
    let registry = registry(vec![bad, no_archive]);
    let bed = Bed::new(&registry.host());
    for (tag, word) in [(0, "../bad"), (1, "archive")] {
        let name = format!("{}/app:{tag}", registry.host());
        let error = bed.store.pull(&name, None).await.unwrap_err();
        let text = bulkhead_text::chain(&error);
        assert!(text.contains(word), "{text}");
        assert_ne!(error.kind(), FailureKind::Internal, "{text}");
    }
    assert!(bed.store.list().unwrap().is_empty());
    bed.wait_until_empty().await;
}
