// SPDX-License-Identifier: Apache-2.0
//! The streaming server: exec, attach and port-forward for kubelet and crictl.
//!
//! CRI's `Exec`, `Attach` and `PortForward` answer with a URL of this server, which can be used for one request. The
//! request upgrades its connection to SPDY/3.1 ([`spdy`]) or WebSocket ([`websocket`]). Then the connection carries a
//! [`session`] with a process, or [`forward`]ed connections. The daemon copies the bytes to and from the guest, over
//! one vsock connection for each session or forwarded connection, and never through gRPC.
//!
//! Each connection has its own task. All that a client can send is bounded: the number of streams by [`MAX_STREAMS`], the
//! number and the time of connections without a token by [`strangers`], the head of a request by [`HEAD_BYTES`], and
//! streams by their windows.

mod forward;
mod forward_websocket;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod http;
mod peer;
mod session;
mod spdy;
mod spdy_process;
mod status;
mod strangers;
pub mod tokens;
mod websocket;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_text::chain;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use tokio_rustls::rustls::{self, RootCertStore};

use self::peer::Peer;
use self::strangers::Strangers;
use self::tokens::{Request, Tokens, TooMany};
use crate::config::{StreamingConfig, TlsFiles};
use crate::pod::Pods;

/// The most streams of all clients together. One needs some four file descriptors.
const MAX_STREAMS: usize = 1024;
const HEAD_BYTES: usize = 32 << 10;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A peer that does not even answer TCP's keepalive probes is disconnected after about two minutes.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// Why the streaming server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StreamingError {
    #[error("listen for streams on {address}")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("certificate or key {path} of the streaming server")]
    Pem {
        path: PathBuf,
        source: rustls::pki_types::pem::Error,
    },
    #[error("certificate and key of the streaming server")]
    Tls(#[from] rustls::Error),
    #[error("{path} as the authority of streaming clients")]
    ClientCa {
        path: PathBuf,
        source: VerifierBuilderError,
    },
}

/// Makes URLs. Clones share the tokens.
#[derive(Clone, Debug)]
pub struct Streaming {
    tokens: Arc<Tokens>,
    base: String,
}

impl Streaming {
    /// Makes a URL for a request. It can be used once, within a minute.
    pub fn url(&self, request: Request) -> Result<String, TooMany> {
        let path = request.path();
        let token = self.tokens.insert(request)?;
        Ok(format!("{}/{path}/{token}", self.base))
    }
}

/// The listening side.
pub struct Server {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    tokens: Arc<Tokens>,
    base: String,
}

// By hand, because `TlsAcceptor` is not `Debug`.
impl std::fmt::Debug for Server {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Server").finish_non_exhaustive()
    }
}

impl Server {
    pub async fn bind(config: &StreamingConfig) -> Result<Self, StreamingError> {
        let address = SocketAddr::new(config.address, config.port);
        let failed = |source| StreamingError::Listen { address, source };
        let tls = config.tls.as_ref().map(acceptor).transpose()?;
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        Ok(Self {
            listener,
            tls,
            tokens: Arc::default(),
            base: format!("{scheme}://{}", reachable(bound)),
        })
    }

    pub fn handle(&self) -> Streaming {
        Streaming {
            tokens: Arc::clone(&self.tokens),
            base: self.base.clone(),
        }
    }

    /// Serves for ever.
    pub async fn run(self, pods: Pods) {
        tracing::info!("serving streams on {}", self.base);
        let slots = Arc::new(Semaphore::new(MAX_STREAMS));
        let strangers = Arc::new(Strangers::default());
        loop {
            let Ok((stream, _)) = self.listener.accept().await else {
                // Most likely the daemon is out of file descriptors. Some will be free again later.
                sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let (stranger, turn) = strangers.enter();
            let Ok(peer) = keep_alive(&stream).and_then(|()| Peer::new(&stream, stranger)) else {
                continue;
            };
            let clients = Clients {
                tokens: Arc::clone(&self.tokens),
                pods: pods.clone(),
                slots: Arc::clone(&slots),
                peer: Arc::new(peer),
            };
            let tls = self.tls.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = turn.wait() => {}
                    () = clients.serve(stream, tls) => {}
                }
            });
        }
    }
}

