// SPDX-License-Identifier: Apache-2.0
//! Against registries that are unwilling, broken or hostile.

use std::time::Duration;

use bulkhead_text::chain;

use super::endpoint::REDIRECTS;
use super::fake::{Fake, MANIFEST_TYPE, Reply, noise, plain_http};
use super::*;
use crate::config::HostConfig;
use crate::digest::Digest;

const PASSWORD: &str = "open-sesame";
/// `user:open-sesame` by RFC 7617.
const BASIC: &str = "Basic dXNlcjpvcGVuLXNlc2FtZQ==";
const SHORT: Duration = Duration::from_millis(200);

fn user(password: &str) -> Option<Credentials> {
    Some(Credentials::Basic {
        username: "user".to_owned(),
        password: password.to_owned(),
    })
}

/// Repository `app` on `host`.
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

/// Answers the requests in turn, the last reply again and again.
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
    let found = plain(&fake, None).manifest("1").await.unwrap();
    assert_eq!(found.bytes, b"manifest");
    assert_eq!(found.media_type, MANIFEST_TYPE);
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
    let error = strict.manifest("1").await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unavailable, "{error:?}");
    assert_eq!(fake.count("/v2/"), 0);
}

fn basic_registry() -> Fake {
    Fake::start(|request| match request.header("authorization") {
        Some(BASIC) => manifest(),
        _ => Reply::challenge("Basic realm=\"here\""),
    })
}

#[tokio::test]
async fn a_password_is_sent_when_asked_for_and_then_at_once() {
    let fake = basic_registry();
    let repository = plain(&fake, user(PASSWORD));
    repository.manifest("1").await.unwrap();
    repository.manifest("1").await.unwrap();
    let sent: Vec<_> = fake.requests();
    let sent: Vec<_> = sent.iter().map(|r| r.header("authorization")).collect();
    assert_eq!(sent, [None, Some(BASIC), Some(BASIC)]);
}

#[tokio::test]
async fn credentials_of_the_configuration_are_used_when_the_pull_has_none() {
    let fake = basic_registry();
    let mut config = plain_http(&[&fake.host()]);
    let settings = config.registries.get_mut(&fake.host()).unwrap();
    settings.username = Some("user".to_owned());
    settings.password = Some(PASSWORD.to_owned());
    repository(&fake.host(), None, &config)
        .manifest("1")
        .await
        .unwrap();
    let error = repository(&fake.host(), user("other"), &config)
        .manifest("1")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unauthenticated);
}

