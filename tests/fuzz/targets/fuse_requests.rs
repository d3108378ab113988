// SPDX-License-Identifier: Apache-2.0
//! Requests of a guest to the file server, which works on real files below a directory.
//!
//! Each gets one well-formed reply, or none if it has none. What the guest does stays in the shares.
#![no_main]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use bulkhead_fuzz::input::Input;
use bulkhead_fuzz::places::directory;
use bulkhead_share::fuse::{REPLY_HEADER, REQUEST_HEADER, UNANSWERED};
use bulkhead_share::fuzzing::FileServer;

const NUMBER: u64 = 4711;
const INIT: u32 = 26;
const MOST_STEPS: usize = 64;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let root = directory().join("shares");
    remove(&root);
    for name in ["p1", "p2"] {
        fs::create_dir_all(root.join(name)).expect("a share");
    }
    let outside = directory().join("outside");
    fs::write(&outside, "outside").expect("a file outside");
    fs::write(root.join("p1/file"), "inside").expect("a file inside");
    let mut server = FileServer::new(&root).expect("a server");
    let words = [7u32, 36, 1 << 20, !(1 << 30)].map(u32::to_le_bytes);
    ask(&mut server, INIT, 0, words.as_flattened());
    let mut input = Input::new(bytes);
    for _ in 0..MOST_STEPS {
        if input.is_empty() {
            break;
        }
        let opcode = input.below(64).into();
        // The root, the root of a share, a node that a lookup may have found, or any.
        let node = match input.below(8) {
            0 => 1,
            share @ 1..3 => u64::from(share) << 48 | 1,
            share @ 3..5 => u64::from(share - 2) << 48 | u64::from(input.byte()),
            5 => 1 << 48 | 2,
            6 => 1 << 48 | 3,
            _ => input.u64(),
        };
        let body = input.short();
        ask(&mut server, opcode, node, body);
    }
    let mut names: Vec<_> = fs::read_dir(&root)
        .expect("the shares")
        .map(|entry| entry.expect("a share").file_name())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["p1", "p2"], "nothing is made beside the shares");
    assert_eq!(fs::read(&outside).expect("it is there"), b"outside");
});

/// Removes a directory, whatever modes the guest gave to what is in it.
fn remove(directory: &Path) {
    let _ = fs::set_permissions(directory, Permissions::from_mode(0o700));
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    let _ = fs::remove_dir_all(directory);
}

fn ask(server: &mut FileServer, opcode: u32, node: u64, body: &[u8]) {
    let len = u32::try_from(REQUEST_HEADER + body.len()).expect("a length");
    let header = [
        &len.to_le_bytes()[..],
        &opcode.to_le_bytes(),
        &NUMBER.to_le_bytes(),
        &node.to_le_bytes(),
        // Uid, gid and pid of the caller are 0.
        &[0; 16],
    ];
    let request = [&header.concat(), body].concat();
    let reply = server.answer(&request).expect("a worker that goes on");
    assert_eq!(
        reply.is_none(),
        UNANSWERED.contains(&opcode),
        "opcode {opcode}"
    );
    let Some(reply) = reply else {
        return;
    };
    assert!(reply.len() >= REPLY_HEADER);
    assert_eq!(
        reply[..4],
        u32::try_from(reply.len()).expect("a length").to_le_bytes()
    );
    assert_eq!(reply[8..16], NUMBER.to_le_bytes());
    let error = i32::from_le_bytes(reply[4..8].try_into().expect("four bytes"));
    assert!((-4095..=0).contains(&error), "error {error}");
}
