// SPDX-License-Identifier: Apache-2.0
//! Tests against registries that refuse, break or attack.

mod credentials;
mod transfers;

use std::time::Duration;

use bulkhead_text::chain;

use super::endpoint::REDIRECTS;
use super::fake::{Fake, MANIFEST_TYPE, Reply, noise, plain_http};
use super::*;
use crate::config::HostConfig;
use crate::digest::Digest;

const PASSWORD: &str = "open-sesame";
/// `user:open-sesame`, encoded by RFC 7617.
const BASIC: &str = "Basic dXNlcjpvcGVuLXNlc2FtZQ==";
const SHORT: Duration = Duration::from_millis(200);

fn user(password: &str) -> Option<Credentials> {
    Some(Credentials::Basic {
        username: "user".to_owned(),
        password: password.to_owned(),
    })
}

/// The repository `app` on `host`.
fn repository(host: &str, credentials: Option<Credentials>, config: &Config) -> Repository {
    let reference = format!("{host}/app:1").parse().unwrap();
    Repository::new(&reference, credentials, config).unwrap()
}

fn plain(fake: &Fake, credentials: Option<Credentials>) -> Repository {
    repository(&fake.host(), credentials, &plain_http(&[&fake.host()]))
}

fn impatient(fake: &Fake) -> Repository {
    let mut config = plain_http(&[&fake.host()]);
    config.stall_timeout = SHORT;
    repository(&fake.host(), None, &config)
}

fn manifest() -> Reply {
    Reply::new(200, "manifest").with("Content-Type", MANIFEST_TYPE)
}

/// A registry that demands the password.
fn basic_registry() -> Fake {
    Fake::start(|request| match request.header("authorization") {
        Some(BASIC) => manifest(),
        _ => Reply::challenge("Basic realm=\"here\""),
    })
}

/// A registry that sends the replies in order, and then the last one again and again.
fn script(replies: Vec<Reply>) -> Fake {
    let mut next = 0;
    Fake::start(move |_| {
        let reply = replies[next.min(replies.len() - 1)].clone();
        next += 1;
        reply
    })
}

async fn download(repository: &Repository, blob: &[u8]) -> Result<Vec<u8>, RegistryError> {
    let size_bytes = blob.len() as u64;
    repository
        .small_blob(&Digest::of(blob), size_bytes, u64::MAX)
        .await
}

#[tokio::test]
async fn a_manifest_is_asked_for_with_all_types_and_without_a_name() {
    let fake = script(vec![manifest().with("Content-Type", "ignored")]);
    let found = plain(&fake, None).manifest("1", None, 0).await.unwrap();
    assert_eq!(found.served.bytes, b"manifest");
    assert_eq!(found.served.media_type, MANIFEST_TYPE);
    let [request] = &fake.requests()[..] else {
        panic!("more than one request")
    };
    assert_eq!(request.path, "/v2/app/manifests/1");
    assert_eq!(request.header("authorization"), None);
    assert!(request.header("accept").unwrap().contains(MANIFEST_TYPE));
}

#[tokio::test]
async fn tls_is_spoken_unless_the_configuration_says_otherwise() {
    let fake = script(vec![manifest()]);
    let mut config = plain_http(&[]);
    config.stall_timeout = SHORT;
    let strict = repository(&fake.host(), None, &config);
    let error = strict.manifest("1", None, 0).await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unavailable, "{error:?}");
    assert_eq!(fake.count("/v2/"), 0);
}

#[tokio::test]
async fn mirrors_are_asked_first_and_never_get_the_password() {
    let host = basic_registry();
    let broken = script(vec![Reply::challenge("Basic")]);
    let empty = script(vec![Reply::new(404, "")]);
    let mut config = plain_http(&[&host.host(), &broken.host(), &empty.host()]);
    let settings = config.registries.get_mut(&host.host()).unwrap();
    settings.mirrors = vec![broken.host(), empty.host()];
    let asker = repository(&host.host(), user(PASSWORD), &config);
    asker.manifest("1", None, 0).await.unwrap();
    for mirror in [&broken, &empty] {
        let requests = mirror.requests();
        assert_eq!(requests.len(), 1);
        assert_eq!(requests[0].header("authorization"), None);
    }
    let full = script(vec![manifest()]);
    let settings = HostConfig {
        mirrors: vec![full.host()],
        ..HostConfig::default()
    };
    config = plain_http(&[&full.host()]);
    config.registries.insert("a.example".to_owned(), settings);
    let asker = repository("a.example", user(PASSWORD), &config);
    asker.manifest("1", None, 0).await.unwrap();
}

#[tokio::test]
async fn the_hosts_own_word_counts_when_no_mirror_helps_and_theirs_is_told() {
    let host = script(vec![Reply::new(403, "")]);
    let mut config = plain_http(&[&host.host()]);
    let settings = config.registries.get_mut(&host.host()).unwrap();
    // Nobody listens on this port.
    settings.mirrors = vec!["127.0.0.1:1".to_owned()];
    let error = repository(&host.host(), None, &config)
        .manifest("1", None, 0)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), FailureKind::Denied);
    let told = chain(&error);
    assert!(
        told.contains("127.0.0.1:1/") && told.contains("403"),
        "{told}"
    );
}
