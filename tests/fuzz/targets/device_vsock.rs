// SPDX-License-Identifier: Apache-2.0
//! Packets of a driver through its queues, while programs of the host connect, write and leave.
#![no_main]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use bulkhead_fuzz::chains::drive;
use bulkhead_fuzz::input::Input;
use bulkhead_fuzz::places::vsock_sockets;
use bulkhead_vmm::devices::vsock::Vsock;
use bulkhead_vmm::devices::vsock::muxer::Muxer;
use bulkhead_vmm::statistics::Milestone;

const CID: u32 = 5;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let (path, caller, ready, host) = vsock_sockets();
    let milestone = || Arc::new(Milestone::new(Instant::now()));
    let muxer = Muxer::new(CID, caller, Some(ready), Arc::default(), milestone());
    let muxer = muxer.expect("a muxer");
    let mut vsock = Vsock::new(CID, muxer, Arc::default(), milestone());
    let mut hosts = vec![host];
    drive(
        &mut vsock,
        0,
        &mut Input::new(bytes),
        |_, _, input| match input.below(3) {
            0 => {
                let mut host = UnixStream::connect(&path).expect("the muxer's socket");
                host.set_nonblocking(true)
                    .expect("a stream that does not wait");
                let _ = host.write_all(input.short());
                hosts.push(host);
            }
            1 => {
                let text = input.short();
                if let Some(host) = hosts.last_mut() {
                    let _ = host.set_nonblocking(true);
                    let _ = host.write_all(text);
                }
            }
            _ => drop(hosts.pop()),
        },
    );
});
