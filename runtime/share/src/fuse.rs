// SPDX-License-Identifier: Apache-2.0
//! The protocol on the socket between a VMM and its file server: whole FUSE messages, one after the other. Each begins
//! with its length. Both ends check messages by the numbers in this file. Pure.

/// The size of `struct fuse_in_header` of FUSE 7.
pub const REQUEST_HEADER: usize = 40;
/// The size of `struct fuse_out_header` of FUSE 7.
pub const REPLY_HEADER: usize = 16;
/// The longest message: 1 MiB of data, which server and driver agree on, and a page for headers.
pub const MOST_BYTES: usize = (1 << 20) + 4096;

/// Requests that have no reply (FUSE_FORGET, FUSE_INTERRUPT, FUSE_BATCH_FORGET).
pub const UNANSWERED: [u32; 3] = [2, 36, 42];

/// Builds a `struct fuse_out_header`: length of the whole reply, error number (negative or 0), number of the request.
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

/// Builds a reply that consists of the error `errno` alone.
#[must_use]
pub fn failure(unique: u64, errno: i32) -> [u8; REPLY_HEADER] {
    reply_header(16, errno.wrapping_neg(), unique)
}
