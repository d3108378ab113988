// SPDX-License-Identifier: Apache-2.0
//! One worker without threads: requests in, replies out.

use proptest::prelude::*;

use super::*;
use crate::tree::tests::tree;

const LOOKUP: u32 = 1;
const INIT: u32 = 26;
const ROOT: u64 = 1;

fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(REQUEST_HEADER + body.len()).unwrap();
    let mut bytes = vec![0; REQUEST_HEADER];
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
    bytes[8..16].copy_from_slice(&4711u64.to_le_bytes());
    bytes[16..24].copy_from_slice(&node.to_le_bytes());
    [&bytes, body].concat()
}

fn init() -> Vec<u8> {
    // Version 7.36, read-ahead, and all flags of the first word except the one that announces a second word.
    let words = [7u32, 36, 1 << 20, !(1 << 30)].map(u32::to_le_bytes);
    request(INIT, 0, words.as_flattened())
}

/// INIT as Linux 6.12 sends it: with a second word of flags, which offers idmapped mounts.
fn init_of_612() -> Vec<u8> {
    let mut words = [0u32; 16];
    words[..5].copy_from_slice(&[7, 41, 1 << 20, 1 << 30, 1 << 8]);
    request(INIT, 0, words.map(u32::to_le_bytes).as_flattened())
}

/// The server's answer to a request. `None` means that there is no reply.
fn answer<F: FileSystem + Sync>(
    desk: &mut Desk,
    server: &Server<F>,
    bytes: &[u8],
) -> Option<Vec<u8>> {
    desk.answer(server, bytes).unwrap()
}

fn error_of(reply: &[u8]) -> i32 {
    i32::from_le_bytes(reply[4..8].try_into().unwrap())
}

#[test]
fn a_session_begins_and_a_share_is_found() {
    let (_directory, tree) = tree();
    let server = Server::new(Arc::new(tree));
    let mut desk = Desk::new().unwrap();
    let reply = answer(&mut desk, &server, &init()).unwrap();
    assert_eq!(error_of(&reply), 0);
    let reply = answer(&mut desk, &server, &request(LOOKUP, ROOT, b"p1\0")).unwrap();
    assert_eq!(error_of(&reply), 0);
    assert_eq!(reply[16..24], (1u64 << 48 | 1).to_le_bytes());
    let reply = answer(&mut desk, &server, &request(LOOKUP, ROOT, b"p7\0")).unwrap();
    assert_eq!(error_of(&reply), -libc::ENOENT);
    let forget = request(UNANSWERED[0], 1 << 48 | 1, &[1; 8]);
    assert_eq!(answer(&mut desk, &server, &forget), None);
}

#[test]
fn idmapped_mounts_are_agreed_to_and_a_file_is_made_for_somebody_or_not_at_all() {
    let (directory, tree) = tree();
    let server = Server::new(Arc::new(tree));
    let mut desk = Desk::new().unwrap();
    let flags = |reply: &[u8]| (reply[31] & 0x40, reply[16 + 33]);
    let reply = answer(&mut desk, &server, &init_of_612()).unwrap();
    assert_eq!((error_of(&reply), flags(&reply)), (0, (0x40, 1)));
    let reply = answer(&mut desk, &server, &init()).unwrap();
    assert_eq!((error_of(&reply), flags(&reply)), (0, (0, 0)));

    let share = 1u64 << 48 | 1;
    // With idmapped mounts, requests that create no file come with these ids.
    let by = |mut bytes: Vec<u8>, uid: u32, gid: u32| {
        bytes[24..28].copy_from_slice(&uid.to_le_bytes());
        bytes[28..32].copy_from_slice(&gid.to_le_bytes());
        bytes
    };
    let lookup = by(request(LOOKUP, ROOT, b"p1\0"), u32::MAX, u32::MAX);
    assert_eq!(error_of(&answer(&mut desk, &server, &lookup).unwrap()), 0);
    let me = rustix::process::geteuid().as_raw();
    let mut mkdir = |uid, gid| {
        let body = [&0o755u32.to_le_bytes()[..], &[0; 4], b"made\0"].concat();
        let reply = answer(&mut desk, &server, &by(request(9, share, &body), uid, gid));
        error_of(&reply.unwrap())
    };
    for (uid, gid) in [(u32::MAX, u32::MAX), (u32::MAX, 0), (0, u32::MAX)] {
        assert_eq!(mkdir(uid, gid), -libc::EOVERFLOW, "{uid} {gid}");
    }
    assert!(!directory.path().join("p1/made").exists());
    assert_eq!(mkdir(me, rustix::process::getegid().as_raw()), 0);
    assert!(directory.path().join("p1/made").is_dir());
}