/// What one connection needs.
#[derive(Clone, Debug)]
struct Clients {
    tokens: Arc<Tokens>,
    pods: Pods,
    slots: Arc<Semaphore>,
    peer: Arc<Peer>,
}

impl Clients {
    /// Serves until the connection ends or becomes a stream.
    async fn serve(self, stream: TcpStream, tls: Option<TlsAcceptor>) {
        let Some(tls) = tls else {
            return self.answer(stream).await;
        };
        match tls.accept(stream).await {
            Ok(stream) => self.answer(stream).await,
            Err(error) => tracing::debug!("a streaming client: {}", chain(&error)),
        }
    }

    async fn answer<T>(self, stream: T)
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let service = hyper::service::service_fn(move |request| {
            let clients = self.clone();
            async move { Ok::<_, std::convert::Infallible>(http::answer(&clients, request)) }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .max_buf_size(HEAD_BYTES)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await;
        if let Err(error) = served {
            tracing::debug!("a streaming client: {}", chain(&error));
        }
    }
}

fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    Ok(())
}

/// An address for URLs that clients on this host, such as kubelet, can connect to.
fn reachable(bound: SocketAddr) -> SocketAddr {
    let ip = match bound.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, bound.port())
}

fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, StreamingError> {
    let failed = |path: &PathBuf| {
        let path = path.clone();
        move |source| StreamingError::Pem { path, source }
    };
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(failed(&files.certificate))?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(failed(&files.key))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?;
    let config = match &files.client_ca {
        None => versions.with_no_client_auth(),
        Some(path) => versions.with_client_cert_verifier(client_verifier(path, provider)?),
    };
    let config = config.with_single_cert(chain, key)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Accepts only clients with a certificate of one of the authorities in a file.
fn client_verifier(
    path: &PathBuf,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, StreamingError> {
    let failed = |source| StreamingError::Pem {
        path: path.clone(),
        source,
    };
    let mut authorities = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(failed)? {
        authorities.add(certificate.map_err(failed)?)?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(authorities), provider)
        .build()
        .map_err(|source| StreamingError::ClientCa {
            path: path.clone(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_address_is_reached_on_loopback() {
        for (bound, reached) in [
            ("0.0.0.0:7", "127.0.0.1:7"),
            ("[::]:7", "[::1]:7"),
            ("10.0.0.1:7", "10.0.0.1:7"),
        ] {
            assert_eq!(reachable(bound.parse().unwrap()).to_string(), reached);
        }
    }

    #[tokio::test]
    async fn urls_name_the_port_that_was_free() {
        let config = StreamingConfig {
            address: Ipv4Addr::LOCALHOST.into(),
            port: 0,
            tls: None,
        };
        let server = Server::bind(&config).await.unwrap();
        let url = server.handle().url(Request::PortForward {
            pod: "p".into(),
            ports: Vec::new(),
        });
        let url = url.unwrap();
        assert!(url.starts_with("http://127.0.0.1:"), "{url}");
        assert!(
            !url.contains(":0/") && url.contains("/portforward/"),
            "{url}"
        );
    }

    #[tokio::test]
    async fn a_certificate_that_is_not_there_is_named() {
        let config = StreamingConfig {
            address: Ipv4Addr::LOCALHOST.into(),
            port: 0,
            tls: Some(TlsFiles {
                certificate: "/no/such/certificate".into(),
                key: "/no/such/key".into(),
                client_ca: None,
            }),
        };
        let error = Server::bind(&config).await.unwrap_err();
        assert!(error.to_string().contains("/no/such/certificate"));
    }
}
