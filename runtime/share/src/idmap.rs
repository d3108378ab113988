// SPDX-License-Identifier: Apache-2.0
//! Idmapped mounts in the guest (`FUSE_ALLOW_IDMAP`, Linux 6.12): the guest's kernel shows other owners of files
//! than the server reports. The server agrees to this at the start of the session. fuse-backend-rs does not know it, so
//! this file adds it to the library's reply. Pure.
//!
//! The server does not see the mappings: it receives and sends the host's user and group ids. One thing changes for it:
//! only requests that create a file have a user and a group in their headers (checked in [`super::tree`]); all others
//! have [`NOBODY`]. The guest's kernel checks permissions, as it does without idmapped mounts.

/// The opcode FUSE_INIT.
pub const INIT: u32 = 26;
/// `FUSE_INVALID_UIDGID`.
pub const NOBODY: u32 = u32::MAX;

/// The size of `struct fuse_in_header` and of `fuse_init_in` up to the second word of flags.
pub const REQUEST_BYTES: usize = 40 + 20;
/// The size of `struct fuse_out_header` and of `fuse_init_out` up to the second word of flags.
pub const REPLY_BYTES: usize = 16 + 36;

const REQUEST_FLAGS: usize = 40 + 12;
const REQUEST_FLAGS2: usize = 40 + 16;
const REPLY_ERROR: usize = 4;
const REPLY_FLAGS: usize = 16 + 12;
const REPLY_FLAGS2: usize = 16 + 32;

/// The flag that says that there is a second word of flags.
const INIT_EXT: u32 = 1 << 30;
/// Bit 40 of all flags, which is bit 8 of the second word.
const ALLOW_IDMAP: u32 = 1 << 8;

/// Agrees to idmapped mounts in the reply to an INIT request, if the request offers them.
pub fn agree(request: &[u8; REQUEST_BYTES], reply: &mut [u8; REPLY_BYTES]) {
    let offered = word(request, REQUEST_FLAGS) & INIT_EXT != 0
        && word(request, REQUEST_FLAGS2) & ALLOW_IDMAP != 0;
    if offered && word(reply, REPLY_ERROR) == 0 {
        add(reply, REPLY_FLAGS, INIT_EXT);
        add(reply, REPLY_FLAGS2, ALLOW_IDMAP);
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let found = bytes.get(at..).and_then(<[u8]>::first_chunk);
    found.map_or(0, |word| u32::from_le_bytes(*word))
}

fn add(bytes: &mut [u8], at: usize, bits: u32) {
    let found = bytes.get_mut(at..).and_then(<[u8]>::first_chunk_mut);
    if let Some(word) = found {
        *word = (u32::from_le_bytes(*word) | bits).to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idmapped_mounts_are_agreed_to_where_they_are_offered_and_nothing_failed() {
        let other = 1 << 5;
        for (flags, flags2, error, agreed) in [
            (INIT_EXT, ALLOW_IDMAP, 0, true),
            (INIT_EXT, u32::MAX, 0, true),
            (INIT_EXT, !ALLOW_IDMAP, 0, false),
            (!INIT_EXT, ALLOW_IDMAP, 0, false),
            (INIT_EXT, ALLOW_IDMAP, libc::EPROTO, false),
        ] {
            let mut request = [0; REQUEST_BYTES];
            add(&mut request, REQUEST_FLAGS, flags);
            add(&mut request, REQUEST_FLAGS2, flags2);
            let mut reply = [0; REPLY_BYTES];
            add(&mut reply, REPLY_ERROR, error.unsigned_abs());
            add(&mut reply, REPLY_FLAGS, other);
            agree(&request, &mut reply);
            let found = (word(&reply, REPLY_FLAGS), word(&reply, REPLY_FLAGS2));
            let expected = match agreed {
                true => (other | INIT_EXT, ALLOW_IDMAP),
                false => (other, 0),
            };
            assert_eq!(found, expected, "{flags:x} {flags2:x} {error}");
        }
    }
}
