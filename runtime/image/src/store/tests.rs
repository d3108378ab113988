// SPDX-License-Identifier: Apache-2.0
//! Complete pulls, from Debian's registry and from one that fails as the test wants.

mod artifacts;
mod debian;
mod indexes;
mod mirrors;
mod secrets;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::*;
use crate::contents::MIN_ID_DIGITS;
use crate::failure::FailureKind;
use crate::registry::fake::{Fake, FakeImage, noise, plain_http};
use debian::{Access, DebianRegistry};

const EROFS_MAGIC: [u8; 4] = [0xe2, 0xe1, 0xf5, 0xe0];
const PATIENCE: Duration = Duration::from_secs(10);
const LAYER_BYTES: usize = 200_000;

/// A store that talks to one host, in a directory of its own.
struct Bed {
    _directory: TempDir,
    config: Config,
    store: Store,
}

impl Bed {
    fn new(host: &str) -> Self {
        Self::with(plain_http(&[host]))
    }

    fn with(mut config: Config) -> Self {
        let directory = tempfile::tempdir().unwrap();
        config.root = directory.path().join("images");
        Self {
            store: Store::open(config.clone()).unwrap(),
            config,
            _directory: directory,
        }
    }

    /// Opens the store again, as after a restart of the daemon.
    fn reopen(self) -> Self {
        drop(self.store);
        Self {
            store: Store::open(self.config.clone()).unwrap(),
            ..self
        }
    }

    fn files(&self, directory: &str) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.config.root.join(directory)).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    fn layers(&self) -> usize {
        self.files("layers").len()
    }

    /// Waits until no file of a layer is left, because aborted tasks end a moment later.
    async fn wait_until_empty(&self) {
        wait_until("no file is left", || {
            self.layers() + self.files("partial").len() == 0
        })
        .await;
    }
}

async fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// An image of two layers, whose content depends on `seed`.
fn two_layers(seed: u32) -> FakeImage {
    let (a, b) = (noise(seed, LAYER_BYTES), noise(seed + 1, LAYER_BYTES));
    FakeImage::new("sh", &[&a, &b])
}

fn serving(image: &FakeImage) -> Fake {
    let image = image.clone();
    Fake::start(move |request| image.serve(request))
}

fn is_erofs(path: &Path) -> bool {
    let bytes = std::fs::read(path).unwrap();
    bytes.get(1024..1028) == Some(&EROFS_MAGIC[..])
}

#[tokio::test]
async fn an_image_is_found_by_all_its_names() {
    let registry = DebianRegistry::start(Access::All);
    let image = two_layers(1);
    registry.push(&image, "1").await;
    let bed = Bed::new(&registry.host());
    let app = format!("{}/app", registry.host());
    let tag = format!("{app}:1");
    let pulled = bed.store.pull(&tag, None).await.unwrap();
    assert_eq!(pulled.id, image.id());
    assert_eq!(pulled.defaults.cmd, ["sh"]);
    assert_eq!(pulled.repo_tags, std::slice::from_ref(&tag));
    let by_digest = format!("{app}@{}", Digest::of(&image.manifest));
    assert_eq!(pulled.repo_digests, std::slice::from_ref(&by_digest));
    assert!(pulled.size_bytes > 2 * LAYER_BYTES as u64);
    let hex = image.id().hex().to_owned();
    let (id, short) = (format!("sha256:{hex}"), format!("sha256:{}", &hex[..12]));
    let tag_and_digest = by_digest.replace('@', ":other@");
    for name in [
        tag.as_str(),
        &by_digest,
        &tag_and_digest,
        &id,
        &hex,
        &short,
        &hex[..12],
        &hex[..4],
    ] {
        let found = bed.store.find(name).unwrap();
        assert_eq!(found.map(|image| image.id), Some(image.id()), "{name}");
    }
    let unknown = format!("{app}@{}", Digest::of(b"unknown"));
    let other_tag = format!("{app}:2");
    for name in [&other_tag, &unknown, "0000000", "app:1", &hex[..3]] {
        // A name that is not valid is an error; it never names an image.
        let found = bed.store.find(name);
        assert!(!matches!(found, Ok(Some(_))), "{name}");
    }
    let blobs = bed.store.lease(&id, "pod").unwrap();
    assert_eq!(blobs.len(), 2);
    assert!(blobs.iter().all(|blob| is_erofs(&blob.path)));
    assert_eq!(bed.store.list().unwrap().len(), 1);
}

