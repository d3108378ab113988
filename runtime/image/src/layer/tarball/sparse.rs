// SPDX-License-Identifier: Apache-2.0
//! Sparse files, in the four forms of GNU tar (its manual, "Storing Sparse Files"): an entry of type `S` with the map in
//! the header, and PAX records with the map in them (0.0, 0.1) or before the data (1.0). Holes stay holes.

use std::io::{self, Read};

use tar::{GnuExtSparseHeader, GnuSparseHeader, Header};

use super::{RECORD_BYTES, TarError, copy_part, padded, show, skip};
use crate::layer::blocks::BlockWriter;

/// The most parts of data of one file. The map of all parts is in memory while the file is written.
const MAX_PARTS: usize = 1 << 18;
/// The most digits of a number in a map before the data.
const MAX_DIGITS: usize = 20;

/// What the PAX records of an entry say.
#[derive(Debug, Default)]
pub struct Records {
    pub name: Option<Vec<u8>>,
    pub real_bytes: Option<u64>,
    /// Offsets and lengths in turn.
    pub numbers: Vec<u64>,
    /// Whether the map is before the data (1.0).
    pub map_is_data: bool,
}

impl Records {
    /// Takes the record `GNU.sparse.<key>`. `None` if its value is not valid or of an unknown version.
    pub fn take(&mut self, key: &str, value: &[u8]) -> Option<()> {
        if key == "name" {
            self.name = Some(value.to_vec());
            return Some(());
        }
        match (key, std::str::from_utf8(value).ok()) {
            ("major", Some("0")) | ("minor", Some("0" | "1")) | ("numblocks", Some(_)) => {}
            ("major", Some("1")) => self.map_is_data = true,
            ("size" | "realsize", Some(value)) => self.real_bytes = Some(value.parse().ok()?),
            ("offset", Some(value)) if self.numbers.len().is_multiple_of(2) => {
                self.numbers.push(value.parse().ok()?);
            }
            ("numbytes", Some(value)) if !self.numbers.len().is_multiple_of(2) => {
                self.numbers.push(value.parse().ok()?);
            }
            ("map", Some(value)) => {
                let numbers = value.split(',').filter(|number| !number.is_empty());
                self.numbers = numbers.map(str::parse).collect::<Result<_, _>>().ok()?;
            }
            _ => return None,
        }
        Some(())
    }
}

/// Where the data of a file are. The rest is zeroes.
#[derive(Debug, PartialEq, Eq)]
pub struct Map {
    /// Offset and length, in order.
    parts: Vec<(u64, u64)>,
    pub real_bytes: u64,
    /// How many bytes the archive has for the data, without the map.
    pub data_bytes: u64,
}

impl Map {
    /// The map of an entry of type `S`. The archive must be behind its header, and is then at its data.
    pub fn of_header(header: &Header, archive: &mut impl Read) -> Result<Self, TarError> {
        let wrong = |_: io::Error| field(header, "sparse map");
        let gnu = header.as_gnu();
        let gnu = gnu.ok_or_else(|| field(header, "sparse map"))?;
        let mut numbers = Vec::new();
        let mut add = |entries: &[GnuSparseHeader]| -> Result<(), TarError> {
            for entry in entries.iter().filter(|entry| !entry.is_empty()) {
                numbers.push(entry.offset().map_err(wrong)?);
                numbers.push(entry.length().map_err(wrong)?);
            }
            match numbers.len() > 2 * MAX_PARTS {
                true => Err(field(header, "sparse map")),
                false => Ok(()),
            }
        };
        add(&gnu.sparse)?;
        let mut is_extended = gnu.is_extended();
        while is_extended {
            let mut more = GnuExtSparseHeader::new();
            archive
                .read_exact(more.as_mut_bytes())
                .map_err(TarError::Read)?;
            add(more.sparse())?;
            is_extended = more.is_extended();
        }
        let data_bytes = header.entry_size().map_err(wrong)?;
        let real_bytes = gnu.real_size().map_err(wrong)?;
        Self::new(&numbers, real_bytes, data_bytes).ok_or_else(|| field(header, "sparse map"))
    }

    /// The map of an entry with PAX records, which has `bytes` in the archive. The archive is then at the data.
    pub fn of_records(
        path: &[u8],
        records: &Records,
        bytes: u64,
        archive: &mut impl Read,
    ) -> Result<Self, TarError> {
        let wrong = || TarError::Field {
            path: show(path),
            field: "sparse map",
        };
        let real_bytes = records.real_bytes.ok_or_else(wrong)?;
        if !records.map_is_data {
            return Self::new(&records.numbers, real_bytes, bytes).ok_or_else(wrong);
        }
        let mut text = Numbers {
            archive: archive.take(bytes),
            read_bytes: 0,
        };
        let count = text.next()?.and_then(|count| usize::try_from(count).ok());
        let count = count.filter(|count| *count <= MAX_PARTS);
        let mut numbers = Vec::new();
        for _ in 0..2 * count.ok_or_else(wrong)? {
            numbers.push(text.next()?.ok_or_else(wrong)?);
        }
        let map_bytes = padded(text.read_bytes)
            .filter(|map_bytes| *map_bytes <= bytes)
            .ok_or_else(wrong)?;
        let rest = map_bytes - text.read_bytes;
        skip(archive, rest)?;
        Self::new(&numbers, real_bytes, bytes - map_bytes).ok_or_else(wrong)
    }

