// SPDX-License-Identifier: Apache-2.0
//! One CRI server behind a unix socket.
//!
//! The connection is made by the first call, and again by the first call after it broke. [`Delegate::watch`] asks the
//! server for its status from time to time, and more often while it does not answer, so that its return is noticed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_proto::cri;
use bulkhead_proto::cri::image_service_client::ImageServiceClient;
use bulkhead_proto::cri::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use crate::calls::{Limit, Limits};
use crate::error::DelegateError;
use crate::health::{Health, Pulse};
use crate::report::Report;

/// The longest answer. containerd and CRI-O send at most 16 MiB.
const ANSWER_BYTES: usize = 32 << 20;
/// How often a server is asked for its status.
const WATCH: Duration = Duration::from_secs(10);
/// The same for one that does not answer.
const WATCH_LOST: Duration = Duration::from_secs(1);

/// By how much the limit that the server is told is later than ours, so that it is this side that gives up.
const GRACE: Duration = Duration::from_secs(1);

/// A CRI server. Clones share the connection and what is known of the server.
#[derive(Clone, Debug)]
pub struct Delegate {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    socket: PathBuf,
    limits: Limits,
    channel: Channel,
    pulse: Pulse,
    report: Mutex<Arc<Report>>,
    /// RPCs that the server does not have.
    lacks: Mutex<BTreeSet<&'static str>>,
}

