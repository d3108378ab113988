// SPDX-License-Identifier: Apache-2.0
//! The floor of what a guest says of its writable layers: what its scratch disk takes on the host.
//!
//! The guest counts the layers, and its kernel may lie. All of them are on the scratch disk. Its file on the host has
//! blocks for what was written, and holes for what never was or was freed, because the guest discards that. What the
//! file takes beyond the layers, and beyond what the file system needs for itself, some container has written; which
//! one, only the guest knows. So it is added to the largest layer. kubelet adds the containers of a pod up before it
//! evicts it, so it sees at least what the node pays. What an honest guest says stays as it is. Pure.
//!
//! A container that has exited counts as the guest says, though kubelet looks only at those that run. So a guest can
//! hide behind one of them what it has written.

use std::cmp::Reverse;

use bulkhead_guest::protocol::ContainerStatistics;

/// What an empty file system takes (0.1 MiB on a disk of 64 MiB, 5 MiB on one of 100 GiB), with room for copies of
/// configMaps and for termination messages.
const OWN_BYTES: u64 = 16 << 20;
/// The part of a disk that may become tables of inodes: mke2fs plans one of 256 bytes for each 16 KiB.
const INODE_TABLES: u64 = 64;

/// A scratch disk, as the host sees it.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    pub size_bytes: u64,
    /// The blocks of its file.
    pub taken_bytes: u64,
}

/// Raises what the guest said, so that it adds up to what the disk takes. `running` are the containers that run.
pub fn raise(containers: &mut Vec<ContainerStatistics>, running: &[&str], disk: Disk) {
    let layers = containers.iter().filter_map(|one| one.writable_layer);
    let said = layers.map(|layer| layer.bytes).fold(0, u64::saturating_add);
    let own = OWN_BYTES.saturating_add(disk.size_bytes / INODE_TABLES);
    let missing = disk.taken_bytes.saturating_sub(own).saturating_sub(said);
    if missing == 0 {
        return;
    }
    // A guest may also be silent about a container.
    for id in running {
        if !containers.iter().any(|one| one.id == *id) {
            containers.push(ContainerStatistics {
                id: (*id).to_owned(),
                ..Default::default()
            });
        }
    }
    let largest = containers.iter_mut().max_by_key(|one| {
        let bytes = one.writable_layer.map_or(0, |layer| layer.bytes);
        // Of equal ones always the same, so that no layer seems to shrink.
        let id = Reverse(one.id.clone());
        (running.contains(&one.id.as_str()), bytes, id)
    });
    if let Some(one) = largest {
        let layer = one.writable_layer.get_or_insert_default();
        layer.bytes = layer.bytes.saturating_add(missing);
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_guest::protocol::WritableLayer;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Raises layers of so many MiB, on a disk of 1 GiB: then 32 MiB are the file system's own.
    fn raised(said: &[(&str, u64)], running: &[&str], taken_mib: u64) -> Vec<(String, u64)> {
        let one = |(id, mib): &(&str, u64)| ContainerStatistics {
            id: (*id).to_owned(),
            writable_layer: Some(WritableLayer {
                bytes: mib * MIB,
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut containers = said.iter().map(one).collect();
        let disk = Disk {
            size_bytes: 1 << 30,
            taken_bytes: taken_mib * MIB,
        };
        raise(&mut containers, running, disk);
        let one =
            |one: ContainerStatistics| (one.id, one.writable_layer.unwrap_or_default().bytes / MIB);
        containers.into_iter().map(one).collect()
    }

    fn expect(is: Vec<(String, u64)>, expected: &[(&str, u64)]) {
        let is: Vec<_> = is.iter().map(|(id, mib)| (id.as_str(), *mib)).collect();
        assert_eq!(is, expected);
    }

    #[test]
    fn an_honest_guest_is_believed() {
        for taken in [0, 132, 32 + 140] {
            let said = [("a", 100), ("b", 40)];
            expect(raised(&said, &["a", "b"], taken), &said);
        }
        expect(raised(&[], &[], 900), &[]);
    }

    #[test]
    fn what_a_guest_does_not_admit_is_the_largest_containers() {
        let running = ["a", "b"];
        let said = [("a", 0), ("b", 0)];
        expect(raised(&said, &running, 332), &[("a", 300), ("b", 0)]);
        let said = [("a", 1), ("b", 2)];
        expect(raised(&said, &running, 332), &[("a", 1), ("b", 299)]);
    }

    #[test]
    fn it_counts_for_a_container_that_runs_also_if_the_guest_is_silent_about_it() {
        let said = [("a", 100), ("b", 10)];
        expect(raised(&said, &["b"], 332), &[("a", 100), ("b", 200)]);
        expect(raised(&[("a", 0)], &["b"], 132), &[("a", 0), ("b", 100)]);
    }
}
