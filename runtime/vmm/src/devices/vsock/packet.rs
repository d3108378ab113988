// SPDX-License-Identifier: Apache-2.0
//! The header of a vsock packet (virtio 1.2, 5.10.6). Pure.
//!
//! The virtio-vsock crate is not used, because it makes assumptions about how the driver splits header
//! and data into descriptors.

pub const HEADER_BYTES: usize = 44;
/// The most descriptors that a driver may split one packet into.
pub const CHAIN_MAX: usize = 64;
pub const TYPE_STREAM: u16 = 1;

pub const SHUTDOWN_RECEIVE: u32 = 1;
pub const SHUTDOWN_SEND: u32 = 2;
pub const SHUTDOWN_BOTH: u32 = 3;

/// The operation of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    /// A number that the standard does not define.
    Unknown(u16),
}

impl Op {
    fn parse(number: u16) -> Self {
        match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }

    fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(other) => other,
        }
    }
}

/// A packet without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: Op,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// A header for a stream from one end (CID and port) to the other, without data or credit.
    #[must_use]
    pub fn new(from: (u64, u32), to: (u64, u32), op: Op) -> Self {
        Self {
            src_cid: from.0,
            dst_cid: to.0,
            src_port: from.1,
            dst_port: to.1,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    #[must_use]
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(next(&mut rest)),
            dst_cid: u64::from_le_bytes(next(&mut rest)),
            src_port: u32::from_le_bytes(next(&mut rest)),
            dst_port: u32::from_le_bytes(next(&mut rest)),
            len: u32::from_le_bytes(next(&mut rest)),
            kind: u16::from_le_bytes(next(&mut rest)),
            op: Op::parse(u16::from_le_bytes(next(&mut rest))),
            flags: u32::from_le_bytes(next(&mut rest)),
            buf_alloc: u32::from_le_bytes(next(&mut rest)),
            fwd_cnt: u32::from_le_bytes(next(&mut rest)),
        }
    }

    #[must_use]
    pub fn bytes(&self) -> [u8; HEADER_BYTES] {
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.number().to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; HEADER_BYTES];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }
}

/// Removes and returns the first `N` bytes. There are always enough, because the fields above add up to the
/// header's size.
fn next<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk::<N>() {
        Some((head, tail)) => {
            *rest = tail;
            *head
        }
        None => [0; N],
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn for_all_bytes_a_header_is_what_they_say(bytes: [u8; 32], more: [u8; HEADER_BYTES - 32]) {
            let mut whole = [0; HEADER_BYTES];
            for (to, from) in whole.iter_mut().zip(bytes.iter().chain(&more)) {
                *to = *from;
            }
            prop_assert_eq!(Header::parse(&whole).bytes(), whole);
        }
    }

    #[test]
    fn a_header_survives_the_round_trip() {
        let mut bytes = [0; HEADER_BYTES];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::try_from(i).unwrap();
        }
        let header = Header::parse(&bytes);
        assert_eq!(header.dst_port, 0x1716_1514);
        assert_eq!(header.op, Op::Unknown(0x1f1e));
        assert_eq!(header.bytes(), bytes);
    }
}