impl Delegate {
    /// Connects when the first call is made. `name` stands in errors and in the log.
    pub fn new(name: impl Into<String>, socket: impl Into<PathBuf>, limits: Limits) -> Self {
        let socket = socket.into();
        let path = socket.clone();
        let connect = move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        };
        // An address is required but not used: the connector opens the socket.
        let channel = Endpoint::from_static("http://delegate")
            .connect_with_connector_lazy(tower::service_fn(connect));
        Self {
            shared: Arc::new(Shared {
                name: name.into(),
                socket,
                limits,
                channel,
                pulse: Pulse::new(),
                report: Mutex::default(),
                lacks: Mutex::default(),
            }),
        }
    }

    pub fn name(&self) -> &str {
        &self.shared.name
    }

    pub fn socket(&self) -> &Path {
        &self.shared.socket
    }

    pub fn health(&self) -> Health {
        self.shared.pulse.now()
    }

    /// Tells each change of the health.
    pub fn health_changes(&self) -> watch::Receiver<Health> {
        self.shared.pulse.changes()
    }

    /// What the server said last about itself.
    pub fn report(&self) -> Arc<Report> {
        let report = self.shared.report.lock();
        let report = report.unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&report)
    }

    /// Makes a call to the `RuntimeService`.
    pub async fn runtime<Q, A, F>(
        &self,
        limit: Limit,
        request: Q,
        call: impl Fn(RuntimeServiceClient<Channel>, Request<Q>) -> F,
    ) -> Result<A, DelegateError>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let client = RuntimeServiceClient::new(self.shared.channel.clone())
            .max_decoding_message_size(ANSWER_BYTES)
            .max_encoding_message_size(usize::MAX);
        let call = |request| call(client.clone(), request);
        self.call(limit, request, call).await
    }

    /// Makes a call to the `ImageService`.
    pub async fn images<Q, A, F>(
        &self,
        limit: Limit,
        request: Q,
        call: impl Fn(ImageServiceClient<Channel>, Request<Q>) -> F,
    ) -> Result<A, DelegateError>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let client = ImageServiceClient::new(self.shared.channel.clone())
            .max_decoding_message_size(ANSWER_BYTES)
            .max_encoding_message_size(usize::MAX);
        let call = |request| call(client.clone(), request);
        self.call(limit, request, call).await
    }

    async fn call<Q, A, F>(
        &self,
        limit: Limit,
        request: Q,
        call: impl Fn(Request<Q>) -> F,
    ) -> Result<A, DelegateError>
    where
        Q: Clone,
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let limit_of = limit.duration(&self.shared.limits);
        let end = limit_of.map(|limit| Instant::now() + limit);
        let again = limit.may_repeat().then(|| request.clone());
        let mut result = self.attempt(limit, end, request, &call).await;
        // A server that was restarted has closed the connection, perhaps in the middle of this call.
        if let (Some(again), Err(DelegateError::Down { .. })) = (again, &result) {
            result = self.attempt(limit, end, again, &call).await;
        }
        let late = matches!(result, Err(DelegateError::Slow { .. }));
        if !late || limit.shows_health() {
            self.shared.pulse.record(self.name(), &result);
        }
        if matches!(result, Err(DelegateError::Down { .. })) {
            // Another version may come back.
            self.lacking().clear();
        }
        result
    }

    fn lacking(&self) -> MutexGuard<'_, BTreeSet<&'static str>> {
        let lacks = self.shared.lacks.lock();
        lacks.unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the server is known not to have an RPC.
    pub fn lacks(&self, rpc: &str) -> bool {
        self.lacking().contains(rpc)
    }

    /// Remembers that the server does not have an RPC, and logs it the first time.
    pub fn remember_lack(&self, rpc: &'static str) {
        if self.lacking().insert(rpc) {
            tracing::info!(delegate = self.name(), "has no {rpc}");
        }
    }

    async fn attempt<Q, A, F>(
        &self,
        limit: Limit,
        end: Option<Instant>,
        request: Q,
        call: impl Fn(Request<Q>) -> F,
    ) -> Result<A, DelegateError>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let mut request = Request::new(request);
        let answer = match end {
            None => call(request).await,
            Some(end) => {
                let left = end.saturating_duration_since(Instant::now());
                request.set_timeout(left + GRACE);
                let answer = timeout_at(end, call(request)).await;
                answer.map_err(|_| DelegateError::Slow {
                    name: self.name().to_owned(),
                    limit: limit.duration(&self.shared.limits).unwrap_or_default(),
                })?
            }
        };
        let answer = answer.map_err(|status| DelegateError::of(self.name(), &status))?;
        Ok(answer.into_inner())
    }

    /// Asks the server for its status, and keeps it.
    pub async fn examine(&self) -> Arc<Report> {
        let request = cri::StatusRequest { verbose: false };
        let status = self.runtime(Limit::Read, request, |mut client, request| async move {
            client.status(request).await
        });
        let status = status.await;
        let request = cri::VersionRequest::default();
        let version = self.runtime(Limit::Read, request, |mut client, request| async move {
            client.version(request).await
        });
        let version = match &status {
            Ok(_) => version.await.ok(),
            Err(_) => None,
        };
        let known = self.shared.report.lock();
        let mut known = known.unwrap_or_else(PoisonError::into_inner);
        *known = Arc::new(known.after(status, version));
        Arc::clone(&known)
    }

    /// Notices when the server goes and comes back, until the daemon ends.
    pub async fn watch(self) {
        let mut health = self.health_changes();
        loop {
            self.examine().await;
            let up = health.borrow_and_update().is_up();
            let pause = if up { WATCH } else { WATCH_LOST };
            // A server that has just been lost is asked soon.
            let lost = health.wait_for(|health| !health.is_up());
            if up && tokio::time::timeout(pause, lost).await.is_err() {
                continue;
            }
            tokio::time::sleep(WATCH_LOST).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;

    async fn list(delegate: &Delegate, limit: Limit) -> Result<usize, DelegateError> {
        let request = cri::ListPodSandboxRequest { filter: None };
        let call = |mut client: RuntimeServiceClient<Channel>, request| async move {
            client.list_pod_sandbox(request).await
        };
        let listed = delegate.runtime(limit, request, call).await?;
        Ok(listed.items.len())
    }

    #[tokio::test]
    async fn a_server_that_is_down_is_named_and_its_return_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cri.sock");
        let delegate = Delegate::new("runc", &socket, Limits::default());
        let error = list(&delegate, Limit::List).await.unwrap_err();
        assert!(matches!(error, DelegateError::Down { .. }), "{error}");
        let words = "the delegate runc is down: No such file or directory (os error 2): start it, then try again";
        assert_eq!(error.to_string(), words);
        assert!(matches!(delegate.health(), Health::Down { .. }));
        for _ in 0..3 {
            let running = Fake::new("fake").serve(&socket);
            assert_eq!(list(&delegate, Limit::List).await.unwrap(), 0);
            assert_eq!(delegate.health(), Health::Up);
            drop(running);
        }
    }

    #[tokio::test]
    async fn a_server_that_is_slow_is_told_from_one_that_is_down() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cri.sock");
        let fake = Fake::new("fake");
        let _running = fake.serve(&socket);
        let limits = Limits {
            list: Duration::from_millis(50),
            ..Limits::default()
        };
        let delegate = Delegate::new("runc", &socket, limits);
        fake.freeze(true);
        let change = Limit::Change(Some(Duration::from_millis(20)));
        let error = list(&delegate, change).await.unwrap_err();
        assert!(matches!(error, DelegateError::Slow { .. }), "{error}");
        assert_eq!(delegate.health(), Health::Unknown, "changes may take long");
        list(&delegate, Limit::List).await.unwrap_err();
        assert_eq!(delegate.health(), Health::Slow);
        fake.freeze(false);
        list(&delegate, Limit::Read).await.unwrap();
        assert_eq!(delegate.health(), Health::Up);
    }

    #[tokio::test]
    async fn the_servers_own_error_is_passed_on() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cri.sock");
        let fake = Fake::new("fake");
        let _running = fake.serve(&socket);
        fake.world().missing.insert("list_pod_sandbox");
        let delegate = Delegate::new("runc", &socket, Limits::default());
        let error = list(&delegate, Limit::List).await.unwrap_err();
        assert_eq!(error.refusal(), Some(tonic::Code::Unimplemented));
        assert_eq!(
            Status::from(error).message(),
            "unknown method list_pod_sandbox"
        );
    }

    #[tokio::test]
    async fn what_a_server_says_of_itself_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cri.sock");
        let fake = Fake::new("fake");
        let running = fake.serve(&socket);
        let delegate = Delegate::new("runc", &socket, Limits::default());
        assert_eq!(delegate.examine().await.runtime, "fake 1");
        fake.world().missing.insert("status");
        let report = delegate.examine().await;
        assert!(report.refusal.as_ref().unwrap().contains("unknown method"));
        drop(running);
        let report = delegate.examine().await;
        assert_eq!(
            (report.runtime.as_str(), &report.refusal),
            ("fake 1", &None)
        );
    }
}
