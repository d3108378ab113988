// SPDX-License-Identifier: Apache-2.0
//! A client of kubelet's own API: pods and their status, statistics, logs, exec and the other streams.
//!
//! kubelet serves this API over TLS only. A relay on loopback accepts plain connections and forwards them, so the
//! clients that test the daemon's streams can be used here too.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::certificate::Certificate;
use crate::wait::{PATIENCE, try_until};

/// Time limit of one request.
const ANSWER: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Api {
    /// The address at which kubelet serves.
    pub address: SocketAddr,
    relay: SocketAddr,
    client: reqwest::Client,
}

impl Api {
    /// Makes a client of the kubelet that serves at `address` with this certificate.
    pub async fn new(address: SocketAddr, certificate: &Certificate) -> Self {
        let relay = relay(address, certificate).await;
        let client = reqwest::Client::builder().no_proxy().timeout(ANSWER);
        Self {
            address,
            relay,
            client: client.build().expect("an HTTP client"),
        }
    }

    /// Returns the URL of a path and query for clients that cannot speak TLS.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.relay)
    }

    pub async fn get(&self, path: &str) -> Result<String, String> {
        answer(self.client.get(self.url(path))).await
    }

    pub async fn post(&self, path: &str) -> Result<String, String> {
        answer(self.client.post(self.url(path))).await
    }

    async fn json(&self, path: &str) -> Result<Value, String> {
        let text = self.get(path).await?;
        serde_json::from_str(&text).map_err(|error| format!("{path}: {error} in {text}"))
    }

    /// Returns all pods with their status; none while kubelet does not answer.
    pub async fn pods(&self) -> Vec<Value> {
        let list = self.json("pods").await.unwrap_or_default();
        list["items"].as_array().cloned().unwrap_or_default()
    }

    /// Returns the pod whose manifest has this name.
    pub async fn pod(&self, name: &str) -> Value {
        let pods = self.pods().await;
        find_pod(&pods, name).cloned().unwrap_or_default()
    }

    /// Asks for a pod's status until `enough` returns something, and returns that.
    pub async fn until<T>(
        &self,
        name: &str,
        patience: Duration,
        enough: impl Fn(&Value) -> Option<T>,
    ) -> Result<T, String> {
        let what = format!("{name} is as expected");
        let found = try_until(&what, patience, async || {
            let pod = self.pod(name).await;
            enough(&pod).ok_or_else(|| pod["status"].to_string())
        });
        found.await.map_err(|late| late.to_string())
    }

    pub async fn summary(&self) -> Value {
        self.json("stats/summary").await.expect("stats/summary")
    }

    /// Returns a container's log as `kubectl logs` shows it.
    pub async fn logs(&self, pod: &str, container: &str) -> String {
        let path = format!("containerLogs/default/{pod}-node/{container}");
        self.get(&path).await.unwrap_or_else(|error| error)
    }

    /// Waits until `enough` is true of a container's log, and returns it; after a time limit, returns what there is.
    pub async fn logs_until(
        &self,
        pod: &str,
        container: &str,
        enough: impl Fn(&str) -> bool,
    ) -> String {
        let what = format!("the log of {pod} is as expected");
        let log = try_until(&what, PATIENCE, async || {
            let log = self.logs(pod, container).await;
            if enough(&log) { Ok(log) } else { Err(log) }
        });
        log.await.unwrap_or_else(|late| late.seen)
    }

    /// Has kubelet run a command in a container and returns its output. The command's words must not contain blanks.
    pub async fn run(&self, pod: &str, container: &str, command: &str) -> Result<String, String> {
        let command = url_escape(command);
        let path = format!("run/default/{pod}-node/{container}?cmd={command}");
        self.post(&path).await
    }
}

/// Finds a pod by the name in its manifest, to which kubelet appends the node's name.
pub fn find_pod<'a>(pods: &'a [Value], name: &str) -> Option<&'a Value> {
    let name = format!("{name}-node");
    pods.iter().find(|pod| pod["metadata"]["name"] == name)
}

/// Finds a container's status in a pod's, whether it is an init, an ephemeral or an ordinary container.
pub fn container<'a>(pod: &'a Value, name: &str) -> &'a Value {
    ["containerStatuses", "initContainerStatuses"]
        .iter()
        .filter_map(|kind| pod["status"][kind].as_array())
        .flatten()
        .find(|status| status["name"] == name)
        .unwrap_or(&Value::Null)
}

pub fn phase(pod: &Value) -> &str {
    pod["status"]["phase"].as_str().unwrap_or("none")
}

/// Whether the pod's condition `Ready` is true.
pub fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

pub fn url_escape(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

async fn answer(request: reqwest::RequestBuilder) -> Result<String, String> {
    let response = request.send().await.map_err(|error| format!("{error:?}"))?;
    let status = response.status();
    let text = response
        .text()
        .await
        .map_err(|error| format!("{error:?}"))?;
    if status.is_success() {
        Ok(text)
    } else {
        Err(format!("{status}: {text}"))
    }
}

/// Starts the relay. It listens as long as the test's tokio runtime lives.
async fn relay(to: SocketAddr, certificate: &Certificate) -> SocketAddr {
    let mut roots = RootCertStore::empty();
    let file = certificate.path("certificate.pem");
    let own = CertificateDer::from_pem_file(file).expect("the certificate");
    roots.add(own).expect("a certificate to trust");
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("TLS")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = TlsConnector::from(Arc::new(config));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let listener = listener.await.expect("a free port");
    let address = listener.local_addr().expect("its address");
    tokio::spawn(async move {
        while let Ok((mut plain, _)) = listener.accept().await {
            let connector = connector.clone();
            tokio::spawn(async move {
                // If kubelet does not listen, the client sees its connection end.
                let Ok(stream) = TcpStream::connect(to).await else {
                    return;
                };
                let name = ServerName::from(to.ip());
                if let Ok(mut tls) = connector.connect(name, stream).await {
                    let _ = tokio::io::copy_bidirectional(&mut plain, &mut tls).await;
                }
            });
        }
    });
    address
}
