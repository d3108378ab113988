// SPDX-License-Identifier: Apache-2.0
//! Offloads (virtio 1.2, 5.1.3 and 5.1.6.3): work on frames that guest and host leave to each other, such
//! as checksums and the cutting of large segments. Within one machine most of it need not be done at all.
//!
//! Which offloads are offered depends on the TAP and so on the host's kernel; [`offer`] finds out.

use std::io;

pub const F_CSUM: u64 = 1;
pub const F_GUEST_CSUM: u64 = 1 << 1;
pub const F_GUEST_TSO4: u64 = 1 << 7;
pub const F_GUEST_TSO6: u64 = 1 << 8;
pub const F_GUEST_ECN: u64 = 1 << 9;
pub const F_HOST_TSO4: u64 = 1 << 11;
pub const F_HOST_TSO6: u64 = 1 << 12;
pub const F_HOST_ECN: u64 = 1 << 13;
pub const F_GUEST_USO4: u64 = 1 << 54;
pub const F_GUEST_USO6: u64 = 1 << 55;
pub const F_HOST_USO: u64 = 1 << 56;

/// With any of these, frames towards the guest may be larger than the MTU.
pub const GUEST_SEGMENTS: u64 = F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_USO4 | F_GUEST_USO6;

const TUN_F_CSUM: u32 = 1;
/// The TAP's flags for segmentation, each with the feature that allows it. All of them need the checksum flag.
const TUN_SEGMENTS: [(u32, u64); 5] = [
    (2, F_GUEST_TSO4),
    (4, F_GUEST_TSO6),
    (8, F_GUEST_ECN),
    (0x20, F_GUEST_USO4),
    (0x40, F_GUEST_USO6),
];

const TCP: u64 = F_CSUM
    | F_GUEST_CSUM
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_GUEST_ECN
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_HOST_ECN;
/// UDP segmentation, which needs Linux 6.2 on the host.
const UDP: u64 = F_GUEST_USO4 | F_GUEST_USO6 | F_HOST_USO;

/// All offloads that there are.
pub const ALL: u64 = TCP | UDP;

/// Finds the features that a TAP supports by trying to set them. Afterwards none is set.
pub fn offer(set: impl Fn(u32) -> io::Result<()>) -> u64 {
    let possible = [ALL, TCP, F_CSUM | F_GUEST_CSUM];
    let found = possible
        .into_iter()
        .find(|&features| set(tun_flags(features)).is_ok());
    let _ = set(0);
    found.unwrap_or(0)
}

/// The TAP's flags for a driver that accepted `features`: the work that the TAP may leave to the guest.
pub fn tun_flags(features: u64) -> u32 {
    if features & F_GUEST_CSUM == 0 {
        return 0;
    }
    let accepted = TUN_SEGMENTS
        .iter()
        .filter(|(_, feature)| features & feature != 0);
    accepted.fold(TUN_F_CSUM, |flags, (flag, _)| flags | flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_offered_is_what_the_tap_takes() {
        let old = |flags: u32| match flags & 0x60 {
            0 => Ok(()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        };
        assert_eq!(offer(|_| Ok(())), TCP | UDP);
        assert_eq!(offer(old), TCP);
        assert_eq!(offer(|_| Err(io::ErrorKind::InvalidInput.into())), 0);
    }

    #[test]
    fn the_tap_leaves_undone_what_the_driver_takes() {
        let table = [
            (0, 0),
            (F_GUEST_TSO4, 0),
            (F_GUEST_CSUM, 1),
            (F_GUEST_CSUM | F_GUEST_TSO6, 5),
            (TCP, 0xf),
            (TCP | UDP, 0x6f),
        ];
        for (features, flags) in table {
            assert_eq!(tun_flags(features), flags, "{features:#x}");
        }
    }
}
