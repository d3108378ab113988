// SPDX-License-Identifier: Apache-2.0
//! What lies about on a host, as attempts look for it: an abstract socket, System V and POSIX IPC, a key. Root made it and
//! anybody may use it, so that only the jail stands before it.

use std::ffi::CStr;
use std::io::{self, Read};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use crate::facts::Facts;
use crate::world::{Held, World, call};

/// The name of all that has one.
pub const NAME: &str = "bulkhead-bait";
pub const C_NAME: &CStr = c"bulkhead-bait";
/// The key of all System V IPC.
pub const IPC_KEY: i32 = 0x0b07_1bea;
const ALL_MAY: i32 = 0o666;
/// The user's own keyring (keyctl(2)).
pub const USER_KEYRING: i32 = -4;

/// Lays it out, prints the key's number, and takes all back when standard input ends.
pub fn lay() -> io::Result<()> {
    let world = World::real(Held::inherited(), Facts::default(), None, |_| {});
    let number = io::Error::from_raw_os_error;
    let _abstract = UnixListener::bind_addr(&SocketAddr::from_abstract_name(NAME)?)?;
    let flags = libc::IPC_CREAT | ALL_MAY;
    let memory = call!(world, shmget, IPC_KEY, 4096, flags).map_err(number)?;
    let messages = call!(world, msgget, IPC_KEY, flags).map_err(number)?;
    let semaphores = call!(world, semget, IPC_KEY, 1, flags).map_err(number)?;
    let flags = libc::O_CREAT | libc::O_RDWR;
    let queue = call!(world, mq_open, C_NAME, flags, ALL_MAY, 0).map_err(number)?;
    let value = b"secret";
    let key = call!(
        world,
        add_key,
        c"user",
        C_NAME,
        value,
        value.len(),
        USER_KEYRING
    );
    // A kernel may have no keyrings.
    println!("{}", key.unwrap_or_default());
    let waited = io::stdin().read_to_end(&mut Vec::new());
    call!(world, shmctl, memory, libc::IPC_RMID, 0).map_err(number)?;
    call!(world, msgctl, messages, libc::IPC_RMID, 0).map_err(number)?;
    call!(world, semctl, semaphores, 0, libc::IPC_RMID, 0).map_err(number)?;
    call!(world, close, queue).map_err(number)?;
    call!(world, mq_unlink, C_NAME).map_err(number)?;
    if let Ok(key) = key {
        let unlink = 9;
        call!(world, keyctl, unlink, key, USER_KEYRING).map_err(number)?;
    }
    waited.map(drop)
}
