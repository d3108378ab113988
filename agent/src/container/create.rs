// SPDX-License-Identifier: Apache-2.0
//! `CreateContainer`: prepares the root file system and the cgroup. No process runs yet.

use std::sync::{Arc, Mutex, OnceLock};

use bulkhead_proto::agent::CreateContainerRequest;
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use super::given;
use super::state::State;
use super::{Container, ContainerError, Containers, MAX_CONTAINERS, Shared, Versioned, check_id};
use crate::cgroup::Cgroup;
use crate::cgroup::limits::When;
use crate::disk::overlay::Overlay;
use crate::init::config::GivenDevice;
use crate::seccomp;
use crate::statistics::writable::Counted;
use crate::streams::pump::Log;
use crate::volumes::{declared, mounts};

impl Containers {
    pub async fn create(&self, spec: CreateContainerRequest) -> Result<(), ContainerError> {
        check_id(&spec.id)?;
        let _admission = self.admit().await?;
        let _reservation = self.reserve(&spec.id)?;
        let shared = Arc::clone(&self.shared);
        let container = spawn_blocking(move || build(&shared, spec))
            .await
            .map_err(|e| {
                ContainerError::system("create the container")(std::io::Error::other(e))
            })??;
        let container = Arc::new(container);
        let mut known = self.known();
        self.shared.changes.send_modify(|changes| {
            *changes += 1;
            container.versioned().version = *changes;
            known
                .containers
                .insert(container.id(), Arc::clone(&container));
        });
        Ok(())
    }

    pub(super) fn reserve(&self, id: &str) -> Result<Reservation, ContainerError> {
        let mut known = self.known();
        // A restored container has another id than its directories.
        let has_directories = |one: &Arc<Container>| one.spec.id == id;
        if known.containers.contains_key(id)
            || known.containers.values().any(has_directories)
            || known.reserved.contains(id)
        {
            return Err(ContainerError::Exists(id.to_owned()));
        }
        if known.containers.len() + known.reserved.len() >= MAX_CONTAINERS {
            return Err(ContainerError::TooMany("containers"));
        }
        known.reserved.insert(id.to_owned());
        Ok(Reservation {
            id: id.to_owned(),
            containers: self.clone(),
        })
    }
}

/// Reserves a container id until it is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    id: String,
    containers: Containers,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.containers.known().reserved.remove(&self.id);
    }
}

/// Builds the container. Blocks. On an error, undoes what it has done.
fn build(shared: &Shared, spec: CreateContainerRequest) -> Result<Container, ContainerError> {
    let process = spec
        .process
        .clone()
        .ok_or_else(|| ContainerError::Invalid("no process is given".to_owned()))?;
    if process.args.is_empty() {
        return Err(ContainerError::Invalid("no command is given".to_owned()));
    }
    let seccomp = seccomp::program(spec.seccomp.as_ref(), &process.capabilities)?;
    let mut devices = given::find(&spec.devices, &shared.users)?;
    let (block_devices, blocks) = given::map(&shared.blocks, &spec.block_devices)?;
    devices.extend(block_devices);
    let (volumes, layers) = (&shared.volumes, &shared.layers);
    let mounts = mounts::resolve(volumes, layers, &spec.id, &spec.mounts)?;
    let overlay = Overlay::mount(&spec.id, layers.acquire(&spec.layers)?, &shared.users)?;
    let declared = declared::make(&overlay, &spec.declared_volumes, &shared.users);
    let made = declared.map_err(ContainerError::from);
    let made = made.and_then(|declared| Ok((declared, make_cgroup(&spec, &devices)?)));
    let (mut binds, cgroup) = match made {
        Ok(made) => made,
        Err(e) => {
            overlay.remove();
            return Err(e);
        }
    };
    binds.extend(mounts.binds);
    mounts::in_order(&mut binds);
    Ok(Container {
        id: Mutex::new(spec.id.clone()),
        log: Arc::new(Log::default()),
        process,
        seccomp,
        cgroup,
        rootfs: overlay.rootfs(),
        mounts: binds,
        devices,
        blocks: Mutex::new(blocks),
        views: Mutex::new(mounts.views),
        overlay: Mutex::new(Some(overlay)),
        state: Mutex::new(Versioned {
            state: State::Created,
            version: 0,
        }),
        pidfd: Mutex::default(),
        identity: OnceLock::new(),
        stdin: Mutex::default(),
        terminal: Mutex::default(),
        ended: watch::Sender::new(false),
        written: Counted::default(),
        operation: tokio::sync::Mutex::default(),
        spec,
    })
}

fn make_cgroup(
    spec: &CreateContainerRequest,
    devices: &[GivenDevice],
) -> Result<Cgroup, ContainerError> {
    let rules: Vec<_> = devices.iter().map(given::rule).collect();
    let cgroup = Cgroup::create(&spec.id)?;
    let resources = spec.resources.clone().unwrap_or_default();
    let limited = cgroup.apply(&resources, When::Creation).and_then(|()| {
        if spec.privileged {
            Ok(())
        } else {
            cgroup.restrict_devices(&rules)
        }
    });
    match limited {
        Ok(()) => Ok(cgroup),
        Err(e) => {
            cgroup.remove_if_empty();
            Err(e.into())
        }
    }
}
