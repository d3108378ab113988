// SPDX-License-Identifier: Apache-2.0
//! Finds the side that has a pod or container.
//!
//! Bulkhead knows its own, and each delegate's inventory knows what that delegate listed. Who knows an id by its whole
//! wins over who knows one that begins with it. An id that nobody knows is asked for. If a delegate that might have it
//! does not answer, the call fails: "not found", or the success of a stop or a removal, would mean to kubelet that the
//! pod is gone.

use bulkhead_delegate::{Delegate, DelegateError, Limit};
use bulkhead_proto::cri;
use futures_util::future::join_all;
use tonic::{Code, Status};

use super::inventory::Inventory;
use super::sides::Side;
use crate::cri::Found;

/// What an id is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Pod,
    Container,
}

/// Who has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// Bulkhead has it, or nobody.
    Ours,
    /// The index of the delegate.
    Delegate(usize),
}

/// Finds who has an id. `ours` is what Bulkhead knows of it.
pub async fn find(
    kind: Kind,
    id: &str,
    ours: Found,
    inventories: &[Inventory],
) -> Result<Holder, Status> {
    if ours == Found::Whole || id.is_empty() {
        return Ok(Holder::Ours);
    }
    let known = inventories.iter().map(|inventory| match kind {
        Kind::Pod => inventory.roll().find_pod(id),
        Kind::Container => inventory.roll().find_container(id),
    });
    let known: Vec<_> = known.enumerate().collect();
    if let Some((index, _)) = known.iter().find(|(_, found)| *found == Found::Whole) {
        return Ok(Holder::Delegate(*index));
    }
    let mut begins = known.iter().filter(|(_, found)| *found != Found::No);
    match (ours, begins.next(), begins.next()) {
        (Found::No, None, _) => ask(kind, id, inventories).await,
        (Found::No, Some((index, _)), None) => Ok(Holder::Delegate(*index)),
        (_, None, _) => Ok(Holder::Ours),
        _ => Err(Status::invalid_argument(format!(
            "{id:?} is the beginning of more than one {kind}: give more of it"
        ))),
    }
}

impl From<Holder> for Side {
    fn from(holder: Holder) -> Self {
        match holder {
            Holder::Ours => Self::Ours,
            Holder::Delegate(index) => Self::Delegate(index, String::new()),
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pod => "pod",
            Self::Container => "container",
        })
    }
}

/// Asks all delegates at once.
async fn ask(kind: Kind, id: &str, inventories: &[Inventory]) -> Result<Holder, Status> {
    let asked = inventories.iter().map(|inventory| async {
        if inventory.may_answer() {
            has(&inventory.delegate, kind, id).await
        } else {
            Err("it does not answer in time".to_owned())
        }
    });
    let answers = join_all(asked).await;
    if let Some(index) = answers.iter().position(|answer| *answer == Ok(true)) {
        return Ok(Holder::Delegate(index));
    }
    let mut silent = inventories.iter().zip(&answers);
    match silent.find_map(|(inventory, answer)| Some((inventory, answer.as_ref().err()?))) {
        None => Ok(Holder::Ours),
        Some((inventory, why)) => Err(Status::unavailable(format!(
            "the {kind} {id:?} is not Bulkhead's, and the delegate {}, which may have it, cannot be asked: {why}",
            inventory.delegate.name()
        ))),
    }
}

/// Whether a delegate has it; the error says why that is not known.
async fn has(delegate: &Delegate, kind: Kind, id: &str) -> Result<bool, String> {
    let asked = match kind {
        Kind::Pod => {
            let request = cri::PodSandboxStatusRequest {
                pod_sandbox_id: id.to_owned(),
                verbose: false,
            };
            let call = delegate.runtime(Limit::List, request, |mut client, request| async move {
                client.pod_sandbox_status(request).await
            });
            call.await.map(drop)
        }
        Kind::Container => {
            let request = cri::ContainerStatusRequest {
                container_id: id.to_owned(),
                verbose: false,
            };
            let call = delegate.runtime(Limit::List, request, |mut client, request| async move {
                client.container_status(request).await
            });
            call.await.map(drop)
        }
    };
    match asked {
        Ok(()) => Ok(true),
        Err(error) if error.refusal() == Some(Code::NotFound) => Ok(false),
        Err(DelegateError::Down { why, .. }) => Err(format!("it is down: {why}")),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_delegate::Limits;
    use bulkhead_delegate::fake::Fake;
    use std::path::Path;

    fn inventory(name: &str, directory: &Path) -> Inventory {
        let delegate = Delegate::new(name, directory.join(name), Limits::default());
        Inventory::new(delegate, directory)
    }

    fn pod(id: &str) -> cri::PodSandbox {
        cri::PodSandbox {
            id: id.into(),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn an_id_that_nobody_knows_is_asked_for_and_a_delegate_that_is_down_is_not_taken_for_a_no()
     {
        let directory = tempfile::tempdir().unwrap();
        let fake = Fake::new("fake");
        fake.world().pods.push(pod("unlisted"));
        let _running = fake.serve(&directory.path().join("runc"));
        let both = ["runc", "gvisor"].map(|name| inventory(name, directory.path()));
        let find = async |id| find(Kind::Pod, id, Found::No, &both).await;
        assert_eq!(find("unlisted").await.unwrap(), Holder::Delegate(0));
        let error = find("unknown").await.unwrap_err();
        assert_eq!(error.code(), Code::Unavailable);
        assert!(error.message().contains("gvisor"), "{error}");
        let _other = Fake::new("other").serve(&directory.path().join("gvisor"));
        assert_eq!(find("unknown").await.unwrap(), Holder::Ours);
    }

    #[tokio::test]
    async fn a_whole_id_wins_and_a_beginning_must_be_of_one() {
        let directory = tempfile::tempdir().unwrap();
        let both = ["runc", "gvisor"].map(|name| inventory(name, directory.path()));
        let now = tokio::time::Instant::now();
        both[0]
            .roll()
            .list_pods(now, vec![pod("abcd"), pod("ffff0")]);
        both[1]
            .roll()
            .list_pods(now, vec![pod("abcde"), pod("ffff1")]);
        for (id, ours, expected) in [
            ("abcd", Found::Beginning, Some(Holder::Delegate(0))),
            ("abcde", Found::No, Some(Holder::Delegate(1))),
            ("abcd", Found::Whole, Some(Holder::Ours)),
            ("ffff", Found::No, None),
            ("ffff0", Found::Beginning, Some(Holder::Delegate(0))),
            ("0000", Found::Beginning, Some(Holder::Ours)),
            ("", Found::No, Some(Holder::Ours)),
        ] {
            let found = find(Kind::Pod, id, ours, &both).await.ok();
            assert_eq!(found, expected, "{id} {ours:?}");
        }
    }
}
