// SPDX-License-Identifier: Apache-2.0
//! Device-mapper: creates devices with one linear target, over an extent of a disk. The structures are those
//! of `linux/dm-ioctl.h`, version 4.

use std::ffi::c_ulong;
use std::fs::File;
use std::io;

use super::extent::Extent;
use crate::sys;

const HEADER_BYTES: usize = 312;
const TARGET_BYTES: usize = 40;
const READ_ONLY: u32 = 1;
/// If the device is in use, remove it when it is closed for the last time.
const DEFERRED_REMOVE: u32 = 1 << 17;

const DEVICE_CREATE: u8 = 3;
const DEVICE_REMOVE: u8 = 4;
/// Also resumes a device, which activates a loaded table.
const DEVICE_SUSPEND: u8 = 6;
const TABLE_LOAD: u8 = 9;

const AT_VERSION: usize = 0;
const AT_DATA_SIZE: usize = 12;
const AT_DATA_START: usize = 16;
const AT_TARGET_COUNT: usize = 20;
const AT_FLAGS: usize = 28;
const AT_DEVICE: usize = 40;
const AT_NAME: usize = 48;
const NAME_BYTES: usize = 128;

/// Whether a device may be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// The control device of device-mapper.
#[derive(Debug)]
pub struct Control {
    file: File,
}

impl Control {
    pub fn open() -> io::Result<Self> {
        File::options()
            .read(true)
            .write(true)
            .open("/dev/mapper/control")
            .map(|file| Self { file })
    }

    /// Creates `/dev/dm-<minor>` for `extent` of `disk` ("major:minor"). Returns the minor number.
    pub fn create_linear(
        &self,
        name: &str,
        disk: &str,
        extent: Extent,
        access: Access,
    ) -> io::Result<u32> {
        let flags = match access {
            Access::ReadOnly => READ_ONLY,
            Access::ReadWrite => 0,
        };
        let mut request = header(name, 0, flags);
        self.call(DEVICE_CREATE, &mut request)?;
        let minor = minor(&request);
        let loaded = self
            .call(TABLE_LOAD, &mut table(name, disk, extent, flags))
            .and_then(|()| self.call(DEVICE_SUSPEND, &mut header(name, 0, flags)));
        if let Err(e) = loaded {
            let _ = self.remove(name);
            return Err(e);
        }
        Ok(minor)
    }

    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.call(DEVICE_REMOVE, &mut header(name, 0, DEFERRED_REMOVE))
    }

    fn call(&self, command: u8, buffer: &mut [u8]) -> io::Result<()> {
        sys::dm_ioctl(&self.file, request_number(command), buffer)
    }
}

/// `_IOWR(0xfd, command, struct dm_ioctl)`.
fn request_number(command: u8) -> c_ulong {
    (3 << 30) | ((HEADER_BYTES as c_ulong) << 16) | (0xfd << 8) | c_ulong::from(command)
}

fn header(name: &str, payload_bytes: usize, flags: u32) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES + payload_bytes];
    put(&mut bytes, AT_VERSION, &4u32.to_ne_bytes());
    let total = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    put(&mut bytes, AT_DATA_SIZE, &total.to_ne_bytes());
    put(
        &mut bytes,
        AT_DATA_START,
        &u32::try_from(HEADER_BYTES).unwrap_or(0).to_ne_bytes(),
    );
    put(&mut bytes, AT_FLAGS, &flags.to_ne_bytes());
    // Leave one byte for the terminating NUL.
    put(
        &mut bytes,
        AT_NAME,
        &name.as_bytes()[..name.len().min(NAME_BYTES - 1)],
    );
    bytes
}

fn table(name: &str, disk: &str, extent: Extent, flags: u32) -> Vec<u8> {
    let parameters = format!("{disk} {}\0", extent.first_sector());
    let target_bytes = (TARGET_BYTES + parameters.len()).next_multiple_of(8);
    let mut bytes = header(name, target_bytes, flags);
    put(&mut bytes, AT_TARGET_COUNT, &1u32.to_ne_bytes());
    // dm_target_spec has start, length, status, next, type[16]. The parameters follow it.
    put(
        &mut bytes,
        HEADER_BYTES + 8,
        &extent.sectors().to_ne_bytes(),
    );
    put(
        &mut bytes,
        HEADER_BYTES + 20,
        &u32::try_from(target_bytes).unwrap_or(0).to_ne_bytes(),
    );
    put(&mut bytes, HEADER_BYTES + 24, b"linear");
    put(
        &mut bytes,
        HEADER_BYTES + TARGET_BYTES,
        parameters.as_bytes(),
    );
    bytes
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

/// The minor number in the kernel's reply (`huge_encode_dev`).
fn minor(answer: &[u8]) -> u32 {
    let field = answer
        .get(AT_DEVICE..AT_DEVICE + 4)
        .and_then(|b| <[u8; 4]>::try_from(b).ok());
    let device = field.map_or(0, u32::from_ne_bytes);
    (device & 0xff) | ((device >> 12) & !0xff)
}

#[cfg(test)]
mod tests {
    use super::{AT_DEVICE, Extent, READ_ONLY, header, minor, request_number, table};
    use bulkhead_proto::agent as proto;

    #[test]
    fn requests_have_the_layout_of_dm_ioctl_h() {
        assert_eq!(request_number(3), 0xc138_fd03);
        let bytes = header("layer", 0, 1);
        assert_eq!(bytes.len(), 312);
        assert_eq!(bytes[..4], [4, 0, 0, 0]);
        assert_eq!(bytes[12..20], [56, 1, 0, 0, 56, 1, 0, 0]);
        assert_eq!(bytes[28..32], [1, 0, 0, 0]);
        assert_eq!(&bytes[48..54], b"layer\0");
        assert_eq!(header(&"x".repeat(500), 0, 0)[175], 0);
    }

    #[test]
    fn a_table_is_one_target_and_its_parameters() {
        let extent = proto::Extent {
            first_sector: 8,
            sectors: 0x1234,
        };
        let extent = Extent::try_from(extent).unwrap();
        let bytes = table("layer", "254:0", extent, READ_ONLY);
        assert_eq!(bytes.len(), 312 + 48);
        assert_eq!(bytes[20..24], [1, 0, 0, 0]);
        assert_eq!(bytes[28..32], [1, 0, 0, 0]);
        let target = &bytes[312..];
        assert_eq!(target[..8], [0; 8]);
        assert_eq!(target[8..16], [0x34, 0x12, 0, 0, 0, 0, 0, 0]);
        assert_eq!(target[20..24], [48, 0, 0, 0]);
        assert_eq!(&target[24..31], b"linear\0");
        assert_eq!(&target[40..], b"254:0 8\0");
    }

    #[test]
    fn minors_over_255_are_split_in_the_device_number() {
        let mut answer = vec![0; 312];
        let device: u32 = (253 << 8) | 0x12 | (0x345 << 20);
        answer[AT_DEVICE..AT_DEVICE + 4].copy_from_slice(&device.to_ne_bytes());
        assert_eq!(minor(&answer), 0x34512);
    }
}
