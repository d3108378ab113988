// SPDX-License-Identifier: Apache-2.0
//! The header before every frame (virtio 1.2, 5.1.6). It tells the receiver which work the sender left
//! to it: to add a checksum, or to cut a large frame into segments.
//!
//! The guest's header goes to the host's network stack. That checks it against the frame, but does not
//! know what was negotiated. So a copy is checked here, and only work that was negotiated gets through.

use super::offload::{F_CSUM, F_HOST_ECN, F_HOST_TSO4, F_HOST_TSO6, F_HOST_USO};

/// The size of `struct virtio_net_hdr_v1`.
pub const HEADER_BYTES: usize = 12;
/// Offset of `num_buffers`, which says how many buffers a received frame takes.
pub const NUM_BUFFERS: usize = 10;
const ETHERNET_BYTES: u16 = 14;

/// The checksum is missing; it covers everything from `csum_start` on.
const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// Together with a TCP kind: the frame has congestion marks (ECN).
const GSO_ECN: u8 = 0x80;

/// The fewest bytes of a TCP segment. The host does work for each segment, so 64 KiB in segments of one byte would cost
/// it more than a thousand usual frames. Linux sends segments of at least 48 bytes, less the options of TCP (12 for time
/// stamps).
const LEAST_TCP_SEGMENT: u16 = 32;
/// The most datagrams in one frame, as in Linux (`UDP_MAX_SEGMENTS`). They may be short.
const MOST_DATAGRAMS: usize = 128;

/// Why a frame with this header is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("frame asks for a checksum, which was not negotiated")]
    Checksum,
    #[error("checksum field is outside the frame")]
    ChecksumPlace,
    #[error("segmentation of kind {0:#x} was not negotiated")]
    Segmentation(u8),
    #[error("segmentation without segment size or checksum")]
    Segments,
    #[error("segments of {0} bytes are too small")]
    SmallSegments(u16),
}

