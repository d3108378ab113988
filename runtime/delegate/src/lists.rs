// SPDX-License-Identifier: Apache-2.0
//! The lists of a delegate.
//!
//! A list is asked for as a stream, because it may be longer than the server's longest message. An older server has no
//! streams: then its plain list is taken, until the server comes back from being away and may be a newer one.

use bulkhead_proto::cri;
use tonic::{Code, Response};

use crate::calls::{Limit, collect};
use crate::delegate::Delegate;
use crate::error::DelegateError;

impl Delegate {
    pub async fn pods(&self) -> Result<Vec<cri::PodSandbox>, DelegateError> {
        let streamed = async {
            let request = cri::StreamPodSandboxesRequest { filter: None };
            let call = self.runtime(Limit::List, request, |mut client, request| async move {
                let stream = client.stream_pod_sandboxes(request).await?.into_inner();
                collect(stream).await.map(Response::new)
            });
            let messages = call.await?.into_iter();
            Ok(messages.flat_map(|message| message.pod_sandboxes).collect())
        };
        let plain = async {
            let request = cri::ListPodSandboxRequest { filter: None };
            let call = self.runtime(Limit::List, request, |mut client, request| async move {
                client.list_pod_sandbox(request).await
            });
            Ok(call.await?.items)
        };
        self.either("StreamPodSandboxes", streamed, plain).await
    }

    pub async fn containers(&self) -> Result<Vec<cri::Container>, DelegateError> {
        let streamed = async {
            let request = cri::StreamContainersRequest { filter: None };
            let call = self.runtime(Limit::List, request, |mut client, request| async move {
                let stream = client.stream_containers(request).await?.into_inner();
                collect(stream).await.map(Response::new)
            });
            let messages = call.await?.into_iter();
            Ok(messages.flat_map(|message| message.containers).collect())
        };
        let plain = async {
            let request = cri::ListContainersRequest { filter: None };
            let call = self.runtime(Limit::List, request, |mut client, request| async move {
                client.list_containers(request).await
            });
            Ok(call.await?.containers)
        };
        self.either("StreamContainers", streamed, plain).await
    }

    pub async fn container_stats(
        &self,
        filter: Option<cri::ContainerStatsFilter>,
    ) -> Result<Vec<cri::ContainerStats>, DelegateError> {
        let streamed = async {
            let filter = filter.clone();
            let request = cri::StreamContainerStatsRequest { filter };
            let call = self.runtime(Limit::Measure, request, |mut client, request| async move {
                let stream = client.stream_container_stats(request).await?.into_inner();
                collect(stream).await.map(Response::new)
            });
            let messages = call.await?.into_iter();
            Ok(messages.flat_map(|one| one.container_stats).collect())
        };
        let plain = async {
            let filter = filter.clone();
            let request = cri::ListContainerStatsRequest { filter };
            let call = self.runtime(Limit::Measure, request, |mut client, request| async move {
                client.list_container_stats(request).await
            });
            Ok(call.await?.stats)
        };
        self.either("StreamContainerStats", streamed, plain).await
    }

    pub async fn pod_stats(
        &self,
        filter: Option<cri::PodSandboxStatsFilter>,
    ) -> Result<Vec<cri::PodSandboxStats>, DelegateError> {
        let streamed = async {
            let filter = filter.clone();
            let request = cri::StreamPodSandboxStatsRequest { filter };
            let call = self.runtime(Limit::Measure, request, |mut client, request| async move {
                let stream = client.stream_pod_sandbox_stats(request).await?.into_inner();
                collect(stream).await.map(Response::new)
            });
            let messages = call.await?.into_iter();
            Ok(messages.flat_map(|one| one.pod_sandbox_stats).collect())
        };
        let plain = async {
            let filter = filter.clone();
            let request = cri::ListPodSandboxStatsRequest { filter };
            let call = self.runtime(Limit::Measure, request, |mut client, request| async move {
                client.list_pod_sandbox_stats(request).await
            });
            Ok(call.await?.stats)
        };
        self.either("StreamPodSandboxStats", streamed, plain).await
    }

    pub async fn metrics(&self) -> Result<Vec<cri::PodSandboxMetrics>, DelegateError> {
        let streamed = async {
            let request = cri::StreamPodSandboxMetricsRequest {};
            let call = self.runtime(Limit::Measure, request, |mut client, request| async move {
                let call = client.stream_pod_sandbox_metrics(request).await;
                collect(call?.into_inner()).await.map(Response::new)
            });
            let messages = call.await?.into_iter();
            Ok(messages.flat_map(|one| one.pod_sandbox_metrics).collect())
        };
        let plain = async {
            let request = cri::ListPodSandboxMetricsRequest {};
            let call = self.runtime(Limit::Measure, request, |mut client, request| async move {
                client.list_pod_sandbox_metrics(request).await
            });
            Ok(call.await?.pod_metrics)
        };
        self.either("StreamPodSandboxMetrics", streamed, plain)
            .await
    }

    pub async fn descriptors(&self) -> Result<Vec<cri::MetricDescriptor>, DelegateError> {
        let request = cri::ListMetricDescriptorsRequest {};
        let call = self.runtime(Limit::Measure, request, |mut client, request| async move {
            client.list_metric_descriptors(request).await
        });
        Ok(call.await?.descriptors)
    }

    async fn either<T>(
        &self,
        rpc: &'static str,
        streamed: impl Future<Output = Result<Vec<T>, DelegateError>>,
        plain: impl Future<Output = Result<Vec<T>, DelegateError>>,
    ) -> Result<Vec<T>, DelegateError> {
        if self.lacks(rpc) {
            return plain.await;
        }
        match streamed.await {
            Err(error) if error.refusal() == Some(Code::Unimplemented) => {
                self.remember_lack(rpc);
                plain.await
            }
            listed => listed,
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::calls::Limits;
    use crate::delegate::Delegate;
    use crate::fake::Fake;
    use bulkhead_proto::cri;

    #[tokio::test]
    async fn a_server_without_streams_is_asked_for_its_plain_lists_until_it_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cri.sock");
        let delegate = Delegate::new("runc", &socket, Limits::default());
        let old = Fake::new("old");
        old.world().missing.insert("stream_pod_sandboxes");
        old.world().pods.push(cri::PodSandbox::default());
        let running = old.serve(&socket);
        assert_eq!(delegate.pods().await.unwrap().len(), 1);
        assert_eq!(delegate.pods().await.unwrap().len(), 1);
        assert_eq!(
            old.world().calls,
            [
                "stream_pod_sandboxes",
                "list_pod_sandbox",
                "list_pod_sandbox"
            ]
        );
        drop(running);
        delegate.pods().await.unwrap_err();
        let new = Fake::new("new");
        let _running = new.serve(&socket);
        assert_eq!(delegate.pods().await.unwrap().len(), 0);
        assert_eq!(new.world().calls, ["stream_pod_sandboxes"]);
    }
}
