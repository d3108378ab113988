// SPDX-License-Identifier: Apache-2.0
//! Mirrors that send something else, stop or crawl: the next host is asked. Issue 13, point 7.

use super::*;
use crate::registry::fake::{Reply, Request};

fn flip(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    bytes
}

/// A registry with a mirror whose answers to requests with `part` in their path are spoilt.
fn mirrored(image: &FakeImage, part: &str, spoil: fn(Reply) -> Reply) -> (Bed, Fake, Fake) {
    let (served, part) = (image.clone(), part.to_owned());
    let mirror = Fake::start(move |request: &Request| {
        let reply = served.serve(request);
        match request.path.contains(&part) {
            true => spoil(reply),
            false => reply,
        }
    });
    let host = serving(image);
    let mut config = plain_http(&[&host.host(), &mirror.host()]);
    config.stall_timeout = Duration::from_millis(200);
    let settings = config.registries.get_mut(&host.host()).unwrap();
    settings.mirrors = vec![mirror.host()];
    (Bed::with(config), host, mirror)
}

#[tokio::test]
async fn a_mirror_that_does_not_send_what_was_promised_costs_nothing_but_time() {
    let image = two_layers(1);
    let (config, layer) = (image.id().to_string(), image.layer_digest(1));
    let by_digest = format!("app@{}", Digest::of(&image.manifest));
    type Spoil = fn(Reply) -> Reply;
    let wrong: Spoil = |reply| reply.changed(flip);
    let longer: Spoil = |reply| reply.changed(|bytes| [bytes, b"more"].concat());
    let shorter: Spoil = |reply| reply.changed(|bytes| bytes[..bytes.len() / 2].to_vec());
    let dripping: Spoil = |reply| reply.dripping(Duration::from_millis(20));
    let page: Spoil = |_| Reply::new(200, "<html>").with("Content-Type", "text/html");
    for (case, part, spoil, name) in [
        ("wrong layer", layer.as_str(), wrong, "app:1"),
        ("longer layer", &layer, longer, "app:1"),
        ("shorter layer", &layer, shorter, "app:1"),
        ("layer that drips", &layer, dripping, "app:1"),
        ("wrong configuration", &config, wrong, "app:1"),
        ("wrong manifest", "/manifests/", wrong, &by_digest),
        ("no manifest", "/manifests/", page, "app:1"),
    ] {
        let (bed, host, mirror) = mirrored(&image, part, spoil);
        let name = format!("{}/{name}", host.host());
        let pulled = bed.store.pull(&name, None).await;
        let pulled = pulled.unwrap_or_else(|error| panic!("{case}: {error:?}"));
        assert_eq!(pulled.id, image.id(), "{case}");
        assert!(mirror.count(part) > 0 && host.count(part) > 0, "{case}");
        assert_eq!(bed.layers(), 2, "{case}");
        assert!(bed.files("partial").is_empty(), "{case}");
    }
}

#[tokio::test]
async fn when_the_host_itself_sends_wrong_bytes_the_pull_fails_after_one_try_each() {
    let image = two_layers(1);
    let layer = image.layer_digest(1);
    let wrong = |image: &FakeImage| {
        let (image, layer) = (image.clone(), layer.clone());
        Fake::start(move |request| {
            let reply = image.serve(request);
            match request.path.ends_with(&layer) {
                true => reply.changed(flip),
                false => reply,
            }
        })
    };
    let (host, mirror) = (wrong(&image), wrong(&image));
    let mut config = plain_http(&[&host.host(), &mirror.host()]);
    let settings = config.registries.get_mut(&host.host()).unwrap();
    settings.mirrors = vec![mirror.host()];
    let bed = Bed::with(config);
    let name = format!("{}/app:1", host.host());
    let error = bed.store.pull(&name, None).await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Corrupt, "{error:?}");
    assert_eq!((mirror.count(&layer), host.count(&layer)), (1, 1));
    bed.wait_until_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_host_keeps_no_other_host_from_being_pulled_from() {
    let image = two_layers(1);
    // It sends the beginning of each layer and then nothing, again and again, for as long as the test runs.
    let served = image.clone();
    let slow = Fake::start(move |request| {
        let reply = served.serve(request);
        match request.path.contains("/blobs/") && !request.path.ends_with(served.id().as_str()) {
            true => reply.silent_after(100_000),
            false => reply,
        }
    });
    let fast = serving(&image);
    let bed = Bed::with(plain_http(&[&slow.host(), &fast.host()]));
    let stuck: Vec<_> = (0..8)
        .map(|tag| {
            let (store, name) = (bed.store.clone(), format!("{}/app:{tag}", slow.host()));
            tokio::spawn(async move { store.pull(&name, None).await })
        })
        .collect();
    wait_until("the slow pulls wait", || bed.files("partial").len() >= 2).await;
    // Even the same layers: who waits for them elsewhere would wait as long as the slow host wants.
    let name = format!("{}/app:1", fast.host());
    let pulled = tokio::time::timeout(PATIENCE, bed.store.pull(&name, None));
    pulled.await.expect("waits for the slow host").unwrap();
    stuck.iter().for_each(|pull| pull.abort());
}
