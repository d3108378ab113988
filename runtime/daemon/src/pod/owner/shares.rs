// SPDX-License-Identifier: Apache-2.0
//! Shares: directories and files of the host that a pod's containers mount by virtio-fs.
//!
//! The first share starts the pod's file server. Containers that mount the same source in the same way use one share.
//! It is removed with the last of these containers. A source is identified by the file that its path leads to when it
//! is shared; if the path leads to another file later, that is another share.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_faults::{self as faults, Step};
use bulkhead_host::process::{Identity, VmmProcess};
use bulkhead_host::shares::mounts::{self, Access, Propagation, Source};
use bulkhead_host::shares::{self, ShareError};
use bulkhead_host::{HostPath, cgroup};
use bulkhead_share::name::ShareName;

use super::Owner;
use crate::pod::errors::PodError;
use crate::pod::life::record::{Held, PodRecord, ShareRecord};
use crate::pod::volumes::mountinfo::{Mounts, Writability};

/// The most shares of one file server. Each is an entry in its root directory.
const MOST_SHARES: usize = 512;
/// The most mounts below a share of which a guest is told whether they are read-only.
const MOST_PARTS: usize = 1024;
/// A file server that ends has ended as expected if its VM ends within this time.
const END_TOGETHER: Duration = Duration::from_secs(2);

/// What of the host a container mounts, and how.
#[derive(Debug)]
pub struct Wanted {
    pub found: HostPath,
    pub access: Access,
    pub propagation: Propagation,
}

/// A share as a container is to see it.
#[derive(Debug)]
pub struct Shared {
    /// Its name in the guest.
    pub name: String,
    pub writability: Writability,
}

impl Owner {
    /// Shares a path of the host with the guest, for a container.
    pub(super) async fn share(
        &mut self,
        container: &str,
        wanted: Wanted,
    ) -> Result<Shared, PodError> {
        let name = self.share_named(container, wanted).await?;
        let writability = self.writability(&name);
        Ok(Shared { name, writability })
    }

    /// Where in a share something can be written, as the host's kernel decides it. If that cannot be told, nothing is
    /// said to be read-only, and a program finds out when it writes.
    fn writability(&self, name: &str) -> Writability {
        let Some(server) = self.ledger.pod().file_server() else {
            return Writability::default();
        };
        let mounts = tokio::task::block_in_place(|| Mounts::of(server.pid));
        let place = Path::new(bulkhead_share::SHARES).join(name);
        let found = match mounts.map(|mounts| mounts.writability(&place)) {
            Ok(found) => found.unwrap_or_default(),
            Err(error) => {
                self.ledger.complain("read the mounts of a share", &error);
                return Writability::default();
            }
        };
        if found.parts.len() > MOST_PARTS {
            tracing::warn!(
                pod = self.ledger.pod().id,
                "the share {name} has {} mounts below it that are read-only otherwise than what is around them, more \
                 than {MOST_PARTS}: the container sees all of it as writable, and gets an error when it writes",
                found.parts.len()
            );
            return Writability::default();
        }
        found
    }

    /// Shares a path of the host. Returns the share's name in the guest.
    async fn share_named(&mut self, container: &str, wanted: Wanted) -> Result<String, PodError> {
        let source = tokio::task::block_in_place(|| Source::of(wanted.found))?;
        let (id, path) = (source.id(), source.path().to_owned());
        let server = self.file_server().await?;
        if let Some(at) = self
            .ledger
            .pod()
            .shares
            .iter()
            .position(|one| one.is(wanted.access, wanted.propagation, id))
        {
            self.ledger.change_pod(|pod| {
                if let Some(share) = pod.shares.get_mut(at) {
                    share.users.insert(container.to_owned());
                }
            })?;
            return Ok(self
                .ledger
                .pod()
                .shares
                .get(at)
                .map(|one| one.name.clone())
                .unwrap_or_default());
        }
        if self.ledger.pod().shares.len() >= MOST_SHARES
            || self.ledger.pod().shares_made == u16::MAX
        {
            return Err(ShareError::TooMany(self.ledger.pod().shares.len()).into());
        }
        let copy = tokio::task::block_in_place(|| source.copy(wanted.access, wanted.propagation))?;
        let name = ShareName {
            propagation: wanted.propagation,
            number: self.ledger.pod().shares_made.saturating_add(1),
        };
        // If the daemon dies before this is stored, the mount stays in the file server until the next share gets the
        // same number and replaces it. The guest does not know of it.
        mounts::attach(server, copy, name)
            .await
            .map_err(|source| ShareError::Source {
                path: path.clone(),
                source,
            })?;
        let stored = self.ledger.change_pod(|pod| {
            pod.shares_made = name.number;
            pod.shares.push(ShareRecord {
                name: name.to_string(),
                path: path.clone(),
                access: wanted.access,
                source: id,
                users: BTreeSet::from([container.to_owned()]),
            });
        });
        if let Err(error) = stored {
            let _ = mounts::detach(server, name).await;
            return Err(error.into());
        }
        tracing::info!(pod = self.ledger.pod().id, path = %path.display(), %name, "shared");
        Ok(name.to_string())
    }