#[test]
fn a_message_goes_through_the_socket_both_ways_and_the_end_is_seen() {
    let (_directory, tree) = tree();
    let server = Server::new(Arc::new(tree));
    let mut desk = Desk::new().unwrap();
    let (mut vmm, ours) = UnixStream::pair().unwrap();
    let line = Line {
        input: Mutex::new(ours.try_clone().unwrap()),
        output: Mutex::new(ours),
    };
    use std::io::{Read, Write};
    vmm.write_all(&request(LOOKUP, ROOT, b"p7\0")).unwrap();
    turn(&line, &server, &mut desk).unwrap();
    let mut reply = [0; REPLY_HEADER];
    vmm.read_exact(&mut reply).unwrap();
    assert_eq!(reply, failure(4711, libc::ENOENT));
    // More than a socket's buffer holds, so it arrives in pieces.
    let large = request(LOOKUP, ROOT, &vec![b'x'; 1 << 20]);
    let mut sender = vmm.try_clone().unwrap();
    let sending = std::thread::spawn(move || sender.write_all(&large).unwrap());
    turn(&line, &server, &mut desk).unwrap();
    sending.join().unwrap();
    vmm.read_exact(&mut reply).unwrap();
    assert_eq!(reply, failure(4711, libc::EINVAL));
    vmm.write_all(&39u32.to_le_bytes()).unwrap();
    let end = turn(&line, &server, &mut desk).unwrap_err();
    assert!(end.to_string().contains("39 bytes"), "{end}");
    drop(vmm);
    let end = turn(&line, &server, &mut desk).unwrap_err();
    assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
}

proptest! {
    /// Whatever the guest sends, there is one well-formed reply, or none for requests that have none.
    #[test]
    fn no_message_breaks_the_server(
        messages in proptest::collection::vec(
            (0u32..50, prop_oneof![Just(ROOT), Just(1u64 << 48 | 1), Just(1u64 << 48 | 2), any::<u64>()],
                prop_oneof![
                    proptest::collection::vec(any::<u8>(), 0..200),
                    // Numbers that may be valid handles and sizes, then a name.
                    (0u64..4, any::<u32>(), 0u32..8).prop_map(|(handle, word, small)| {
                        let mut body = handle.to_le_bytes().to_vec();
                        body.extend(u64::from(small).to_le_bytes());
                        body.extend(word.to_le_bytes());
                        body.extend([0; 20]);
                        body.extend(b"p1\0a\0");
                        body
                    }),
                    Just(b"a\0".to_vec()),
                ]),
            1..40),
    ) {
        let (_directory, tree) = tree();
        let server = Server::new(Arc::new(tree));
        let mut desk = Desk::new().unwrap();
        answer(&mut desk, &server, &init());
        for (opcode, node, body) in messages {
            let reply = answer(&mut desk, &server, &request(opcode, node, &body));
            prop_assert_eq!(reply.is_none(), UNANSWERED.contains(&opcode));
            if let Some(reply) = reply {
                prop_assert_eq!(&reply[8..16], &4711u64.to_le_bytes());
                prop_assert!((-4095..=0).contains(&error_of(&reply)), "{}", error_of(&reply));
            }
        }
    }
}
