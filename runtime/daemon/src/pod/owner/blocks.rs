// SPDX-License-Identifier: Apache-2.0
//! Block volumes: block devices of the host that containers use as block devices.
//!
//! The VMM gets the device as an open file and maps it as an extent of the volume disk. Containers that use the same
//! device with the same access share one extent. It is detached when the last of them is removed.

use std::collections::BTreeSet;

use bulkhead_guest::protocol;
use bulkhead_host::{Guest, control};

use super::Owner;
use crate::pod::errors::PodError;
use crate::pod::life::record::BlockRecord;
use crate::pod::volumes::block::OpenBlock;

impl Owner {
    /// Attaches the devices that are not on the volume disk yet, and writes the extents of all into the request.
    pub(super) async fn attach_blocks(
        &mut self,
        guest: &Guest,
        opened: Vec<OpenBlock>,
        request: &mut protocol::CreateContainerRequest,
    ) -> Result<(), PodError> {
        for block in opened {
            let OpenBlock {
                device, writable, ..
            } = block;
            let (ownership, wanted) = (block.ownership, block.wanted);
            let is = |one: &BlockRecord| one.device == device && one.writable == writable;
            let extent = match self.ledger.pod().blocks.iter().position(is) {
                Some(at) => {
                    self.ledger.change_pod(|pod| {
                        if let Some(known) = pod.blocks.get_mut(at) {
                            known.users.insert(request.id.clone());
                        }
                    })?;
                    self.ledger.pod().blocks.get(at).map(|known| known.extent)
                }
                None => {
                    let socket = guest.files.control();
                    let extent = control::attach_volume(&socket, block.file).await?;
                    // If the daemon dies before this is stored, the VMM keeps the device open until the VM ends.
                    let stored = self.ledger.change_pod(|pod| {
                        pod.blocks.push(BlockRecord {
                            path: wanted.path.clone(),
                            device,
                            writable,
                            extent,
                            users: BTreeSet::from([request.id.clone()]),
                        });
                    });
                    if let Err(error) = stored {
                        let _ = control::detach_volume(&socket, extent).await;
                        return Err(error.into());
                    }
                    tracing::info!(pod = self.ledger.pod().id, path = %wanted.path.display(), "attached");
                    Some(extent)
                }
            };
            let place = extent.map(|extent| protocol::BlockDevice {
                container_path: wanted.container_path,
                extent: Some(control::told(extent)),
                readonly: !writable,
                permissions: wanted.permissions,
                ownership: Some(ownership),
            });
            request.block_devices.extend(place);
        }
        Ok(())
    }

    /// Records that a container no longer uses any device, and detaches those that only it used. Call this after the
    /// guest has removed the container.
    pub(super) async fn detach_blocks(&mut self, container: &str) {
        let of_it = |block: &BlockRecord| block.users.contains(container);
        if !self.ledger.pod().blocks.iter().any(of_it) {
            return;
        }
        let mut unused = Vec::new();
        let changed = self.ledger.change_pod(|pod| {
            for block in &mut pod.blocks {
                block.users.remove(container);
            }
            unused = pod
                .blocks
                .extract_if(.., |block| block.users.is_empty())
                .collect();
        });
        if let Err(error) = changed {
            return self
                .ledger
                .complain("forget the block devices of a container", &error);
        }
        // Without a VM there is nothing to detach: its devices were closed when it ended.
        let Some(socket) = self.ledger.guest().map(|guest| guest.files.control()) else {
            return;
        };
        for block in unused {
            if let Err(error) = control::detach_volume(&socket, block.extent).await {
                self.ledger.complain("close a block device", &error);
            }
        }
    }
}
