// SPDX-License-Identifier: Apache-2.0
//! What an archive says about a file before the file's own header, because the header has no space for it: long names
//! and PAX records. Pure.

use std::collections::BTreeMap;

use super::sparse;
use crate::layer::erofs::xattr;

/// The limit is Linux's `XATTR_LIST_MAX`. Linux applies it to the names only; we count the values, too.
const MAX_XATTR_BYTES: usize = 64 << 10;
/// What an attribute counts besides its name and its value.
const XATTR_ENTRY_BYTES: usize = 8;
const XATTR_KEY: &str = "SCHILY.xattr.";
const SPARSE_KEY: &str = "GNU.sparse.";
/// Prefixes of overlayfs's own attributes. An image must not set them, so they are left out.
const OVERLAY_PREFIXES: [&[u8]; 2] = [b"trusted.overlay.", b"user.overlay."];

/// What long names and PAX records say about the entry that follows them.
#[derive(Debug, Default)]
pub struct Extensions {
    pub path: Option<Vec<u8>>,
    pub link: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<u64>,
    pub gid: Option<u64>,
    pub mtime: Option<(i64, u32)>,
    pub xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
    /// What all attributes took that were told, also those that a later one replaced.
    xattr_bytes: usize,
    pub sparse: Option<sparse::Records>,
}

impl Extensions {
    /// Parses records of the form `LENGTH KEY=VALUE\n` (POSIX pax, "Extended Header"). The error is the name of the
    /// field that is not valid.
    pub fn parse_pax(&mut self, mut records: &[u8]) -> Result<(), &'static str> {
        while !records.is_empty() {
            let blank = records
                .iter()
                .position(|byte| *byte == b' ')
                .ok_or("length")?;
            let length: usize = number(&records[..blank]).ok_or("length")?;
            let record = records.get(blank + 1..length).ok_or("length")?;
            records = records.get(length..).unwrap_or_default();
            let record = record.strip_suffix(b"\n").ok_or("length")?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or("key")?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            let key = std::str::from_utf8(key).map_err(|_| "key")?;
            match key {
                "path" => self.path = Some(value.to_vec()),
                "linkpath" => self.link = Some(value.to_vec()),
                "size" => self.size = Some(number(value).ok_or("size")?),
                "uid" => self.uid = Some(number(value).ok_or("uid")?),
                "gid" => self.gid = Some(number(value).ok_or("gid")?),
                "mtime" => self.mtime = Some(time(value).ok_or("mtime")?),
                _ => {
                    if let Some(key) = key.strip_prefix(SPARSE_KEY) {
                        let records = self.sparse.get_or_insert_default();
                        records.take(key, value).ok_or("sparse map")?;
                    }
                    if let Some(name) = key.strip_prefix(XATTR_KEY) {
                        self.add_xattr(name.as_bytes(), value).ok_or("xattr")?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Adds an attribute, unless it belongs to overlayfs or EROFS cannot store it. `None` if there are too many.
    fn add_xattr(&mut self, name: &[u8], value: &[u8]) -> Option<()> {
        if OVERLAY_PREFIXES
            .iter()
            .any(|prefix| name.starts_with(prefix))
            || !xattr::is_storable(name, value)
        {
            return Some(());
        }
        self.xattr_bytes += XATTR_ENTRY_BYTES + name.len() + value.len();
        if self.xattr_bytes > MAX_XATTR_BYTES {
            return None;
        }
        self.xattrs.insert(name.into(), value.into());
        Some(())
    }
}

/// A long name without the NULs after its end.
pub fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

fn number<T: std::str::FromStr>(bytes: &[u8]) -> Option<T> {
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

/// Parses decimal seconds with a fraction, which may be negative. Rounds down to nanoseconds.
fn time(bytes: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(bytes).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds));
    }
    Some((seconds, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &str) -> Vec<u8> {
        let rest = format!(" {key}={value}\n");
        let length = (1..)
            .find(|digits| (rest.len() + digits).to_string().len() == *digits)
            .unwrap();
        format!("{}{rest}", rest.len() + length).into_bytes()
    }

    #[test]
    fn each_attribute_counts_once_as_often_as_it_is_told() {
        let one = record("SCHILY.xattr.user.x", &"v".repeat(92));
        let costs = XATTR_ENTRY_BYTES + "user.x".len() + 92;
        let most = MAX_XATTR_BYTES / costs;
        let mut extensions = Extensions::default();
        extensions.parse_pax(&one.repeat(most)).unwrap();
        assert_eq!(extensions.xattrs.len(), 1);
        assert_eq!(extensions.xattr_bytes, most * costs);
        assert_eq!(extensions.parse_pax(&one), Err("xattr"));
    }
}
