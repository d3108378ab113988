// SPDX-License-Identifier: Apache-2.0
//! Requests that fail, downloads that break, responses without end.

use super::*;

#[tokio::test]
async fn a_request_is_repeated_when_the_cause_may_pass() {
    for (status, tries, is_good) in [(429, 2, true), (503, 2, true), (400, 1, false)] {
        let fake = script(vec![Reply::new(status, ""), manifest()]);
        let result = plain(&fake, None).manifest("1", None, 0).await;
        assert_eq!(result.is_ok(), is_good, "{status}");
        assert_eq!(fake.count(""), tries, "{status}");
    }
}

#[tokio::test]
async fn a_host_that_asks_for_a_pause_gets_it_if_it_is_short() {
    let busy = |seconds: &str| Reply::new(429, "").with("Retry-After", seconds);
    let fake = script(vec![busy("1"), manifest()]);
    let asked = std::time::Instant::now();
    plain(&fake, None).manifest("1", None, 0).await.unwrap();
    assert!(asked.elapsed() >= Duration::from_secs(1));
    let fake = script(vec![busy("3600"), manifest()]);
    let error = plain(&fake, None).manifest("1", None, 0).await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unavailable);
    assert!(error.to_string().contains("3600 s"), "{error}");
    assert_eq!(fake.count(""), 1);
}

#[tokio::test]
async fn a_broken_server_is_given_up_after_three_tries() {
    let fake = script(vec![Reply::new(500, "")]);
    let error = plain(&fake, None).manifest("1", None, 0).await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unavailable);
    assert_eq!(fake.count(""), 3);
}

#[tokio::test]
async fn redirects_in_a_circle_end() {
    let fake = script(vec![Reply::redirect("/v2/app/manifests/1")]);
    let error = plain(&fake, None).manifest("1", None, 0).await.unwrap_err();
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
    let manifest = plain(&fake, None).manifest("1", None, 0).await.unwrap_err();
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
    let error = impatient(&silent).manifest("1", None, 0).await.unwrap_err();
    assert_eq!(error.kind(), FailureKind::Unavailable);
    let error = download(&impatient(&silent), b"four").await.unwrap_err();
    assert!(matches!(error, RegistryError::Stalled { .. }), "{error:?}");
    // A connection that is accepted but never answered fails, too.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    let mut config = plain_http(&[&host]);
    config.stall_timeout = SHORT;
    let error = repository(&host, None, &config)
        .manifest("1", None, 0)
        .await;
    assert_eq!(error.unwrap_err().kind(), FailureKind::Unavailable);
}

#[tokio::test]
async fn a_server_that_drips_is_given_up() {
    let blob = noise(1, 1000);
    let dripping = Reply::new(200, blob.clone()).dripping(SHORT / 4);
    let fake = script(vec![dripping]);
    let error = impatient(&fake).manifest("1", None, 0).await.unwrap_err();
    assert!(matches!(error, RegistryError::Slow { .. }), "{error:?}");
    let error = download(&impatient(&fake), &blob).await.unwrap_err();
    assert!(matches!(error, RegistryError::Stalled { .. }), "{error:?}");
}
