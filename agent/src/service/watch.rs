// SPDX-License-Identifier: Apache-2.0
//! Reports the states of containers to the daemon.

use std::time::Instant;

use bulkhead_proto::agent as proto;
use bulkhead_proto::agent::watch_event::Event;
use tokio::sync::mpsc;
use tonic::Status;

use crate::clock;
use crate::container::state::State;
use crate::container::{Container, Containers};

/// Sends the state of all containers, then every change, to one watcher. A slow watcher may miss intermediate states,
/// but never the last one.
pub async fn watch(
    containers: Containers,
    sender: mpsc::Sender<Result<proto::WatchEvent, Status>>,
) {
    let mut changes = containers.changes();
    let mut seen = 0;
    let mut caught_up = false;
    loop {
        changes.borrow_and_update();
        let (changed, newest) = containers.changed_since(seen);
        seen = newest;
        for (container, state) in &changed {
            let event = Event::Container(status(container, state));
            if sender
                .send(Ok(proto::WatchEvent { event: Some(event) }))
                .await
                .is_err()
            {
                return;
            }
        }
        if !caught_up {
            caught_up = true;
            let event = Some(Event::CaughtUp(true));
            if sender.send(Ok(proto::WatchEvent { event })).await.is_err() {
                return;
            }
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = sender.closed() => return,
        }
    }
}

/// The status of a container as a message for the daemon.
pub fn status(container: &Container, state: &State) -> proto::ContainerStatus {
    let mut status = proto::ContainerStatus {
        id: container.id(),
        identity: container.identity.get().cloned(),
        ..Default::default()
    };
    match state {
        State::Created => status.set_state(proto::container_status::State::Created),
        State::Restored { .. } => {
            status.set_state(proto::container_status::State::Created);
            // As of any container that was not started.
            status.identity = None;
        }
        State::Running { pid, started_at } => {
            status.set_state(proto::container_status::State::Running);
            status.pid = pid.unsigned_abs();
            set_started(&mut status, *started_at);
        }
        State::Exited(ended) => {
            status.set_state(proto::container_status::State::Exited);
            if let Some(started_at) = ended.started_at {
                set_started(&mut status, started_at);
            }
            let ago = ago_nanoseconds(ended.finished_at);
            status.finished_ago_nanoseconds = Some(ago);
            status.finished_at_unix_nanoseconds = clock::now().saturating_sub_unsigned(ago);
            status.exit_code = ended.exit_code;
            status.oom_killed = ended.oom_killed;
            if let Some(message) = &ended.start_error {
                status.reason = proto::START_ERROR.to_owned();
                status.message.clone_from(message);
            }
        }
    }
    status
}

fn set_started(status: &mut proto::ContainerStatus, at: Instant) {
    let ago = ago_nanoseconds(at);
    status.started_ago_nanoseconds = Some(ago);
    status.started_at_unix_nanoseconds = clock::now().saturating_sub_unsigned(ago);
}

fn ago_nanoseconds(at: Instant) -> u64 {
    u64::try_from(at.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::fakes::Fakes;
    use bulkhead_proto::agent::RestoredContainer;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn a_new_watcher_hears_of_restored_containers_as_of_created_ones() {
        let pod = Fakes::running(&["old"]);
        let containers = &pod.containers;
        let lease = Duration::from_secs(9);
        containers.freeze(&["old".into()], lease).await.unwrap();
        let listed = RestoredContainer {
            id: "old".into(),
            new_id: "new".into(),
        };
        let restore = containers.begin_restore(vec![listed]).await.unwrap();
        restore.unwrap().finish().await.unwrap();

        let (sender, mut news) = mpsc::channel(4);
        tokio::spawn(watch(containers.clone(), sender));
        let mut next = async || news.recv().await.unwrap().unwrap().event;
        let created = proto::ContainerStatus {
            id: "new".into(),
            ..Default::default()
        };
        assert_eq!(next().await, Some(Event::Container(created)));
        assert_eq!(next().await, Some(Event::CaughtUp(true)));
        containers.start("new").await.unwrap();
        let Some(Event::Container(started)) = next().await else {
            panic!("no container");
        };
        assert_eq!((started.id.as_str(), started.pid), ("new", 1));
        assert_eq!(started.state(), proto::container_status::State::Running);
        assert_eq!(started.identity.map(|user| user.uid), Some(1000));
    }
}
