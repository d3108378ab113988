// SPDX-License-Identifier: Apache-2.0
//! The headers of an archive, one record each, and the empty record at its end.

use std::io::{self, Read};

use tar::Header;

use super::{RECORD_BYTES, TarError};

/// Reads the next header. `None` at the end mark or at the end of the bytes.
pub fn read_header(archive: &mut impl Read) -> Result<Option<Header>, TarError> {
    let mut header = Header::new_old();
    let bytes = header.as_mut_bytes();
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match archive.read(rest) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(TarError::Truncated),
            Ok(count) => filled += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(TarError::Read(e)),
        }
    }
    if is_end(bytes) {
        return Ok(None);
    }
    if !has_checksum(&header) {
        return Err(TarError::Checksum);
    }
    Ok(Some(header))
}

/// Whether an archive may begin with `record`: with a header or with the end mark.
pub fn begins_with(record: &[u8]) -> bool {
    let mut header = Header::new_old();
    let bytes = header.as_mut_bytes();
    if record.len() != bytes.len() {
        return false;
    }
    bytes.copy_from_slice(record);
    is_end(record) || has_checksum(&header)
}

fn is_end(record: &[u8]) -> bool {
    record.iter().all(|byte| *byte == 0)
}

fn has_checksum(header: &Header) -> bool {
    let bytes = header.as_bytes();
    // For the checksum, its own field counts as blanks.
    let sum = |from, to| -> u32 {
        let part = bytes.get(from..to).unwrap_or_default();
        part.iter().map(|byte| u32::from(*byte)).sum()
    };
    let sum = sum(0, 148) + 8 * u32::from(b' ') + sum(156, RECORD_BYTES);
    header.cksum().ok() == Some(sum)
}