    /// `None` if the parts overlap, are not in order, are outside of the file or are not all of the data.
    fn new(numbers: &[u64], real_bytes: u64, data_bytes: u64) -> Option<Self> {
        let (pairs, rest) = numbers.as_chunks::<2>();
        if !rest.is_empty() || pairs.len() > MAX_PARTS {
            return None;
        }
        let (mut end, mut sum) = (0u64, 0u64);
        for [offset, bytes] in pairs {
            if *offset < end {
                return None;
            }
            end = offset.checked_add(*bytes)?;
            sum = sum.checked_add(*bytes)?;
        }
        (end <= real_bytes && sum == data_bytes).then(|| Self {
            parts: pairs
                .iter()
                .map(|[offset, bytes]| (*offset, *bytes))
                .collect(),
            real_bytes,
            data_bytes,
        })
    }

    /// Copies the data to where they belong. Afterwards the archive is at the next header.
    pub fn copy_data(
        &self,
        archive: &mut impl Read,
        blocks: &mut BlockWriter,
    ) -> Result<(), TarError> {
        let padded = padded(self.data_bytes).ok_or(TarError::Truncated)?;
        let mut at = 0;
        for (offset, bytes) in &self.parts {
            blocks.hole(offset - at).map_err(TarError::Write)?;
            copy_part(archive, *bytes, blocks)?;
            at = offset + bytes;
        }
        blocks.hole(self.real_bytes - at).map_err(TarError::Write)?;
        blocks.pad();
        skip(archive, padded - self.data_bytes)
    }
}

fn field(header: &Header, field: &'static str) -> TarError {
    TarError::Field {
        path: show(&header.path_bytes()),
        field,
    }
}

/// Decimal numbers, each with a line end.
struct Numbers<R> {
    archive: R,
    read_bytes: u64,
}

impl<R: Read> Numbers<R> {
    /// `None` if what comes is not a number.
    fn next(&mut self) -> Result<Option<u64>, TarError> {
        let mut text = String::new();
        loop {
            let mut byte = [0];
            self.archive
                .read_exact(&mut byte)
                .map_err(|error| match error.kind() {
                    io::ErrorKind::UnexpectedEof => TarError::Truncated,
                    _ => TarError::Read(error),
                })?;
            self.read_bytes += 1;
            match byte {
                [b'\n'] => return Ok(text.parse().ok()),
                [digit @ b'0'..=b'9'] if text.len() < MAX_DIGITS => text.push(digit.into()),
                _ => return Ok(None),
            }
        }
    }
}

const _: () = assert!(
    size_of::<GnuExtSparseHeader>() == RECORD_BYTES,
    "a map goes on in whole records"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_has_all_data_in_order_and_inside_the_file() {
        for (numbers, real_bytes, data_bytes, is_good) in [
            (&[][..], 0, 0, true),
            (&[], 5 << 30, 0, true),
            (&[0, 4, 8, 2], 10, 6, true),
            (&[0, 4, 4, 2], 6, 6, true),
            (&[10, 0], 10, 0, true),
            (&[0, 4, 3, 2], 10, 6, false),
            (&[8, 2, 0, 4], 10, 6, false),
            (&[0, 4, 8, 2], 9, 6, false),
            (&[0, 4, 8, 2], 10, 7, false),
            (&[0, 4, 8], 10, 4, false),
            (&[u64::MAX, 2], u64::MAX, 2, false),
            (&[0, u64::MAX, u64::MAX, u64::MAX], u64::MAX, 0, false),
        ] {
            let map = Map::new(numbers, real_bytes, data_bytes);
            assert_eq!(
                map.is_some(),
                is_good,
                "{numbers:?} {real_bytes} {data_bytes}"
            );
        }
    }

    #[test]
    fn records_of_each_version_are_understood() {
        let records = |list: &[(&str, &str)]| {
            let mut records = Records::default();
            let mut list = list.iter();
            let taken = list.try_for_each(|(key, value)| records.take(key, value.as_bytes()));
            taken.map(|()| records)
        };
        let old = [
            ("size", "9"),
            ("numblocks", "1"),
            ("offset", "3"),
            ("numbytes", "2"),
        ];
        assert_eq!(records(&old).unwrap().numbers, [3, 2]);
        let newer = records(&[("size", "9"), ("map", "3,2")]).unwrap();
        assert_eq!((newer.numbers, newer.real_bytes), (vec![3, 2], Some(9)));
        let newest = records(&[("major", "1"), ("minor", "0"), ("realsize", "9")]).unwrap();
        assert!(newest.map_is_data);
        for bad in [
            ("major", "2"),
            ("minor", "7"),
            ("map", "1,x"),
            ("size", "-1"),
            ("numbytes", "1"),
            ("what", "1"),
        ] {
            assert!(records(&[bad]).is_none(), "{bad:?}");
        }
    }
}
