// SPDX-License-Identifier: Apache-2.0
//! Reads CRI's `AuthConfig`: its five ways to give credentials, and the registry that they are for.
//!
//! Credentials for one registry are never sent to another. A pull from another registry is then done without
//! credentials, as other runtimes do it. No message contains a secret.

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bulkhead_image::Credentials;
use bulkhead_proto::cri;
use tonic::Status;

/// Accepts base64 with and without padding: Docker's tools write it, others do not.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);
/// Docker Hub's name in image names. `docker login` stores its credentials under the aliases.
const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_ALIASES: [&str; 2] = ["index.docker.io", "registry-1.docker.io"];

/// The credentials in `auth` for a pull from `host`, the registry in the image's name. `None` if there are none for it.
pub fn credentials(auth: cri::AuthConfig, host: &str) -> Result<Option<Credentials>, Status> {
    let read = read(&auth)?;
    if read.is_some() && !is_for(&auth.server_address, host) {
        let server = auth.server_address;
        tracing::info!("a pull from {host} came with credentials for {server}: not used");
        return Ok(None);
    }
    Ok(read)
}

fn read(auth: &cri::AuthConfig) -> Result<Option<Credentials>, Status> {
    if !auth.registry_token.is_empty() {
        return Ok(Some(Credentials::Bearer(auth.registry_token.clone())));
    }
    if !auth.identity_token.is_empty() {
        return Ok(Some(Credentials::Identity(auth.identity_token.clone())));
    }
    if !auth.username.is_empty() {
        return Ok(Some(Credentials::Basic {
            username: auth.username.clone(),
            password: auth.password.clone(),
        }));
    }
    if auth.auth.is_empty() {
        return Ok(None);
    }
    let wrong = || Status::invalid_argument("auth is not base64 of user:password");
    let text = BASE64.decode(&auth.auth).map_err(|_| wrong())?;
    let text = String::from_utf8(text).map_err(|_| wrong())?;
    let (username, password) = text.split_once(':').ok_or_else(wrong)?;
    Ok(Some(Credentials::Basic {
        username: username.to_owned(),
        password: password.trim_end_matches('\0').to_owned(),
    }))
}

/// Whether a server's address (a URL or only a host) names the registry `host`. An empty address matches every
/// registry.
fn is_for(server: &str, host: &str) -> bool {
    if server.is_empty() {
        return true;
    }
    let (scheme, rest) = server.split_once("://").unwrap_or(("https", server));
    let port = if scheme.eq_ignore_ascii_case("http") {
        ":80"
    } else {
        ":443"
    };
    let named = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let canonical = |host: &str| {
        let host = host.to_ascii_lowercase();
        let host = host.strip_suffix(port).unwrap_or(&host);
        let is_hub = DOCKER_HUB_ALIASES.contains(&host);
        if is_hub { DOCKER_HUB } else { host }.to_owned()
    };
    canonical(named) == canonical(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_read_with_and_without_padding() {
        for text in ["dXNlcjpwYXNzd29yZA==", "dXNlcjpwYXNzd29yZA"] {
            let auth = cri::AuthConfig {
                auth: text.into(),
                ..Default::default()
            };
            let read = credentials(auth, "registry").unwrap();
            let Some(Credentials::Basic { username, password }) = read else {
                panic!("{text}: {read:?}");
            };
            assert_eq!((username.as_str(), password.as_str()), ("user", "password"));
        }
    }

    #[test]
    fn a_bad_secret_is_not_repeated() {
        let auth = cri::AuthConfig {
            auth: "c2VjcmV0".into(),
            ..Default::default()
        };
        let error = credentials(auth, "registry").err().unwrap();
        assert!(!error.message().contains("c2VjcmV0") && !error.message().contains("secret"));
    }

    #[test]
    fn tokens_win_over_users() {
        let mut auth = cri::AuthConfig {
            username: "user".into(),
            auth: "dXNlcjpwYXNzd29yZA==".into(),
            identity_token: "identity".into(),
            registry_token: "registry".into(),
            ..Default::default()
        };
        let shown = |auth: &cri::AuthConfig| format!("{:?}", read(auth).unwrap());
        assert_eq!(shown(&auth), "Some(Bearer)");
        auth.registry_token.clear();
        assert_eq!(shown(&auth), "Some(Identity)");
        auth.identity_token.clear();
        assert_eq!(shown(&auth), "Some(Basic(\"user\"))");
        assert_eq!(shown(&cri::AuthConfig::default()), "None");
    }

    #[test]
    fn a_secret_goes_only_to_the_registry_that_it_is_for() {
        for (server, host, expected) in [
            ("", "registry.example", true),
            ("registry.example", "registry.example", true),
            ("REGISTRY.example", "registry.example", true),
            ("registry.example:443", "registry.example", true),
            ("registry.example", "registry.example:443", true),
            ("https://registry.example/v2/", "registry.example", true),
            (
                "https://registry.example:5000",
                "registry.example:5000",
                true,
            ),
            ("http://registry.example:80", "registry.example", true),
            ("127.0.0.1:5000", "127.0.0.1:5000", true),
            ("http://[::1]:5000/", "[::1]:5000", true),
            ("https://index.docker.io/v1/", "docker.io", true),
            ("docker.io", "docker.io", true),
            ("registry.example", "other.example", false),
            ("registry.example", "registry.example:5000", false),
            ("http://registry.example:443", "registry.example", false),
            ("registry.example", "registry.example.evil", false),
            ("https://registry.example@evil", "registry.example", false),
            ("https://", "registry.example", false),
            ("https://index.docker.io/v1/", "quay.io", false),
        ] {
            let auth = cri::AuthConfig {
                username: "user".into(),
                server_address: server.into(),
                ..Default::default()
            };
            let found = credentials(auth, host).unwrap();
            assert_eq!(found.is_some(), expected, "{server:?} for {host:?}");
        }
    }
}