/// A registry with a token server in itself: who has the password gets a token, anybody gets one if `anonymous`.
fn token_registry(anonymous: bool) -> Fake {
    Fake::start(move |request| {
        let authorization = request.header("authorization");
        let host = request.header("host").unwrap();
        match request.path.split_once('?').unwrap_or((&request.path, "")) {
            ("/token", _) if anonymous || authorization == Some(BASIC) => {
                Reply::new(200, r#"{"access_token":"secret-token"}"#)
            }
            ("/token", _) => Reply::new(401, ""),
            _ if authorization == Some("Bearer secret-token") => manifest(),
            _ => Reply::challenge(format!(
                "Bearer realm=\"http://{host}/token\",service=\"the service\""
            )),
        }
    })
}

#[tokio::test]
async fn a_token_is_fetched_with_the_password_and_used_from_then_on() {
    let fake = token_registry(false);
    let repository = plain(&fake, user(PASSWORD));
    repository.manifest("1").await.unwrap();
    repository.manifest("1").await.unwrap();
    let requests = fake.requests();
    let seen: Vec<_> = requests
        .iter()
        .map(|r| (r.path.as_str(), r.header("authorization")))
        .collect();
    let manifest = "/v2/app/manifests/1";
    let token = "/token?service=the+service&scope=repository%3Aapp%3Apull";
    let bearer = Some("Bearer secret-token");
    assert_eq!(
        seen,
        [
            (manifest, None),
            (token, Some(BASIC)),
            (manifest, bearer),
            (manifest, bearer)
        ]
    );
}

#[tokio::test]
async fn a_token_is_fetched_without_a_password_by_who_has_none() {
    let fake = token_registry(true);
    plain(&fake, None).manifest("1").await.unwrap();
    let requests = fake.requests();
    assert_eq!(requests[1].header("authorization"), None);
}

#[tokio::test]
async fn an_identity_token_is_changed_into_one_of_the_registry_and_is_in_no_url() {
    let fake = Fake::start(|request| {
        let host = request.header("host").unwrap();
        match request.path.as_str() {
            "/token" if request.body.contains("refresh_token=identity%26") => {
                Reply::new(200, r#"{"access_token":"secret-token"}"#)
            }
            "/token" => Reply::new(401, ""),
            _ if request.header("authorization") == Some("Bearer secret-token") => manifest(),
            _ => Reply::challenge(format!("Bearer realm=\"http://{host}/token\",service=s")),
        }
    });
    let token = |text: &str| Some(Credentials::Identity(text.to_owned()));
    let right = plain(&fake, token("identity&"));
    right.manifest("1").await.unwrap();
    let asked = &fake.requests()[1];
    assert_eq!(
        asked.body,
        "grant_type=refresh_token&client_id=bulkhead&refresh_token=identity%26\
         &scope=repository%3Aapp%3Apull&service=s"
    );
    let error = plain(&fake, token("old")).manifest("1").await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unauthenticated);
}

#[tokio::test]
async fn a_token_of_the_pull_itself_is_sent_as_it_is() {
    let fake = token_registry(false);
    let token = Credentials::Bearer("secret-token".to_owned());
    plain(&fake, Some(token)).manifest("1").await.unwrap();
    assert_eq!(fake.count("/token"), 0);
}

#[tokio::test]
async fn refusals_are_told_apart_and_tell_no_secret() {
    let not_found = r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest\nunknown"}]}"#;
    for (case, fake, kind) in [
        (
            "wrong password",
            script(vec![Reply::challenge("Basic")]),
            FailureKind::Unauthenticated,
        ),
        (
            "wrong password for the token",
            token_registry(false),
            FailureKind::Unauthenticated,
        ),
        (
            "not allowed",
            script(vec![Reply::new(403, "")]),
            FailureKind::Denied,
        ),
        (
            "no such manifest",
            script(vec![Reply::new(404, not_found)]),
            FailureKind::NotFound,
        ),
        (
            "unknown challenge",
            script(vec![Reply::challenge("Negotiate")]),
            FailureKind::Invalid,
        ),
        (
            "no challenge",
            script(vec![Reply::new(401, "")]),
            FailureKind::Unauthenticated,
        ),
    ] {
        let repository = plain(&fake, user("wrong-secret"));
        let error = repository.manifest("1").await.unwrap_err();
        let text = format!("{} {error:?} {repository:?}", chain(&error));
        assert_eq!(error.kind(), kind, "{case}: {text}");
        assert!(!text.contains("wrong-secret"), "{case}: {text}");
        assert!(!text.contains("dXNlcjp3cm9uZy1z"), "{case}: {text}");
        assert!(!error.to_string().contains('\n'), "{case}: {text}");
    }
}

#[tokio::test]
async fn the_password_does_not_follow_a_redirect_to_another_host() {
    let storage = script(vec![Reply::new(200, "blob")]);
    let target = storage.url("/storage?signature=door-opener");
    let fake = Fake::start(move |request| match request.header("authorization") {
        Some(BASIC) => Reply::redirect(&target),
        _ => Reply::challenge("Basic"),
    });
    let blob = download(&plain(&fake, user(PASSWORD)), b"blob").await;
    assert_eq!(blob.unwrap(), b"blob");
    assert_eq!(storage.requests()[0].header("authorization"), None);
}

#[tokio::test]
async fn the_host_that_a_redirect_leads_to_names_nobody_who_gets_the_password() {
    for scheme in ["Basic", "Bearer realm=\"http://HOST/token\""] {
        let thief = Fake::start(move |request| {
            let host = request.header("host").unwrap();
            Reply::challenge(scheme.replace("HOST", host))
        });
        let target = thief.url("/storage?signature=door-opener");
        let fake = Fake::start(move |_| Reply::redirect(&target));
        let repository = plain(&fake, user(PASSWORD));
        let error = download(&repository, b"blob").await.unwrap_err();
        assert_eq!(error.kind(), FailureKind::Unauthenticated, "{error:?}");
        assert!(!chain(&error).contains("door-opener"), "{}", chain(&error));
        assert_eq!(thief.count(""), 1, "{scheme}");
        assert_eq!(thief.requests()[0].header("authorization"), None);
    }
}

#[tokio::test]
async fn a_token_server_without_tls_gets_no_password_for_a_registry_with_tls() {
    let thief = script(vec![Reply::new(200, r#"{"token":"t"}"#)]);
    let repository = repository("registry.example", user(PASSWORD), &plain_http(&[]));
    let challenge = auth::Challenge::Bearer {
        realm: thief.url("/token"),
        service: None,
        scope: None,
    };
    let endpoint = &repository.endpoints[0];
    let error = endpoint.answer(&challenge, "app").await.unwrap_err();
    assert!(error.to_string().contains("without TLS"), "{error}");
    // Nor does a redirect lead there.
    let (url, headers) = (thief.url("/"), HeaderMap::new());
    endpoint.send(&url, &headers, None).await.unwrap_err();
    assert_eq!(thief.count(""), 0);
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
    asker.manifest("1").await.unwrap();
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
    asker.manifest("1").await.unwrap();
}

#[tokio::test]
async fn the_hosts_own_word_counts_when_no_mirror_helps_and_theirs_is_told() {
    let host = script(vec![Reply::new(403, "")]);
    let mut config = plain_http(&[&host.host()]);
    let settings = config.registries.get_mut(&host.host()).unwrap();
    // Nobody listens there.
    settings.mirrors = vec!["127.0.0.1:1".to_owned()];
    let error = repository(&host.host(), None, &config)
        .manifest("1")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), FailureKind::Denied);
    let told = chain(&error);
    assert!(
        told.contains("127.0.0.1:1/") && told.contains("403"),
        "{told}"
    );
}

#[tokio::test]
async fn a_request_is_repeated_when_the_cause_may_pass() {
    for (status, tries, is_good) in [(429, 2, true), (503, 2, true), (400, 1, false)] {
        let fake = script(vec![Reply::new(status, ""), manifest()]);
        let result = plain(&fake, None).manifest("1").await;
        assert_eq!(result.is_ok(), is_good, "{status}");
        assert_eq!(fake.count(""), tries, "{status}");
    }
}

#[tokio::test]
async fn a_broken_server_is_given_up_after_three_tries() {
    let fake = script(vec![Reply::new(500, "")]);
    let error = plain(&fake, None).manifest("1").await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unavailable);
    assert_eq!(fake.count(""), 3);
}

#[tokio::test]
async fn redirects_in_a_circle_end() {
    let fake = script(vec![Reply::redirect("/v2/app/manifests/1")]);
    let error = plain(&fake, None).manifest("1").await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unavailable);
    assert_eq!(fake.count(""), REDIRECTS + 1);
}