/// Checks a header for a driver that accepted `features`. Returns the header to send with the frame of
/// `frame_bytes`.
pub fn check(
    raw: [u8; HEADER_BYTES],
    frame_bytes: usize,
    features: u64,
) -> Result<[u8; HEADER_BYTES], HeaderError> {
    let [flags, kind, a, b, c, d, e, f, g, h, _, _] = raw;
    let header_bytes = u16::from_le_bytes([a, b]);
    let segment_bytes = u16::from_le_bytes([c, d]);
    let sum_start = u16::from_le_bytes([e, f]);
    let sum_offset = u16::from_le_bytes([g, h]);
    let has = |feature: u64| features & feature != 0;
    // Unknown flags are ignored, as the standard demands.
    let needs_sum = flags & NEEDS_CSUM != 0;
    if needs_sum {
        if !has(F_CSUM) {
            return Err(HeaderError::Checksum);
        }
        let end = usize::from(sum_start)
            .saturating_add(usize::from(sum_offset))
            .saturating_add(2);
        if sum_start < ETHERNET_BYTES || end > frame_bytes {
            return Err(HeaderError::ChecksumPlace);
        }
    }
    let wanted = match kind & !GSO_ECN {
        GSO_NONE if kind == GSO_NONE => None,
        GSO_TCPV4 => Some(F_HOST_TSO4),
        GSO_TCPV6 => Some(F_HOST_TSO6),
        GSO_UDP_L4 if kind == GSO_UDP_L4 => Some(F_HOST_USO),
        _ => return Err(HeaderError::Segmentation(kind)),
    };
    if let Some(feature) = wanted {
        if !has(feature) || (kind & GSO_ECN != 0 && !has(F_HOST_ECN)) {
            return Err(HeaderError::Segmentation(kind));
        }
        if segment_bytes == 0 || !needs_sum {
            return Err(HeaderError::Segments);
        }
        let is_too_small = match feature {
            F_HOST_USO => usize::from(segment_bytes) < frame_bytes / MOST_DATAGRAMS,
            _ => segment_bytes < LEAST_TCP_SEGMENT,
        };
        if is_too_small {
            return Err(HeaderError::SmallSegments(segment_bytes));
        }
    }
    let most = u16::try_from(frame_bytes).unwrap_or(u16::MAX);
    let kept = |number: u16, keep: bool| if keep { number } else { 0 }.to_le_bytes();
    // The headers' length is only a hint, so one that is too large is reduced.
    let [a, b] = kept(header_bytes.min(most), wanted.is_some());
    let [c, d] = kept(segment_bytes, wanted.is_some());
    let [e, f] = kept(sum_start, needs_sum);
    let [g, h] = kept(sum_offset, needs_sum);
    Ok([flags & NEEDS_CSUM, kind, a, b, c, d, e, f, g, h, 0, 0])
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN | F_HOST_USO;

    fn header(flags: u8, kind: u8, lens: [u16; 2], sum: [u16; 2]) -> [u8; HEADER_BYTES] {
        let numbers = [lens, sum, [0xffff, 0]].concat();
        let numbers: Vec<u8> = numbers.into_iter().flat_map(u16::to_le_bytes).collect();
        let raw = [&[flags, kind], &numbers[..HEADER_BYTES.saturating_sub(2)]].concat();
        raw.try_into().unwrap()
    }

    fn tcp(kind: u8) -> [u8; HEADER_BYTES] {
        header(NEEDS_CSUM, kind, [54, 1448], [34, 16])
    }

    #[test]
    fn what_was_negotiated_gets_through_without_what_nobody_needs() {
        let plain = header(0, GSO_NONE, [9, 9], [9, 9]);
        assert_eq!(check(plain, 60, 0), Ok([0; HEADER_BYTES]));
        for kind in [GSO_TCPV4, GSO_TCPV4 | GSO_ECN, GSO_TCPV6, GSO_UDP_L4] {
            let mut expected = tcp(kind);
            expected[NUM_BUFFERS..].fill(0);
            assert_eq!(check(tcp(kind), 60_000, ALL), Ok(expected), "{kind}");
        }
        let unknown_flags = header(0xfe, GSO_NONE, [0, 0], [0, 0]);
        assert_eq!(check(unknown_flags, 60, ALL), Ok([0; HEADER_BYTES]));
        let long = header(NEEDS_CSUM, GSO_TCPV4, [60_000, 1448], [34, 16]);
        assert_eq!(check(long, 100, ALL).unwrap()[2..4], [100, 0]);
    }

    #[test]
    fn segments_so_small_that_a_frame_has_thousands_are_refused() {
        let cut = |kind, bytes| header(NEEDS_CSUM, kind, [54, bytes], [34, 16]);
        for (kind, bytes, frame_bytes, is_allowed) in [
            (GSO_TCPV4, 1, 65_550, false),
            (GSO_TCPV6 | GSO_ECN, 31, 200, false),
            (GSO_TCPV6, 32, 65_550, true),
            (GSO_UDP_L4, 1, 65_550, false),
            (GSO_UDP_L4, 511, 65_550, false),
            (GSO_UDP_L4, 512, 65_550, true),
            (GSO_UDP_L4, 10, 42 + 64 * 10, true),
        ] {
            let expected = match is_allowed {
                true => Ok(()),
                false => Err(HeaderError::SmallSegments(bytes)),
            };
            let found = check(cut(kind, bytes), frame_bytes, ALL).map(drop);
            assert_eq!(found, expected, "{kind:#x} {bytes}");
        }
    }

    #[test]
    fn what_was_not_negotiated_or_makes_no_sense_is_refused() {
        let sum = |start, offset| header(NEEDS_CSUM, GSO_NONE, [0, 0], [start, offset]);
        let table = [
            (tcp(GSO_TCPV4), ALL & !F_CSUM, HeaderError::Checksum),
            (
                tcp(GSO_TCPV4),
                ALL & !F_HOST_TSO4,
                HeaderError::Segmentation(1),
            ),
            (
                tcp(GSO_TCPV6),
                ALL & !F_HOST_TSO6,
                HeaderError::Segmentation(4),
            ),
            (
                tcp(GSO_TCPV6 | GSO_ECN),
                ALL & !F_HOST_ECN,
                HeaderError::Segmentation(0x84),
            ),
            (
                tcp(GSO_UDP_L4),
                ALL & !F_HOST_USO,
                HeaderError::Segmentation(5),
            ),
            (
                tcp(GSO_UDP_L4 | GSO_ECN),
                ALL,
                HeaderError::Segmentation(0x85),
            ),
            // UDP fragmentation offload (UFO) is never offered.
            (tcp(3), ALL, HeaderError::Segmentation(3)),
            (tcp(GSO_ECN), ALL, HeaderError::Segmentation(0x80)),
            (tcp(0x7f), ALL, HeaderError::Segmentation(0x7f)),
            (
                header(NEEDS_CSUM, GSO_TCPV4, [54, 0], [34, 16]),
                ALL,
                HeaderError::Segments,
            ),
            (
                header(0, GSO_TCPV4, [54, 1448], [34, 16]),
                ALL,
                HeaderError::Segments,
            ),
            (
                header(NEEDS_CSUM, GSO_TCPV4, [54, 31], [34, 16]),
                ALL,
                HeaderError::SmallSegments(31),
            ),
            (sum(13, 0), ALL, HeaderError::ChecksumPlace),
            (sum(34, 99), ALL, HeaderError::ChecksumPlace),
            (sum(u16::MAX, u16::MAX), ALL, HeaderError::ChecksumPlace),
        ];
        for (raw, features, expected) in table {
            assert_eq!(check(raw, 100, features), Err(expected), "{raw:x?}");
        }
    }

    /// Checks a header that got through by itself, without looking at how it was checked.
    fn is_harmless(header: [u8; HEADER_BYTES], frame_bytes: usize, features: u64) -> bool {
        let number = |at: usize| u16::from_le_bytes([header[at], header[at.saturating_add(1)]]);
        let [flags, kind, ..] = header;
        let feature = match kind {
            0 => 0,
            1 => F_HOST_TSO4,
            0x81 => F_HOST_TSO4 | F_HOST_ECN,
            4 => F_HOST_TSO6,
            0x84 => F_HOST_TSO6 | F_HOST_ECN,
            5 => F_HOST_USO,
            _ => return false,
        };
        let sum_end = usize::from(number(6))
            .saturating_add(usize::from(number(8)))
            .saturating_add(2);
        let sum_is_good = match flags {
            0 => number(6) == 0 && number(8) == 0,
            1 => features & F_CSUM != 0 && sum_end <= frame_bytes && number(6) >= ETHERNET_BYTES,
            _ => false,
        };
        let segments_are_good = match kind {
            0 => number(2) == 0 && number(4) == 0,
            _ => flags == 1 && number(4) > 0 && usize::from(number(2)) <= frame_bytes,
        };
        features & feature == feature
            && sum_is_good
            && segments_are_good
            && header[NUM_BUFFERS..] == [0, 0]
    }

    #[test]
    #[allow(clippy::arithmetic_side_effects)]
    fn for_all_flags_kinds_and_features_only_negotiated_work_gets_through() {
        let features = [F_CSUM, F_HOST_TSO4, F_HOST_TSO6, F_HOST_ECN, F_HOST_USO];
        let mut passed: u32 = 0;
        for chosen in 0u32..32 {
            let numbered = features.iter().zip(0u32..);
            let accepted = numbered.filter(|(_, bit)| chosen >> bit & 1 == 1);
            let accepted = accepted.fold(0, |all, (feature, _)| all | feature);
            for [flags, kind] in (0..=u16::MAX).map(u16::to_le_bytes) {
                for (lens, sum) in [
                    ([0, 0], [34, 16]),
                    ([54, 1448], [34, 16]),
                    ([54, 1448], [99, 0]),
                ] {
                    let raw = header(flags, kind, lens, sum);
                    if let Ok(checked) = check(raw, 100, accepted) {
                        assert!(
                            is_harmless(checked, 100, accepted),
                            "{raw:x?} {accepted:#x}"
                        );
                        passed = passed.saturating_add(1);
                    }
                }
            }
        }
        assert!(passed > 0);
    }
}
