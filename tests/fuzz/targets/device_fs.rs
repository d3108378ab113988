// SPDX-License-Identifier: Apache-2.0
//! FUSE requests of a driver through its queues, and bytes of the file server.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use bulkhead_fuzz::chains::drive;
use bulkhead_fuzz::input::Input;
use bulkhead_vmm::devices::fs::Fs;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut fs = Fs::new(Default::default()).expect("a device");
    let mut server: Option<UnixStream> = None;
    drive(
        &mut fs,
        0,
        &mut Input::new(bytes),
        |fs, _, input| match input.below(4) {
            0 => {
                let (ours, theirs) = UnixStream::pair().expect("a socket pair");
                theirs
                    .set_nonblocking(true)
                    .expect("a socket that does not wait");
                if fs.connect(ours).is_ok() {
                    server = Some(theirs);
                }
            }
            1 => drop(server.take()),
            2 => {
                if let Some(server) = &mut server {
                    let mut taken = [0; 8192];
                    assert!(server.read(&mut taken).unwrap_or(0) <= taken.len());
                }
            }
            _ => {
                let reply = input.short();
                if let Some(server) = &mut server {
                    let _ = server.write_all(reply);
                }
            }
        },
    );
});
