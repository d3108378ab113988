// SPDX-License-Identifier: Apache-2.0
//! Asks all sides for one kind of thing, for the plain lists and their streamed twins.

use bulkhead_delegate::Delegate;
use bulkhead_proto::cri;
use futures_util::future::join;
use tonic::{Request, Status};

use super::{Endpoint, Own, lists, metrics};

impl<O: Own> Endpoint<O> {
    pub(super) async fn all_pods(
        &self,
        filter: Option<cri::PodSandboxFilter>,
    ) -> Result<Vec<cri::PodSandbox>, Status> {
        let ours = async {
            let filter = filter.clone();
            let request = Request::new(cri::ListPodSandboxRequest { filter });
            let listed = self.ours.list_pod_sandbox(request).await;
            Ok(listed?.into_inner().items)
        };
        lists::pods(ours, filter.as_ref(), &self.inventories, &self.sides).await
    }

    pub(super) async fn all_containers(
        &self,
        filter: Option<cri::ContainerFilter>,
    ) -> Result<Vec<cri::Container>, Status> {
        let ours = async {
            let filter = filter.clone();
            let request = Request::new(cri::ListContainersRequest { filter });
            let listed = self.ours.list_containers(request).await;
            Ok(listed?.into_inner().containers)
        };
        lists::containers(ours, filter.as_ref(), &self.inventories).await
    }

    pub(super) async fn all_container_stats(
        &self,
        filter: Option<cri::ContainerStatsFilter>,
    ) -> Result<Vec<cri::ContainerStats>, Status> {
        let ours = async {
            let filter = filter.clone();
            let request = Request::new(cri::ListContainerStatsRequest { filter });
            let listed = self.ours.list_container_stats(request).await;
            Ok(listed?.into_inner().stats)
        };
        let what = "statistics of containers";
        let id = |stats: &cri::ContainerStats| {
            let attributes = stats.attributes.as_ref();
            attributes.map(|attributes| attributes.id.clone())
        };
        let ask = |delegate| Delegate::container_stats(delegate, filter.clone());
        lists::measured(ours, &self.inventories, what, id, ask).await
    }

    pub(super) async fn all_pod_stats(
        &self,
        filter: Option<cri::PodSandboxStatsFilter>,
    ) -> Result<Vec<cri::PodSandboxStats>, Status> {
        let ours = async {
            let filter = filter.clone();
            let request = Request::new(cri::ListPodSandboxStatsRequest { filter });
            let listed = self.ours.list_pod_sandbox_stats(request).await;
            Ok(listed?.into_inner().stats)
        };
        let what = "statistics of pods";
        let id = |stats: &cri::PodSandboxStats| {
            let attributes = stats.attributes.as_ref();
            attributes.map(|attributes| attributes.id.clone())
        };
        let ask = |delegate| Delegate::pod_stats(delegate, filter.clone());
        lists::measured(ours, &self.inventories, what, id, ask).await
    }

    /// The descriptors of each delegate.
    pub(super) async fn descriptors(&self) -> Vec<Vec<cri::MetricDescriptor>> {
        let what = "descriptors of metrics";
        lists::from_all(&self.inventories, what, Delegate::descriptors).await
    }

    pub(super) async fn all_metrics(&self) -> Result<Vec<cri::PodSandboxMetrics>, Status> {
        let ours = async {
            let request = Request::new(cri::ListPodSandboxMetricsRequest {});
            let metrics = self.ours.list_pod_sandbox_metrics(request).await?;
            let request = Request::new(cri::ListMetricDescriptorsRequest {});
            let descriptors = self.ours.list_metric_descriptors(request).await?;
            Ok::<_, Status>((metrics.into_inner(), descriptors.into_inner()))
        };
        let theirs = join(
            lists::from_all(&self.inventories, "metrics", Delegate::metrics),
            self.descriptors(),
        );
        let (ours, (theirs, descriptors)) = join(ours, theirs).await;
        let (metrics, mut shown) = {
            let (metrics, descriptors) = ours?;
            (metrics.pod_metrics, descriptors.descriptors)
        };
        let mut all = metrics;
        for (mut metrics, own) in theirs.into_iter().zip(descriptors) {
            metrics::add_descriptors(&mut shown, own.clone());
            metrics::arrange(&mut metrics, &own, &shown);
            all.extend(metrics);
        }
        Ok(all)
    }
}