#[tokio::test]
async fn a_broken_download_goes_on_where_it_stopped() {
    let blob = noise(1, 300_000);
    for knows_ranges in [true, false] {
        let content = blob.clone();
        let mut stops = vec![200_000, 70_000];
        let fake = Fake::start(move |request| {
            let reply = Reply::new(200, content.clone());
            let reply = if knows_ranges {
                reply.ranged(request)
            } else {
                reply
            };
            match stops.pop() {
                Some(bytes) => reply.closing_after(bytes),
                None => reply,
            }
        });
        let received = download(&plain(&fake, None), &blob).await.unwrap();
        assert!(received == blob, "ranges: {knows_ranges}");
        let requests = fake.requests();
        let ranges: Vec<_> = requests.iter().map(|r| r.header("range")).collect();
        let at = if knows_ranges { 270_000 } else { 200_000 };
        let last = format!("bytes={at}-");
        assert_eq!(ranges, [None, Some("bytes=70000-"), Some(&last)]);
    }
}

#[tokio::test]
async fn a_blob_that_always_breaks_at_one_place_is_given_up() {
    let blob = noise(1, 300_000);
    let content = blob.clone();
    let fake = Fake::start(move |_| Reply::new(200, content.clone()).closing_after(1000));
    let error = download(&plain(&fake, None), &blob).await.unwrap_err();
    assert!(matches!(error, RegistryError::Stalled { .. }), "{error:?}");
    assert_eq!(fake.count(""), 3);
}

#[tokio::test]
async fn answers_longer_than_they_may_be_are_refused() {
    let fake = script(vec![Reply::new(200, "four!")]);
    let blob = download(&plain(&fake, None), b"four").await.unwrap_err();
    let fake = script(vec![Reply::new(200, vec![b' '; (4 << 20) + 1])]);
    let manifest = plain(&fake, None).manifest("1").await.unwrap_err();
    let repository = plain(&fake, None);
    let small = repository.small_blob(&Digest::of(b""), 101, 100).await;
    for (error, limit) in [(blob, 4), (manifest, 4 << 20), (small.unwrap_err(), 100)] {
        assert!(
            matches!(error, RegistryError::TooLarge { limit_bytes, .. } if limit_bytes == limit),
            "{error:?}"
        );
        assert_eq!(error.kind(), FailureKind::Invalid);
    }
    assert_eq!(fake.count("/blobs/"), 0);
}

#[tokio::test]
async fn a_silent_server_is_given_up() {
    let silent = script(vec![Reply::new(200, "four").silent_after(1)]);
    let error = impatient(&silent).manifest("1").await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unavailable);
    let error = download(&impatient(&silent), b"four").await.unwrap_err();
    assert!(matches!(error, RegistryError::Stalled { .. }), "{error:?}");
    // Nor is a connection answered that is only accepted.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let mut config = plain_http(&[&host]);
    config.stall_timeout = SHORT;
    let error = repository(&host, None, &config).manifest("1").await;
    assert_eq!(error.unwrap_err().kind(), FailureKind::Unavailable);
}

#[tokio::test]
async fn a_server_that_drips_is_given_up() {
    let blob = noise(1, 1000);
    let dripping = Reply::new(200, blob.clone()).dripping(SHORT / 4);
    let fake = script(vec![dripping]);
    let error = impatient(&fake).manifest("1").await.unwrap_err();
    assert!(matches!(error, RegistryError::Slow { .. }), "{error:?}");
    let error = download(&impatient(&fake), &blob).await.unwrap_err();
    assert!(matches!(error, RegistryError::Stalled { .. }), "{error:?}");
}
