// SPDX-License-Identifier: Apache-2.0
//! Lists of pods and containers, and of what they use, from all sides at once.

use std::collections::HashSet;

use bulkhead_delegate::{Delegate, DelegateError};
use bulkhead_proto::cri;
use futures_util::future::{join, join_all};
use tonic::Status;

use super::filter;
use super::inventory::Inventory;
use super::sides::Sides;

/// Adds the delegates' pods to those of Bulkhead.
pub async fn pods(
    ours: impl Future<Output = Result<Vec<cri::PodSandbox>, Status>>,
    wanted: Option<&cri::PodSandboxFilter>,
    inventories: &[Inventory],
    sides: &Sides,
) -> Result<Vec<cri::PodSandbox>, Status> {
    let refreshed = join_all(inventories.iter().map(Inventory::refresh_pods));
    let (ours, _) = join(ours, refreshed).await;
    let mut all = ours?;
    for (index, inventory) in inventories.iter().enumerate() {
        let roll = inventory.roll();
        let theirs = roll.pods().filter(|pod| filter::pod(wanted, pod));
        all.extend(theirs.map(|pod| {
            let sent = roll.handler(&pod.id).map(ToOwned::to_owned);
            cri::PodSandbox {
                runtime_handler: sent.unwrap_or_else(|| sides.as_sent(index, &pod.runtime_handler)),
                ..pod.clone()
            }
        }));
    }
    once_each(&mut all, |pod| Some(pod.id.clone()));
    Ok(all)
}

/// Adds the delegates' containers to those of Bulkhead.
pub async fn containers(
    ours: impl Future<Output = Result<Vec<cri::Container>, Status>>,
    wanted: Option<&cri::ContainerFilter>,
    inventories: &[Inventory],
) -> Result<Vec<cri::Container>, Status> {
    let refreshed = join_all(inventories.iter().map(Inventory::refresh_containers));
    let (ours, _) = join(ours, refreshed).await;
    let mut all = ours?;
    for inventory in inventories {
        let roll = inventory.roll();
        let theirs = roll
            .containers()
            .filter(|one| filter::container(wanted, one));
        all.extend(theirs.cloned());
    }
    once_each(&mut all, |container| Some(container.id.clone()));
    Ok(all)
}

/// Adds what delegates measured to what Bulkhead measured. A delegate that does not answer is left out.
pub async fn measured<'a, T, F>(
    ours: impl Future<Output = Result<Vec<T>, Status>>,
    inventories: &'a [Inventory],
    what: &'static str,
    id: impl Fn(&T) -> Option<String>,
    ask: impl Fn(&'a Delegate) -> F,
) -> Result<Vec<T>, Status>
where
    F: Future<Output = Result<Vec<T>, DelegateError>>,
{
    let (ours, theirs) = join(ours, from_all(inventories, what, ask)).await;
    let mut all = ours?;
    all.extend(theirs.into_iter().flatten());
    once_each(&mut all, id);
    Ok(all)
}

/// What each delegate answers, at the same place as the delegate; nothing from one that does not answer or refuses.
pub async fn from_all<'a, T, F>(
    inventories: &'a [Inventory],
    what: &'static str,
    ask: impl Fn(&'a Delegate) -> F,
) -> Vec<Vec<T>>
where
    F: Future<Output = Result<Vec<T>, DelegateError>>,
{
    join_all(inventories.iter().map(|inventory| {
        let asked = inventory.may_answer().then(|| ask(&inventory.delegate));
        async move {
            let found = asked?.await;
            inventory.log_refusal(what, found.as_ref().err());
            found.ok()
        }
    }))
    .await
    .into_iter()
    .map(Option::unwrap_or_default)
    .collect()
}

/// Ids are random, so that two sides do not have the same one. If they do, the first is shown.
fn once_each<T>(items: &mut Vec<T>, id: impl Fn(&T) -> Option<String>) {
    let mut seen = HashSet::new();
    items.retain(|item| id(item).is_none_or(|id| seen.insert(id)));
}
