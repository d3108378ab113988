// SPDX-License-Identifier: Apache-2.0
//! The jail of a VMM, in two steps, both on the main thread before there are others. [`separate`] needs no configuration:
//! namespaces and an empty root. [`enter`] follows when the configuration has arrived: limits, the VM's own user, no
//! capabilities. From then on the process holds its descriptors and nothing else. [`crate::syscalls`] is the last part.

use bulkhead_jail::limits::Resource;
use bulkhead_jail::namespaces::{self, Side};
use bulkhead_jail::privileges::{self, CapabilitySet};
use bulkhead_jail::{JailError, descriptors, limits, root};

use crate::config::VmConfig;
use crate::devices::vsock::muxer::MAX_STREAMS;
use crate::inherited::Inherited;

/// Descriptors apart from those of vsock streams: what is inherited, eventfds, volumes and layers.
const OTHER_FILES: u64 = 4096;
/// Address space apart from the guest's memory: the program, stacks, heap, buffers.
const OTHER_MEMORY_BYTES: u64 = 1 << 30;
/// Threads apart from vCPUs: main, devices, halts, and one for each volume that hangs while it is closed.
const OTHER_THREADS: u64 = 64;

/// Leaves the host's namespaces and its files. The caller is then one of two processes: the parent has nothing more to do
/// than to tell the number of the child, in which the VM will run.
pub fn separate() -> Result<Side, JailError> {
    namespaces::separate()?;
    let side = namespaces::fork()?;
    if side == Side::Child {
        descriptors::close_from(Inherited::END)?;
        namespaces::own_session()?;
        root::empty()?;
    }
    Ok(side)
}

/// Bounds the files that the VM may write, so that it cannot make its disks longer than they are. The daemon raises the limit
/// for a longer file that it attaches. The guest's memory is such a file, too.
pub fn bound_files(config: &VmConfig, disk_bytes: u64) {
    limits::set(&[(Resource::Fsize, disk_bytes.max(config.memory_max_bytes()))]);
}

/// Gives up everything else. There is no way back.
pub fn enter(config: &VmConfig) -> Result<(), JailError> {
    let streams = u64::try_from(MAX_STREAMS).unwrap_or(u64::MAX);
    limits::set(&[
        (Resource::Core, limits::NO_CORE),
        // The daemon may have been given these; a VM needs none of them.
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
        (Resource::Rtprio, 0),
        (Resource::Nice, 0),
        (Resource::Nofile, streams.saturating_add(OTHER_FILES)),
        (
            Resource::Nproc,
            u64::from(config.vcpus).saturating_add(OTHER_THREADS),
        ),
        (
            Resource::As,
            config.memory_max_bytes().saturating_add(OTHER_MEMORY_BYTES),
        ),
    ]);
    let none = CapabilitySet::empty();
    privileges::bound(none);
    privileges::become_user(config.user.uid, config.user.gid)?;
    privileges::keep(none)?;
    // Whoever makes a user namespace has all capabilities in it.
    if namespaces::enter_user_namespace()? {
        privileges::bound(none);
        privileges::keep(none)?;
    }
    root::forbid_paths()?;
    limits::forbid_dumps()
}
