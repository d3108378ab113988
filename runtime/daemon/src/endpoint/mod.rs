// SPDX-License-Identifier: Apache-2.0
//! What kubelet talks to when pods are delegated: one runtime in front of several.
//!
//! Bulkhead's own servers, in [`crate::cri`], are one side; each other CRI server of the configuration is another one.
//! Without delegates this module is not used at all.
//!
//! ```text
//! sides       who serves a new pod
//! holder      which side has a pod or container
//! inventory   what a delegate has: the roll, and the file in which it is kept
//! lists       lists of all sides, with gather, metrics and filter
//! status      the node's status and what each handler can do
//! events      events of all sides
//! runtime     RuntimeService: one short method per RPC; pass is what needs more
//! images      ImageService; seen says for which pod kubelet asks, fetch gets an image that another side has
//! ```

mod events;
mod fetch;
mod filter;
mod gather;
mod holder;
mod images;
mod inventory;
mod kept;
mod lists;
mod metrics;
mod pass;
mod roll;
mod runtime;
mod seen;
mod sides;
mod status;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bulkhead_delegate::{Delegate, Health, Limit};
use bulkhead_proto::cri;
use bulkhead_proto::cri::image_service_server::ImageService;
use bulkhead_proto::cri::runtime_service_server::RuntimeService;
use futures_util::future::join_all;
use tonic::Request;

pub use self::images::ImageEndpoint;
use self::images::KeptImages;
use self::inventory::Inventory;
use self::seen::SeenPods;
pub use self::sides::Sides;
use crate::cri::{BoxStream, Found, ImageServer, RuntimeServer};

/// How long `Status` waits for a delegate that was not asked yet.
const FIRST_STATUS: Duration = Duration::from_secs(2);

/// Bulkhead's own side. A trait, so that tests need no VMs.
pub trait Own:
    RuntimeService<GetContainerEventsStream = BoxStream<cri::ContainerEventResponse>>
{
    fn find_pod(&self, id: &str) -> Found;
    fn find_container(&self, id: &str) -> Found;

    type Images: ImageService;
    fn images(&self) -> &Self::Images;
}

impl Own for RuntimeServer {
    fn find_pod(&self, id: &str) -> Found {
        Self::find_pod(self, id)
    }

    fn find_container(&self, id: &str) -> Found {
        Self::find_container(self, id)
    }

    type Images = ImageServer;
    fn images(&self) -> &ImageServer {
        Self::images(self)
    }
}

/// The service in front of all sides. Clones share them.
#[derive(Debug)]
pub struct Endpoint<O> {
    ours: Arc<O>,
    sides: Sides,
    /// One for each delegate, in the order of the sides.
    inventories: Arc<[Inventory]>,
    /// What kubelet told all runtimes last, for a delegate that was away.
    told: Arc<Mutex<Option<cri::UpdateRuntimeConfigRequest>>>,
    seen: SeenPods,
    /// The images that each delegate listed last, in the order of the sides.
    kept_images: Arc<[KeptImages]>,
}

impl<O> Clone for Endpoint<O> {
    fn clone(&self) -> Self {
        Self {
            ours: Arc::clone(&self.ours),
            sides: self.sides.clone(),
            inventories: Arc::clone(&self.inventories),
            told: Arc::clone(&self.told),
            seen: self.seen.clone(),
            kept_images: Arc::clone(&self.kept_images),
        }
    }
}

impl<O: Own> Endpoint<O> {
    /// What delegates listed is kept in the directory `pods`, and of images in `images`.
    pub fn new(ours: O, sides: Sides, pods: &Path, images: &Path) -> Self {
        let delegates = || sides.delegates().iter();
        let inventories = delegates().map(|delegate| Inventory::new(delegate.clone(), pods));
        let kept = delegates().map(|delegate| KeptImages::new(delegate, images));
        Self {
            ours: Arc::new(ours),
            inventories: inventories.collect(),
            kept_images: kept.collect(),
            sides,
            told: Arc::default(),
            seen: SeenPods::default(),
        }
    }

    /// Begins to watch the delegates, until the daemon ends.
    pub fn watch(&self) {
        for index in 0..self.inventories.len() {
            let (endpoint, inventories) = (self.clone(), Arc::clone(&self.inventories));
            tokio::spawn(async move {
                if let Some(inventory) = inventories.get(index) {
                    let delegate = &inventory.delegate;
                    tokio::join!(
                        delegate.clone().watch(),
                        inventory.keep(),
                        endpoint.greet(delegate)
                    );
                }
            });
        }
    }

    /// Each time that a delegate comes back: tells it what it has missed, and checks that it fits this node.
    async fn greet(&self, delegate: &Delegate) {
        let mut health = delegate.health_changes();
        loop {
            if health.wait_for(Health::is_up).await.is_err() {
                return;
            }
            let told = self.told.lock();
            let told = told.unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(request) = told {
                self.tell(delegate, request).await;
            }
            self.compare_cgroup_drivers(delegate).await;
            if health.wait_for(|health| !health.is_up()).await.is_err() {
                return;
            }
        }
    }

    /// Passes on what kubelet tells all runtimes.
    async fn tell_all(&self, request: cri::UpdateRuntimeConfigRequest) {
        let told = self.told.lock();
        *told.unwrap_or_else(PoisonError::into_inner) = Some(request.clone());
        let delegates = self.sides.delegates().iter();
        join_all(delegates.map(|delegate| self.tell(delegate, request.clone()))).await;
    }

    /// A delegate that cannot be told now is told when it comes back.
    async fn tell(&self, delegate: &Delegate, request: cri::UpdateRuntimeConfigRequest) {
        let call = delegate.runtime(Limit::Read, request, |mut client, request| async move {
            client.update_runtime_config(request).await
        });
        if let Err(error) = call.await {
            let delegate = delegate.name();
            tracing::warn!(delegate, "UpdateRuntimeConfig: {error}");
        }
    }

    /// kubelet makes the cgroups of all pods with one driver, the one that Bulkhead names.
    async fn compare_cgroup_drivers(&self, delegate: &Delegate) {
        let request = cri::RuntimeConfigRequest {};
        let ours = self.ours.runtime_config(Request::new(request)).await;
        let call = delegate.runtime(Limit::Read, request, |mut client, request| async move {
            client.runtime_config(request).await
        });
        // An older server does not have this RPC.
        let (Ok(ours), Ok(theirs)) = (ours, call.await) else {
            return;
        };
        let (ours, theirs) = (ours.into_inner().linux, theirs.linux);
        if let (Some(ours), Some(theirs)) = (ours, theirs)
            && ours.cgroup_driver != theirs.cgroup_driver
        {
            tracing::warn!(
                delegate = delegate.name(),
                "uses the cgroup driver {:?}, but kubelet is told to use Bulkhead's, {:?}: configure the same one",
                theirs.cgroup_driver(),
                ours.cgroup_driver()
            );
        }
    }

    /// Asks the delegates for their status that were not asked yet.
    async fn first_status(&self) {
        let unknown = self.sides.delegates().iter();
        let unknown = unknown.filter(|delegate| delegate.health() == Health::Unknown);
        let asked = join_all(unknown.map(Delegate::examine));
        // Its condition says that it is not known.
        let _ = tokio::time::timeout(FIRST_STATUS, asked).await;
    }
}