#[tokio::test]
async fn an_image_pulled_by_digest_has_no_tag() {
    let registry = DebianRegistry::start(Access::All);
    let image = two_layers(1);
    registry.push(&image, "1").await;
    let bed = Bed::new(&registry.host());
    let name = format!("{}/app@{}", registry.host(), Digest::of(&image.manifest));
    let pulled = bed.store.pull(&name, None).await.unwrap();
    assert!(pulled.repo_tags.is_empty());
    assert_eq!(pulled.repo_digests, [name]);
}

#[tokio::test]
async fn a_registry_with_a_password_opens_to_who_has_it() {
    let registry = DebianRegistry::start(Access::Password);
    registry.push(&two_layers(1), "1").await;
    let bed = Bed::new(&registry.host());
    let name = format!("{}/app:1", registry.host());
    let user = |password: &str| {
        Some(Credentials::Basic {
            username: debian::USER.to_owned(),
            password: password.to_owned(),
        })
    };
    for credentials in [None, user("wrong")] {
        let error = bed.store.pull(&name, credentials).await.unwrap_err();
        assert_eq!(error.kind(), FailureKind::Unauthenticated, "{error:?}");
    }
    bed.store.pull(&name, user(debian::PASSWORD)).await.unwrap();
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let registry = DebianRegistry::start(Access::All);
    registry.push(&two_layers(1), "1").await;
    let bed = Bed::new(&registry.host());
    for name in ["app:2", "other:1"] {
        let name = format!("{}/{name}", registry.host());
        let error = bed.store.pull(&name, None).await.unwrap_err();
        assert_eq!(error.kind(), FailureKind::NotFound, "{error:?}");
    }
}

#[tokio::test]
async fn one_image_has_many_tags_and_a_tag_one_image() {
    let registry = DebianRegistry::start(Access::All);
    let (first, second) = (two_layers(1), two_layers(10));
    for tag in ["1", "latest"] {
        registry.push(&first, tag).await;
    }
    let bed = Bed::new(&registry.host());
    let name = |tag: &str| format!("{}/app:{tag}", registry.host());
    bed.store.pull(&name("1"), None).await.unwrap();
    let both = bed.store.pull(&name("latest"), None).await.unwrap();
    assert_eq!(both.repo_tags, [name("1"), name("latest")]);
    assert_eq!(bed.store.list().unwrap().len(), 1);

    registry.push(&second, "latest").await;
    let moved = bed.store.pull(&name("latest"), None).await.unwrap();
    assert_eq!(moved.id, second.id());
    let stays = bed.store.find(first.id().as_str()).unwrap().unwrap();
    assert_eq!(stays.repo_tags, [name("1")]);
    let found = bed.store.find(&name("latest")).unwrap().unwrap();
    assert_eq!(found.id, second.id());
    assert_eq!(bed.layers(), 4);
}

#[tokio::test]
async fn a_second_pull_fetches_no_layer() {
    let image = two_layers(1);
    let fake = serving(&image);
    let bed = Bed::new(&fake.host());
    let name = format!("{}/app:1", fake.host());
    let first = bed.store.pull(&name, None).await.unwrap();
    let blobs = fake.count("/blobs/");
    let second = bed.store.pull(&name, None).await.unwrap();
    // The configuration is fetched, and the registry is asked for each layer.
    assert_eq!(fake.count(image.id().as_str()), 2);
    assert_eq!(fake.count_of("HEAD", "/blobs/"), 2);
    assert_eq!(fake.count("/blobs/"), blobs + 3);
    assert_eq!(fake.count("/manifests/"), 2);
    assert_eq!(format!("{first:?}"), format!("{second:?}"));
    assert_eq!(bed.layers(), 2);
    // A pull fetches a layer that was lost.
    std::fs::remove_file(&bed.files("layers")[0]).unwrap();
    assert_eq!(bed.store.list().unwrap().len(), 1);
    bed.store.pull(&name, None).await.unwrap();
    assert_eq!(bed.layers(), 2);
}

