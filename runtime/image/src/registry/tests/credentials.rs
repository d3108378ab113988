// SPDX-License-Identifier: Apache-2.0
//! Who gets a password or a token, and who does not.

use reqwest::Method;

use super::*;

#[tokio::test]
async fn a_password_is_sent_when_asked_for_and_then_at_once() {
    let fake = basic_registry();
    let repository = plain(&fake, user(PASSWORD));
    repository.manifest("1", None, 0).await.unwrap();
    repository.manifest("1", None, 0).await.unwrap();
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
        .manifest("1", None, 0)
        .await
        .unwrap();
    let error = repository(&fake.host(), user("other"), &config)
        .manifest("1", None, 0)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unauthenticated);
}

/// A registry that is its own token server. Who has the password gets a token; if `anonymous`, everybody does.
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
    repository.manifest("1", None, 0).await.unwrap();
    repository.manifest("1", None, 0).await.unwrap();
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
    plain(&fake, None).manifest("1", None, 0).await.unwrap();
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
    right.manifest("1", None, 0).await.unwrap();
    let asked = &fake.requests()[1];
    assert_eq!(
        asked.body,
        "grant_type=refresh_token&client_id=bulkhead&refresh_token=identity%26\
         &scope=repository%3Aapp%3Apull&service=s"
    );
    let error = plain(&fake, token("old"))
        .manifest("1", None, 0)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unauthenticated);
}

#[tokio::test]
async fn a_token_of_the_pull_itself_is_sent_as_it_is() {
    let fake = token_registry(false);
    let token = Credentials::Bearer("secret-token".to_owned());
    plain(&fake, Some(token))
        .manifest("1", None, 0)
        .await
        .unwrap();
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
        let error = repository.manifest("1", None, 0).await.unwrap_err();
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
    // A redirect does not lead there, either.
    let (url, headers) = (thief.url("/"), HeaderMap::new());
    endpoint
        .send(&Method::GET, &url, &headers, None)
        .await
        .unwrap_err();
    assert_eq!(thief.count(""), 0);
}
