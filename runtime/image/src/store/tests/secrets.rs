// SPDX-License-Identifier: Apache-2.0
//! Who gets a layer that is in the store already: who can have it from the registry that is asked. Issue 13, point 12.

use super::*;
use crate::registry::fake::Reply;

const USER: &str = "user";
const PASSWORD: &str = "open-sesame";
/// Both, encoded by RFC 7617.
const BASIC: &str = "Basic dXNlcjpvcGVuLXNlc2FtZQ==";

fn owner() -> Option<Credentials> {
    Some(Credentials::Basic {
        username: USER.to_owned(),
        password: PASSWORD.to_owned(),
    })
}

/// A registry whose manifests are for all and whose blobs are for who has the password.
fn private(image: &FakeImage) -> Fake {
    let image = image.clone();
    Fake::start(move |request| {
        let is_open = request.path.contains("/manifests/");
        match request.header("authorization") == Some(BASIC) || is_open {
            true => image.serve(request),
            false => Reply::challenge("Basic"),
        }
    })
}

/// A store that has a private image.
async fn with_private_image(image: &FakeImage, others: &[&Fake]) -> (Bed, Fake, String) {
    let fake = private(image);
    let mut hosts: Vec<String> = others.iter().map(|fake| fake.host()).collect();
    hosts.push(fake.host());
    let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
    let bed = Bed::with(plain_http(&hosts));
    let name = format!("{}/app:1", fake.host());
    bed.store.pull(&name, owner()).await.unwrap();
    (bed, fake, name)
}

#[tokio::test]
async fn a_manifest_that_names_anothers_image_does_not_publish_it() {
    let image = two_layers(1);
    let (served, config) = (image.clone(), image.id().to_string());
    let nothing = Reply::new(404, "");
    let claims = |request: &crate::registry::fake::Request| request.method == "HEAD";
    type Answer = Box<dyn FnMut(&crate::registry::fake::Request) -> Reply + Send>;
    let stolen = image.clone();
    let with_config = image.clone();
    let own_layers = two_layers(50);
    let thief_of_diff_ids = FakeImage::of_parts(image.config.clone(), own_layers.layers);
    let thieves: [(&str, Answer, FailureKind); 4] = [
        (
            "it has the manifest only",
            Box::new(move |request| match request.path.contains("/manifests/") {
                true => served.serve(request),
                false => nothing.clone(),
            }),
            FailureKind::NotFound,
        ),
        (
            "it says that it has all",
            Box::new(move |request| match request.path.contains("/manifests/") {
                true => stolen.serve(request),
                false if claims(request) => Reply::new(200, ""),
                false => Reply::new(200, vec![b' '; 1000]),
            }),
            FailureKind::Corrupt,
        ),
        (
            "it has the configuration, too",
            Box::new(move |request| {
                let is_known =
                    request.path.contains("/manifests/") || request.path.ends_with(&config);
                match is_known || claims(request) {
                    true => with_config.serve(request),
                    false => Reply::new(404, ""),
                }
            }),
            FailureKind::NotFound,
        ),
        (
            "it has other layers with these diff ids",
            Box::new(move |request| thief_of_diff_ids.serve(request)),
            FailureKind::Corrupt,
        ),
    ];
    for (case, answer, kind) in thieves {
        let thief = Fake::start(answer);
        let (bed, _fake, name) = with_private_image(&image, &[&thief]).await;
        let stolen = format!("{}/mine:1", thief.host());
        let error = bed.store.pull(&stolen, None).await.unwrap_err();
        // Bytes of a wrong length are no valid answer.
        let is_expected = error.kind() == kind || error.kind() == FailureKind::Invalid;
        assert!(is_expected, "{case}: {error:?}");
        assert!(bed.store.find(&stolen).unwrap().is_none(), "{case}");
        let image = bed.store.find(&name).unwrap().unwrap();
        assert_eq!(image.repo_tags, [name], "{case}");
        assert_eq!(bed.layers(), 2, "{case}");
    }
}

#[tokio::test]
async fn an_image_in_the_store_is_for_who_may_have_it_from_the_registry() {
    let image = two_layers(1);
    let (bed, fake, name) = with_private_image(&image, &[]).await;
    let before = fake.count_of("GET", &image.layer_digest(0));
    let error = bed.store.pull(&name, None).await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unauthenticated, "{error:?}");
    bed.store.pull(&name, owner()).await.unwrap();
    assert_eq!(fake.count_of("GET", &image.layer_digest(0)), before);
}

#[tokio::test]
async fn each_layer_is_asked_for_with_the_credentials_of_the_pull() {
    let image = two_layers(1);
    let open = image.clone();
    let first = image.layer_digest(0);
    // The first layer is for the owner only, all else is for all.
    let fake = Fake::start(move |request| {
        let is_private = request.path.ends_with(&first);
        match is_private && request.header("authorization") != Some(BASIC) {
            true => Reply::challenge("Basic"),
            false => open.serve(request),
        }
    });
    let bed = Bed::new(&fake.host());
    let name = format!("{}/app:1", fake.host());
    bed.store.pull(&name, owner()).await.unwrap();
    let other = format!("{}/app:2", fake.host());
    let error = bed.store.pull(&other, None).await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unauthenticated, "{error:?}");
    assert!(bed.store.find(&other).unwrap().is_none());
    bed.store.pull(&other, owner()).await.unwrap();
}

#[tokio::test]
async fn a_layer_from_another_registry_is_verified_once_and_not_written_again() {
    let image = two_layers(1);
    let second = serving(&image);
    let (bed, _first, _) = with_private_image(&image, &[&second]).await;
    let inode =
        |path: &PathBuf| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap());
    let files: HashMap<_, _> = bed
        .files("layers")
        .iter()
        .map(|path| (path.clone(), inode(path)))
        .collect();
    for _ in 0..2 {
        let name = format!("{}/copy:1", second.host());
        bed.store.pull(&name, None).await.unwrap();
        for layer in 0..2 {
            assert_eq!(second.count_of("GET", &image.layer_digest(layer)), 1);
        }
    }
    assert_eq!(second.count_of("HEAD", "/blobs/"), 2);
    assert!(files.iter().all(|(path, before)| inode(path) == *before));
    // Without the notes about its sources a layer is downloaded again.
    for note in bed.files("sources") {
        std::fs::remove_file(note).unwrap();
    }
    let name = format!("{}/copy:1", second.host());
    bed.store.pull(&name, None).await.unwrap();
    assert_eq!(second.count_of("GET", &image.layer_digest(0)), 2);
}

#[tokio::test]
async fn a_host_that_does_not_know_head_or_leads_elsewhere_has_said_yes() {
    let image = two_layers(1);
    let storage = Fake::start(|_| Reply::new(403, "only GET"));
    let elsewhere = storage.url("/storage");
    for (case, answer) in [
        ("no HEAD", Reply::new(405, "")),
        ("a redirect", Reply::redirect(elsewhere)),
    ] {
        let served = image.clone();
        let fake = Fake::start(move |request| match request.method.as_str() {
            "HEAD" => answer.clone(),
            _ => served.serve(request),
        });
        let bed = Bed::new(&fake.host());
        let name = format!("{}/app:1", fake.host());
        for _ in 0..2 {
            let pulled = bed.store.pull(&name, None).await;
            pulled.unwrap_or_else(|error| panic!("{case}: {error:?}"));
        }
    }
}
