// SPDX-License-Identifier: Apache-2.0
//! Tar archives: written from lines that people can read, or mended so that a changed header does not end the reading; and
//! what becomes of them.

use std::os::unix::fs::FileExt;

use bulkhead_image::fuzzing::convert;
use tar::{Builder, EntryType, Header};

use crate::places;

const RECORD_BYTES: usize = 512;
const CHECKSUM: std::ops::Range<usize> = 148..156;

/// Writes an archive of lines such as `f dir/file content`. The first letter is the kind of the entry, and up to two words
/// follow: file `f`, directory `d`, symbolic `s` and hard link `h` with their targets, character `c` and block device `b`,
/// pipe `p`, PAX record `x` with key and value, and files of zeroes `z` with their length. Other lines are left out.
#[must_use]
pub fn of_lines(lines: &[u8]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for line in lines.split(|byte| *byte == b'\n') {
        let mut words = line.splitn(3, |byte| *byte == b' ');
        let [kind, name, more] = [(); 3].map(|()| words.next().unwrap_or_default());
        let zeroes = std::str::from_utf8(more)
            .ok()
            .and_then(|text| text.parse::<u16>().ok());
        let zeroes = vec![0; zeroes.unwrap_or(4096).into()];
        let (kind, link, data) = match kind {
            b"f" => (EntryType::Regular, &b""[..], more),
            b"z" => (EntryType::Regular, &b""[..], &zeroes[..]),
            b"d" => (EntryType::Directory, &b""[..], &b""[..]),
            b"s" => (EntryType::Symlink, more, &b""[..]),
            b"h" => (EntryType::Link, more, &b""[..]),
            b"c" => (EntryType::Char, &b""[..], &b""[..]),
            b"b" => (EntryType::Block, &b""[..], &b""[..]),
            b"p" => (EntryType::Fifo, &b""[..], &b""[..]),
            b"x" => {
                let key = String::from_utf8_lossy(name);
                builder
                    .append_pax_extensions([(&*key, more)])
                    .expect("a vector");
                continue;
            }
            _ => continue,
        };
        builder
            .append(&header(kind, name, link, data.len()), data)
            .expect("a vector");
    }
    builder.into_inner().expect("a vector")
}

fn header(kind: EntryType, name: &[u8], link: &[u8], bytes: usize) -> Header {
    let mut header = Header::new_gnu();
    let gnu = header.as_gnu_mut().expect("a GNU header");
    copy(name, &mut gnu.name);
    copy(link, &mut gnu.linkname);
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(7);
    header.set_gid(8);
    header.set_mtime(9);
    header.set_size(bytes as u64);
    header.set_device_major(1).expect("a GNU header");
    header.set_device_minor(3).expect("a GNU header");
    header.set_cksum();
    header
}

fn copy(from: &[u8], to: &mut [u8]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
}

/// Gives each header of an archive the checksum that it should have.
#[must_use]
pub fn mended(archive: &[u8]) -> Vec<u8> {
    let mut archive = archive.to_vec();
    let mut at = 0;
    while let Some(record) = archive.get_mut(at..at + RECORD_BYTES) {
        if record.iter().all(|byte| *byte == 0) {
            break;
        }
        record[CHECKSUM].fill(b' ');
        let sum: u32 = record.iter().map(|byte| u32::from(*byte)).sum();
        copy(format!("{sum:06o}\0 ").as_bytes(), &mut record[CHECKSUM]);
        let mut header = Header::new_old();
        header.as_mut_bytes().copy_from_slice(record);
        let data = header
            .entry_size()
            .ok()
            .and_then(|size| usize::try_from(size).ok());
        let data = data.and_then(|size| size.checked_next_multiple_of(RECORD_BYTES));
        let next = data.and_then(|data| at.checked_add(RECORD_BYTES)?.checked_add(data));
        let Some(next) = next.filter(|next| *next < archive.len()) else {
            break;
        };
        at = next;
    }
    archive
}

/// The file system that becomes of a layer's archive. `None` if the archive is refused.
#[must_use]
pub fn file_system_of(archive: &[u8]) -> Option<Vec<u8>> {
    let file = places::file(&[]);
    convert(archive, file.try_clone().expect("a second descriptor")).ok()?;
    let bytes = file.metadata().expect("its size").len();
    let mut image = vec![0; usize::try_from(bytes).expect("a size")];
    file.read_exact_at(&mut image, 0).expect("a file in memory");
    Some(image)
}
