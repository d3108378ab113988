// SPDX-License-Identifier: Apache-2.0
//! Events of all sides as one stream.
//!
//! Each listener has a stream of its own at every delegate. One that breaks is opened again; what happened meanwhile is
//! in no event but in the lists, which kubelet asks for every second. A delegate's events wait at the delegate while the
//! listener does not read.

use std::sync::Arc;
use std::time::Duration;

use bulkhead_delegate::Limit;
use bulkhead_proto::cri;
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::inventory::Inventory;
use super::sides::Sides;
use crate::cri::BoxStream;

/// How many events of a delegate may wait here.
const QUEUE: usize = 100;
/// How long to wait before a stream is opened again.
const AGAIN: Duration = Duration::from_secs(1);
const RPC: &str = "GetContainerEvents";

type Event = cri::ContainerEventResponse;

/// Adds the delegates' events to Bulkhead's. The stream ends with Bulkhead's own.
pub fn merge(
    ours: BoxStream<Event>,
    inventories: &Arc<[Inventory]>,
    sides: &Sides,
) -> BoxStream<Event> {
    let (sender, theirs) = mpsc::channel(QUEUE);
    for index in 0..inventories.len() {
        let (inventories, sides) = (Arc::clone(inventories), sides.clone());
        let sender = sender.clone();
        tokio::spawn(async move {
            let Some(inventory) = inventories.get(index) else {
                return;
            };
            tokio::select! {
                () = forward(index, inventory, &sides, &sender) => {}
                () = sender.closed() => {}
            }
        });
    }
    // The end of the delegates' streams, which all may lack events, is not the end of ours.
    let theirs = ReceiverStream::new(theirs)
        .map(Ok)
        .chain(futures_util::stream::pending());
    let all = futures_util::stream::select(
        ours.map(Some).chain(futures_util::stream::iter([None])),
        theirs.map(Some),
    );
    // Nothing comes after an error or the end of Bulkhead's events.
    let until_end = futures_util::stream::unfold(Some(Box::pin(all)), |all| async move {
        let mut all = all?;
        match all.next().await?? {
            Ok(event) => Some((Ok(event), Some(all))),
            Err(status) => Some((Err(status), None)),
        }
    });
    Box::pin(until_end)
}

/// Sends on the events of a delegate, until it turns out that it has none.
async fn forward(index: usize, inventory: &Inventory, sides: &Sides, sender: &mpsc::Sender<Event>) {
    let delegate = &inventory.delegate;
    loop {
        let request = cri::GetEventsRequest {};
        let call = delegate.runtime(Limit::Endless, request, |mut client, request| async move {
            client.get_container_events(request).await
        });
        let ended = match call.await {
            Ok(mut stream) => loop {
                match stream.message().await {
                    Ok(Some(mut event)) => {
                        if let Some(pod) = &mut event.pod_sandbox_status {
                            inventory.show_handler(pod, index, sides);
                        }
                        if sender.send(event).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => break None,
                    Err(status) => break Some(status),
                }
            },
            Err(error) => Some(Status::from(error)),
        };
        if ended.is_some_and(|status| status.code() == Code::Unimplemented) {
            delegate.remember_lack(RPC);
            return;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::sides::tests::sides;
    use super::*;
    use bulkhead_delegate::fake::Fake;
    use std::path::Path;

    fn event(container: &str) -> Event {
        Event {
            container_id: container.into(),
            ..Default::default()
        }
    }

    fn merged(ours: BoxStream<Event>, socket: &Path) -> BoxStream<Event> {
        let path = socket.to_str().unwrap();
        let sides = sides("bulkhead", None, &[("runc", path, "")]);
        let directory = socket.parent().unwrap();
        let new =
            |delegate: &bulkhead_delegate::Delegate| Inventory::new(delegate.clone(), directory);
        let inventories: Arc<[_]> = sides.delegates().iter().map(new).collect();
        merge(ours, &inventories, &sides)
    }

    async fn next(stream: &mut BoxStream<Event>) -> String {
        let next = tokio::time::timeout(Duration::from_secs(10), stream.next()).await;
        next.unwrap().unwrap().unwrap().container_id
    }

    async fn listening(fake: &Fake) {
        while fake.listeners() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn events_of_a_delegate_come_again_after_its_restart() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cri.sock");
        let (sender, ours) = mpsc::channel(10);
        let ours: BoxStream<Event> = Box::pin(ReceiverStream::new(ours));
        let mut all = merged(ours, &socket);
        for name in ["before", "after"] {
            let fake = Fake::new("fake");
            let _running = fake.serve(&socket);
            listening(&fake).await;
            fake.tell(event(name));
            assert_eq!(next(&mut all).await, name);
            sender.send(Ok(event("ours"))).await.unwrap();
            assert_eq!(next(&mut all).await, "ours");
        }
        sender
            .send(Err(Status::data_loss("cut off")))
            .await
            .unwrap();
        assert!(all.next().await.unwrap().is_err());
        assert!(all.next().await.is_none(), "nothing comes after an error");
    }

    #[tokio::test]
    async fn a_delegate_without_events_leaves_those_of_bulkhead_alone() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cri.sock");
        let fake = Fake::new("fake");
        fake.world().missing.insert("get_container_events");
        let _running = fake.serve(&socket);
        let (sender, ours) = mpsc::channel(10);
        let mut all = merged(Box::pin(ReceiverStream::new(ours)), &socket);
        while fake.world().calls.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        sender.send(Ok(event("ours"))).await.unwrap();
        assert_eq!(next(&mut all).await, "ours");
        drop(sender);
        assert!(all.next().await.is_none());
    }
}