    /// Records that a container no longer uses any share, and unmounts those that only it used.
    pub(super) async fn unshare(&mut self, container: &str) {
        if !self
            .ledger
            .pod()
            .shares
            .iter()
            .any(|share| share.users.contains(container))
        {
            return;
        }
        let mut unused = Vec::new();
        let changed = self.ledger.change_pod(|pod| {
            for share in &mut pod.shares {
                share.users.remove(container);
            }
            unused = pod
                .shares
                .extract_if(.., |share| share.users.is_empty())
                .collect();
        });
        if let Err(error) = changed {
            return self
                .ledger
                .complain("forget the shares of a container", &error);
        }
        let Some(server) = self.ledger.pod().file_server() else {
            return;
        };
        for name in unused.iter().filter_map(ShareRecord::name) {
            if let Err(error) = mounts::detach(server, name).await
                && server.is_alive()
            {
                self.ledger.complain("unmount a share", &error);
            }
        }
    }

    /// The pod's file server. Starts it if there is none.
    async fn file_server(&mut self) -> Result<Identity, PodError> {
        if let Some(server) = self.ledger.pod().file_server() {
            if server.is_alive() {
                return Ok(server);
            }
            // A new one cannot replace it, because the state of the guest's open files died with the old one. Only one
            // that never had a share has no such state: it ends with a daemon that dies while it starts it.
            if self.ledger.pod().shares_made > 0 {
                return Err(ShareError::Ended.into());
            }
            self.ledger.change_pod(PodRecord::release_file_server)?;
        }
        let guest = self.ledger.guest().cloned();
        let guest = guest.ok_or_else(|| PodError::Lost {
            id: self.ledger.pod().id.clone(),
        })?;
        let program: &Path = &self.shared.host.launcher.program;
        faults::before(Step::SpawnFileServer)?;
        let starting = shares::spawn(program, guest.files.clone(), guest.process.identity())?;
        let identity = starting.process().identity();
        let hold = |pod: &mut PodRecord| pod.held.push(Held::FileServer(identity));
        let held = faults::after(Step::SpawnFileServer).map_err(PodError::from);
        let held = held.and_then(|()| Ok(self.ledger.change_pod(hold)?));
        if let Err(error) = held {
            starting.process().kill();
            starting.process().ended().await;
            return Err(error);
        }
        if let Some(path) = self.ledger.pod().cgroup()
            && let Err(e) = cgroup::enter(path, identity.pid)
        {
            tracing::warn!(
                pod = self.ledger.pod().id,
                "move the file server into the pod's cgroup: {e}"
            );
        }
        let process = Arc::clone(starting.process());
        if let Err(error) = starting.serve().await {
            self.ledger.change_pod(PodRecord::release_file_server)?;
            return Err(error.into());
        }
        self.report_end(process, guest.process);
        Ok(identity)
    }

    /// Watches the file server of an earlier daemon, and logs an error if it ends before its VM.
    pub(super) fn adopt_file_server(&self, vmm: Arc<VmmProcess>) {
        let Some(identity) = self.ledger.pod().file_server() else {
            return;
        };
        match VmmProcess::adopt(identity) {
            Ok(Some(process)) => self.report_end(Arc::new(process), vmm),
            // The next share starts another one.
            Ok(None) if self.ledger.pod().shares_made == 0 => {}
            Ok(None) => tracing::error!(pod = self.ledger.pod().id, "{}", ShareError::Ended),
            Err(e) => self.ledger.complain("look for the file server", &e),
        }
    }

    fn report_end(&self, server: Arc<VmmProcess>, vmm: Arc<VmmProcess>) {
        let pod = self.ledger.pod().id.clone();
        tokio::spawn(async move {
            server.ended().await;
            // It is an error only if the VM goes on without its file server.
            if tokio::time::timeout(END_TOGETHER, vmm.ended())
                .await
                .is_err()
            {
                tracing::error!(pod, "{}", ShareError::Ended);
            }
        });
    }
}
