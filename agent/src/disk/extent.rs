// SPDX-License-Identifier: Apache-2.0
//! A part of a disk, as the host names it in a request. Pure.

use std::fmt;

use bulkhead_proto::agent as proto;

/// Consecutive sectors of 512 bytes: at least one, and their end does not overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    first_sector: u64,
    sectors: u64,
}

/// The host's request named an extent that no disk can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("an extent of {sectors} sectors at {first_sector} is empty or too large")]
pub struct BadExtent {
    first_sector: u64,
    sectors: u64,
}

impl Extent {
    pub fn first_sector(self) -> u64 {
        self.first_sector
    }

    pub fn sectors(self) -> u64 {
        self.sectors
    }

    /// The sector after the last one.
    pub fn end(self) -> u64 {
        self.first_sector + self.sectors
    }
}

impl TryFrom<proto::Extent> for Extent {
    type Error = BadExtent;

    fn try_from(given: proto::Extent) -> Result<Self, BadExtent> {
        let proto::Extent {
            first_sector,
            sectors,
        } = given;
        if sectors == 0 || first_sector.checked_add(sectors).is_none() {
            return Err(BadExtent {
                first_sector,
                sectors,
            });
        }
        Ok(Self {
            first_sector,
            sectors,
        })
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} sectors at {}", self.sectors, self.first_sector)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_has_sectors_and_an_end() {
        let extent = |first_sector, sectors| {
            Extent::try_from(proto::Extent {
                first_sector,
                sectors,
            })
        };
        assert_eq!(extent(8, 16).map(Extent::end), Ok(24));
        assert_eq!(extent(u64::MAX - 1, 1).map(Extent::end), Ok(u64::MAX));
        for (first_sector, sectors) in [(0, 0), (8, 0), (u64::MAX, 1), (1, u64::MAX)] {
            let refused = extent(first_sector, sectors).unwrap_err();
            assert_eq!(
                refused,
                BadExtent {
                    first_sector,
                    sectors
                }
            );
        }
    }
}
