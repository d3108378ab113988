// SPDX-License-Identifier: Apache-2.0
//! `RemoveContainer`: removes a container with everything that belongs to it.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::state::State;
use super::{Container, ContainerError, Containers};

const KILL_TIMEOUT: Duration = Duration::from_secs(10);

impl Containers {
    /// Kills a container's processes, then removes its cgroup, mounts and devices. It is no error if there is none.
    pub async fn remove(&self, id: &str) -> Result<(), ContainerError> {
        let Ok(container) = self.get(id) else {
            return if self.known().reserved.contains(id) {
                Err(ContainerError::Exists(id.to_owned()))
            } else {
                Ok(())
            };
        };
        let _operation = container.operation.lock().await;
        kill(&container).await?;
        let overlay = container
            .overlay
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let views = std::mem::take(
            &mut *container
                .views
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let blocks = std::mem::take(
            &mut *container
                .blocks
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let cgroup = container.cgroup.clone();
        spawn_blocking(move || {
            // Processes first, because they use the mounts.
            let removed = cgroup.remove();
            if let Some(overlay) = overlay {
                overlay.remove();
            }
            drop(views);
            drop(blocks);
            removed
        })
        .await
        .map_err(|e| ContainerError::system("remove the container")(std::io::Error::other(e)))??;
        container.log.close();
        // A restore may have changed its id meanwhile.
        let mut known = self.known();
        known
            .containers
            .retain(|_, one| !Arc::ptr_eq(one, &container));
        Ok(())
    }
}

async fn kill(container: &Arc<Container>) -> Result<(), ContainerError> {
    container.cgroup.kill();
    match container.snapshot().0 {
        State::Running { .. } | State::Restored { .. } => {}
        State::Created | State::Exited(_) => return Ok(()),
    }
    let mut ended = container.ended.subscribe();
    match timeout(KILL_TIMEOUT, ended.wait_for(|ended| *ended)).await {
        Ok(_) => Ok(()),
        Err(_) => Err(ContainerError::system("kill the container")(
            std::io::ErrorKind::TimedOut.into(),
        )),
    }
}