#[tokio::test]
async fn the_beginning_of_two_ids_names_neither() {
    let mut seen = HashMap::new();
    let mut images = (0..).map(|number| FakeImage::new(&number.to_string(), &[]));
    let (first, second) = loop {
        let image = images.next().unwrap();
        let beginning = image.id().hex()[..MIN_ID_DIGITS].to_owned();
        if let Some(other) = seen.insert(beginning, image.clone()) {
            break (other, image);
        }
    };
    let served = [first.clone(), second.clone()];
    let fake = Fake::start(move |request| {
        let is_second = request.path.ends_with("/2") || request.path.ends_with(second.id().hex());
        served[usize::from(is_second)].serve(request)
    });
    let bed = Bed::new(&fake.host());
    for tag in [1, 2] {
        let name = format!("{}/app:{tag}", fake.host());
        bed.store.pull(&name, None).await.unwrap();
    }
    let id = first.id();
    let error = bed.store.find(&id.hex()[..MIN_ID_DIGITS]).unwrap_err();
    assert_eq!(error.kind(), FailureKind::Invalid);
    let found = bed.store.find(id.hex()).unwrap().unwrap();
    assert_eq!(found.id, id);
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_at_the_same_time_make_each_layer_once() {
    let image = two_layers(1);
    let fake = serving(&image);
    let bed = Bed::new(&fake.host());
    let pulls: Vec<_> = (0..4)
        .map(|tag| {
            let (store, name) = (bed.store.clone(), format!("{}/app:{tag}", fake.host()));
            tokio::spawn(async move { store.pull(&name, None).await })
        })
        .collect();
    for pull in pulls {
        pull.await.unwrap().unwrap();
    }
    for layer in 0..2 {
        assert_eq!(fake.count_of("GET", &image.layer_digest(layer)), 1);
    }
    assert_eq!(bed.layers(), 2);
    let images = bed.store.list().unwrap();
    assert_eq!(images.len(), 1);
    assert_eq!(images[0].repo_tags.len(), 4);
}

/// Serves the first layer, and the second one without its last byte.
fn stopping_before_the_end(image: &FakeImage) -> Fake {
    let (image, mut times) = (image.clone(), 0);
    Fake::start(move |request| {
        let reply = image.serve(request);
        if !request.path.ends_with(&image.layer_digest(1)) || times == 1 {
            return reply;
        }
        times += 1;
        reply.silent_after(image.layers[1].len() - 1)
    })
}

#[tokio::test]
async fn a_dropped_pull_leaves_nothing() {
    let image = two_layers(1);
    let fake = stopping_before_the_end(&image);
    let bed = Bed::new(&fake.host());
    let name = format!("{}/app:1", fake.host());
    let (store, pulled) = (bed.store.clone(), name.clone());
    let pull = tokio::spawn(async move { store.pull(&pulled, None).await });
    wait_until("the first layer is there", || bed.layers() == 1).await;
    wait_until("the second begins", || bed.files("partial").len() == 1).await;
    pull.abort();
    bed.wait_until_empty().await;
    assert!(bed.store.list().unwrap().is_empty());
    wait_until("no pull in progress", || {
        bed.store.progress(&name).is_none()
    })
    .await;
    // The next pull works.
    bed.store.pull(&name, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_dropped_at_any_moment_leaves_nothing() {
    let fake = serving(&two_layers(1));
    let bed = Bed::new(&fake.host());
    let name = format!("{}/app:1", fake.host());
    for step in 0..40 {
        let pull = bed.store.pull(&name, None);
        let moment = Duration::from_micros(step * 500);
        if let Ok(pulled) = tokio::time::timeout(moment, pull).await {
            bed.store.remove(pulled.unwrap().id.as_str()).unwrap();
        }
        bed.wait_until_empty().await;
        assert!(bed.store.list().unwrap().is_empty());
    }
}

#[tokio::test]
async fn who_waits_for_a_pull_that_is_dropped_pulls_itself() {
    let image = two_layers(1);
    let fake = stopping_before_the_end(&image);
    let bed = Bed::new(&fake.host());
    let name = |tag: u32| format!("{}/app:{tag}", fake.host());
    let pull = |tag| {
        let (store, name) = (bed.store.clone(), name(tag));
        tokio::spawn(async move { store.pull(&name, None).await })
    };
    let first = pull(1);
    wait_until("the first layer is there", || bed.layers() == 1).await;
    let second = pull(2);
    wait_until("the second pull waits", || {
        let progress = bed.store.progress(&name(2));
        progress.is_some_and(|progress| progress.received_bytes > 0)
    })
    .await;
    first.abort();
    second.await.unwrap().unwrap();
    assert_eq!(fake.count_of("GET", &image.layer_digest(0)), 1);
    assert_eq!(bed.layers(), 2);
}

#[tokio::test]
async fn bytes_that_are_not_the_promised_ones_are_refused_and_removed() {
    let image = two_layers(1);
    let flip = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        bytes
    };
    let other_config = two_layers(50).config;
    let wrong_diff_ids = FakeImage::of_parts(other_config, image.layers.clone());
    let cut = image.layers[1][..LAYER_BYTES / 2].to_vec();
    let cut = FakeImage::of_parts(image.config.clone(), vec![image.layers[0].clone(), cut]);
    let digest = format!("@{}", Digest::of(&image.manifest));
    let layer = image.layer_digest(1);
    let config = image.id().to_string();
    for (case, served, what, version) in [
        ("layer", &image, layer.as_str(), ":1"),
        ("configuration", &image, &config, ":1"),
        ("manifest", &image, "/manifests/", &digest),
        ("diff ids", &wrong_diff_ids, "none", ":1"),
        ("cut layer", &cut, "none", ":1"),
    ] {
        let (served, what) = (served.clone(), what.to_owned());
        let fake = Fake::start(move |request| {
            let reply = served.serve(request);
            if request.path.contains(&what) {
                return reply.changed(flip);
            }
            reply
        });
        let bed = Bed::new(&fake.host());
        let name = format!("{}/app{version}", fake.host());
        let error = bed.store.pull(&name, None).await.unwrap_err();
        assert_eq!(error.kind(), FailureKind::Corrupt, "{case}: {error:?}");
        bed.wait_until_empty().await;
        assert!(bed.store.list().unwrap().is_empty(), "{case}");
    }
}

#[tokio::test]
async fn a_lease_keeps_layers_longer_than_the_image_and_a_restart() {
    let fake = serving(&two_layers(1));
    let bed = Bed::new(&fake.host());
    let name = format!("{}/app:1", fake.host());
    bed.store.pull(&name, None).await.unwrap();
    let leased = bed.store.lease(&name, "pod").unwrap();
    bed.store.lease(&name, "other").unwrap();
    bed.store.remove(&name).unwrap();
    assert!(bed.store.find(&name).unwrap().is_none());
    let bed = bed.reopen();
    assert!(leased.iter().all(|blob| is_erofs(&blob.path)));
    assert_eq!(bed.store.holders(), ["other", "pod"]);
    bed.store.release("other").unwrap();
    assert_eq!(bed.layers(), 2);
    bed.store.release("pod").unwrap();
    assert_eq!(bed.layers(), 0);
    bed.store.release("nobody").unwrap();
    let error = bed.store.lease(&name, "pod").unwrap_err();
    assert_eq!(error.kind(), FailureKind::NotFound);
}

#[tokio::test]
async fn a_restart_removes_what_nobody_names_and_nothing_else() {
    let image = two_layers(1);
    let fake = serving(&image);
    let bed = Bed::new(&fake.host());
    let name = format!("{}/app:1", fake.host());
    bed.store.pull(&name, None).await.unwrap();
    let root = &bed.config.root;
    let orphan = format!("layers/{}.erofs", Digest::of(b"orphan").hex());
    for path in [orphan.as_str(), "partial/7", "layers/lost+found"] {
        std::fs::write(root.join(path), b"x").unwrap();
    }
    let bed = bed.reopen();
    let root = &bed.config.root;
    assert!(!root.join(orphan).exists());
    assert!(root.join("layers/lost+found").exists());
    assert!(bed.files("partial").is_empty());
    let found = bed.store.find(&name).unwrap().unwrap();
    assert_eq!(found.id, image.id());
    assert_eq!(bed.layers(), 3);
}

#[tokio::test]
async fn an_image_without_layers_has_a_size_all_the_same() {
    let image = FakeImage::new("sh", &[]);
    let fake = serving(&image);
    let bed = Bed::new(&fake.host());
    let name = format!("{}/app:1", fake.host());
    let pulled = bed.store.pull(&name, None).await.unwrap();
    let metadata = (image.manifest.len() + image.config.len()) as u64;
    assert_eq!(pulled.size_bytes, metadata);
    assert_eq!(bed.store.list().unwrap()[0].size_bytes, metadata);
}

#[test]
fn an_image_of_a_version_that_did_not_count_has_a_size_too() {
    let bed = Bed::new("a.example");
    let id = Digest::of(b"a");
    let json = serde_json::json!({
        "id": id, "repo_tags": [], "repo_digests": [], "layers": [],
        "defaults": ImageDefaults::default(),
    });
    let record: ImageRecord = serde_json::from_value(json).unwrap();
    bed.store.contents.publish(&record).unwrap();
    let found = bed.store.find(id.as_str()).unwrap().unwrap();
    assert_eq!(found.size_bytes, 1);
}

#[tokio::test]
async fn a_store_in_use_is_not_opened_and_not_touched() {
    let bed = Bed::new("a.example");
    let partial = bed.config.root.join("partial/0");
    std::fs::write(&partial, b"x").unwrap();
    let error = Store::open(bed.config.clone()).unwrap_err();
    assert!(error.to_string().contains("records"), "{error:?}");
    assert!(partial.exists());
}

#[tokio::test]
async fn a_damaged_layer_is_noticed_before_it_is_used_and_the_next_pull_brings_it_anew() {
    let image = two_layers(1);
    let fake = serving(&image);
    let mut bed = Bed::new(&fake.host());
    let name = format!("{}/app:1", fake.host());
    let pull = async |bed: &Bed| bed.store.pull(&name, None).await.unwrap().id.to_string();
    let id = pull(&bed).await;
    let good: Vec<_> = bed.store.lease(&id, "holder").unwrap();
    let path = &good[1].path;
    let bytes = std::fs::read(path).unwrap();
    let flip = |at: usize| {
        // The clock of a file system may tick only a hundred times in a second.
        std::thread::sleep(Duration::from_millis(20));
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    let damages: [(&str, &dyn Fn()); 4] = [
        ("flipped in its data", &|| flip(bytes.len() / 2)),
        ("flipped in its superblock", &|| flip(1024 + 40)),
        ("cut", &|| std::fs::write(path, &bytes[..9000]).unwrap()),
        ("empty", &|| std::fs::write(path, "").unwrap()),
    ];
    for (what, damage) in damages {
        for is_restarted in [false, true] {
            damage();
            if is_restarted {
                bed = bed.reopen();
            }
            let leased = bed.store.lease(&id, "other");
            let error = leased.expect_err(what);
            if path.exists() {
                panic!("{what}: the layer stays: {error}");
            }
            assert!(bed.store.find(&id).unwrap().is_none(), "{what}");
            assert_eq!(pull(&bed).await, id, "{what}");
            assert_eq!(std::fs::read(path).unwrap(), bytes, "{what}");
            bed.store.lease(&id, "other").unwrap();
            // A pull mends it, too.
            damage();
            assert_eq!(pull(&bed).await, id, "{what}");
            assert_eq!(std::fs::read(path).unwrap(), bytes, "{what}");
        }
    }
    // What an earlier version has made has no sum. It is taken as it is, and then kept an eye on.
    bed.store.contents.forget_sums();
    bed.store.lease(&id, "other").unwrap();
    flip(9000);
    bed.store.lease(&id, "other").unwrap_err();
    bed.store.remove(&id).unwrap();
    for holder in ["holder", "other"] {
        bed.store.release(holder).unwrap();
    }
    assert_eq!(bed.layers(), 0);
    assert!(bed.store.contents.has_no_sums());
}

#[tokio::test]
async fn what_an_image_took_is_free_after_its_removal() {
    let image = two_layers(1);
    let fake = serving(&image);
    let bed = Bed::new(&fake.host());
    let name = format!("{}/app:1", fake.host());
    let before = bed.store.usage().unwrap();
    let pulled = bed.store.pull(&name, None).await.unwrap();
    let during = bed.store.usage().unwrap();
    let metadata = (image.manifest.len() + image.config.len()) as u64;
    let layers = during.used_bytes - before.used_bytes;
    assert_eq!(layers + metadata, pulled.size_bytes);
    assert_eq!(during.inodes - before.inodes, 2);
    bed.store.remove(&name).unwrap();
    let after = bed.store.usage().unwrap();
    assert_eq!(
        (after.used_bytes, after.inodes),
        (before.used_bytes, before.inodes)
    );
    bed.store.remove(&name).unwrap();
}

#[tokio::test]
async fn a_layer_of_two_images_goes_with_the_second() {
    let (shared, own) = (noise(1, LAYER_BYTES), noise(2, LAYER_BYTES));
    let first = FakeImage::new("a", &[&shared]);
    let second = FakeImage::new("b", &[&shared, &own]);
    let images = [first, second.clone()];
    let fake = Fake::start(move |request| {
        let of_second = request.path.ends_with("/2") || request.path.ends_with(second.id().hex());
        let of_second = of_second || request.path.ends_with(&second.layer_digest(1));
        images[usize::from(of_second)].serve(request)
    });
    let bed = Bed::new(&fake.host());
    let name = |tag: u32| format!("{}/app:{tag}", fake.host());
    for tag in [1, 2] {
        bed.store.pull(&name(tag), None).await.unwrap();
    }
    assert_eq!(bed.layers(), 2);
    bed.store.remove(&name(2)).unwrap();
    assert_eq!(bed.layers(), 1);
    bed.store.remove(&name(1)).unwrap();
    assert_eq!(bed.layers(), 0);
}

#[tokio::test]
async fn progress_counts_up_to_the_total() {
    let image = two_layers(1);
    let fake = stopping_before_the_end(&image);
    let mut config = plain_http(&[&fake.host()]);
    config.stall_timeout = Duration::from_millis(500);
    let bed = Bed::with(config);
    let name = format!("{}/app:1", fake.host());
    assert_eq!(bed.store.progress(&name), None);
    let (store, pulled) = (bed.store.clone(), name.clone());
    let pull = tokio::spawn(async move { store.pull(&pulled, None).await });
    let total_bytes = image.layers.iter().map(|layer| layer.len() as u64).sum();
    let expected = PullProgress {
        received_bytes: total_bytes - 1,
        total_bytes,
    };
    wait_until("all but one byte are received", || {
        bed.store.progress(&name) == Some(expected)
    })
    .await;
    // The last byte comes over another connection.
    pull.await.unwrap().unwrap();
    assert_eq!(bed.store.progress(&name), None);
    let ranges = fake.requests();
    let ranges: Vec<_> = ranges.iter().filter_map(|r| r.header("range")).collect();
    assert_eq!(ranges, [format!("bytes={}-", image.layers[1].len() - 1)]);
}

#[tokio::test]
async fn names_that_cannot_be_reach_no_registry() {
    let bed = Bed::new("a.example");
    for name in [
        "",
        "UPPER",
        "a.example/app:",
        "a.example/../x",
        "a@sha256:0",
    ] {
        let error = bed.store.pull(name, None).await.unwrap_err();
        assert_eq!(error.kind(), FailureKind::Invalid, "{name}");
    }
}
