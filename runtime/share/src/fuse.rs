// SPDX-License-Identifier: Apache-2.0
//! What crosses the socket between a VMM and its file server: FUSE messages, whole and one after the other, each
//! beginning with its length. Both ends bound and check them by these numbers. Pure.

/// `struct fuse_in_header` of FUSE 7, in bytes.
pub const REQUEST_HEADER: usize = 40;
/// `struct fuse_out_header` of FUSE 7, in bytes.
pub const REPLY_HEADER: usize = 16;
/// The longest message: a MiB of data and a page of headers, as the server agrees with the driver.
pub const MOST_BYTES: usize = (1 << 20) + 4096;

/// Requests that have no reply (FUSE_FORGET, FUSE_INTERRUPT, FUSE_BATCH_FORGET).
pub const UNANSWERED: [u32; 3] = [2, 36, 42];

/// `struct fuse_out_header`: the length of the whole reply, an error number (negative, or 0), the request's number.
#[must_use]
pub fn reply_header(len: u32, error: i32, unique: u64) -> [u8; REPLY_HEADER] {
    let mut bytes = [0; REPLY_HEADER];
    let parts = len
        .to_le_bytes()
        .into_iter()
        .chain(error.to_le_bytes())
        .chain(unique.to_le_bytes());
    for (to, from) in bytes.iter_mut().zip(parts) {
        *to = from;
    }
    bytes
}

/// A whole reply that says no more than the error `errno`.
#[must_use]
pub fn failure(unique: u64, errno: i32) -> [u8; REPLY_HEADER] {
    reply_header(16, errno.wrapping_neg(), unique)
}
