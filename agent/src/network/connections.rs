// SPDX-License-Identifier: Apache-2.0
//! Closes TCP connections whose local address is gone. Otherwise their programs would wait for peers that will never
//! answer, until the kernel gives up after a quarter of an hour.
//!
//! The guest's kernel cannot destroy a connection by itself (`CONFIG_INET_DIAG_DESTROY` is not set). So the agent takes a
//! copy of the socket from a process that has it and disconnects it. To the program this is a reset by the peer
//! (`ECONNRESET`). A connection that no program has accepted yet belongs to no process and stays.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use rustix::net::connect_unspec;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

const TABLES: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];
/// A socket in this state has no connection: `TCP_LISTEN`.
const LISTENS: &str = "0A";
/// Columns of the tables.
const LOCAL: usize = 1;
const STATE: usize = 3;
const INODE: usize = 9;

/// Closes connections of the processes `pids`, which are frozen. Addresses in `kept` and those of the loopback are not
/// gone. Blocks.
pub fn close(kept: &HashSet<IpAddr>, pids: &[i32]) -> io::Result<()> {
    let mut lost = HashSet::new();
    for table in TABLES {
        match File::open(table) {
            Ok(table) => find(BufReader::new(table), kept, &mut lost)?,
            // The kernel may be without IPv6.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    for pid in pids {
        if lost.is_empty() {
            break;
        }
        // Fails if the process has been killed. Then its connections have ended.
        let _ = close_of(*pid, &mut lost);
    }
    Ok(())
}

fn close_of(pid: i32, lost: &mut HashSet<u64>) -> io::Result<()> {
    let process = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    let pidfd = pidfd_open(process, PidfdFlags::empty())?;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let descriptor = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let inode = fs::read_link(entry.path()).ok();
        let inode = inode.and_then(|link| socket(&link));
        let (Some(descriptor), Some(inode)) = (descriptor, inode) else {
            continue;
        };
        // Processes may share a socket.
        if lost.remove(&inode) {
            let socket = pidfd_getfd(&pidfd, descriptor, PidfdGetfdFlags::empty())?;
            let _ = connect_unspec(socket);
        }
    }
    Ok(())
}

/// The inode of the socket to which a link of `/proc/<pid>/fd` leads.
fn socket(link: &Path) -> Option<u64> {
    let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
    inode.parse().ok()
}

/// Adds the inodes of connections in `table` whose local address is gone.
fn find(table: impl BufRead, kept: &HashSet<IpAddr>, lost: &mut HashSet<u64>) -> io::Result<()> {
    for line in table.lines() {
        let line = line?;
        let column = |index| line.split_ascii_whitespace().nth(index);
        let address = column(LOCAL).and_then(address);
        let inode = column(INODE).and_then(|inode| inode.parse().ok());
        // The first line has the names of the columns. A connection of no process has the inode 0.
        let (Some(address), Some(inode @ 1..)) = (address, inode) else {
            continue;
        };
        let gone = !address.is_loopback() && !address.is_unspecified() && !kept.contains(&address);
        if gone && column(STATE) != Some(LISTENS) {
            lost.insert(inode);
        }
    }
    Ok(())
}

/// Parses `0100007F:0016`: an address as words in this machine's order of bytes, and a port.
fn address(text: &str) -> Option<IpAddr> {
    let (words, _port) = text.split_once(':')?;
    let word = |index: usize| {
        let digits = words.get(8 * index..8 * index + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    match words.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let octets = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
            let octets: [u8; 16] = octets.try_into().ok()?;
            Some(Ipv6Addr::from(octets).to_canonical())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn connections_from_addresses_that_are_gone_are_found() {
        let tcp = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0500580A:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0 100 0 0 10 0
   1: 0500580A:C350 0100580A:0050 01 00000000:00000000 00:00000000 00000000     0        0 12 1 0 20 4 30 10 -1
   2: 0600580A:C350 0100580A:0050 01 00000000:00000000 00:00000000 00000000     0        0 13 1 0 20 4 30 10 -1
   3: 0100007F:C350 0100007F:0050 01 00000000:00000000 00:00000000 00000000     0        0 14 1 0 20 4 30 10 -1
   4: 0500580A:C351 0100580A:0050 06 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 4 30 10 -1
   5: 0500580A:C352 0100580A:0050 02 00000000:00000000 00:00000000 00000000     0        0 15 1 0 20 4 30 10 -1
   6: nonsense
";
        let tcp6 = "\
   0: 0000000000000000FFFF00000500580A:1F90 0000000000000000FFFF00000100580A:0050 01 0:0 0:0 0 0 0 21 1
   1: 000000FD000000000000000005000000:1F90 000000FD000000000000000001000000:0050 08 0:0 0:0 0 0 0 22 1
   2: 00000000000000000000000001000000:1F90 00000000000000000000000001000000:0050 01 0:0 0:0 0 0 0 23 1
   3: 000000FD000000000000000006000000:1F90 000000FD000000000000000001000000:0050 01 0:0 0:0 0 0 0 24 1
";
        let kept = ["10.88.0.6".parse().unwrap(), "fd00::6".parse().unwrap()].into();
        let mut lost = HashSet::new();
        find(tcp.as_bytes(), &kept, &mut lost).unwrap();
        find(tcp6.as_bytes(), &kept, &mut lost).unwrap();
        let mut lost: Vec<_> = lost.into_iter().collect();
        lost.sort_unstable();
        assert_eq!(lost, [12, 15, 21, 22]);
    }

    #[test]
    fn a_link_to_a_socket_has_its_inode() {
        let table = [
            ("socket:[77]", Some(77)),
            ("socket:[]", None),
            ("pipe:[77]", None),
            ("/socket:[77]", None),
        ];
        for (link, expected) in table {
            assert_eq!(socket(Path::new(link)), expected, "{link}");
        }
    }

    #[test]
    fn a_process_sees_its_connection_reset() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(ours.try_clone().unwrap()));
        let mut lost = [file.metadata().unwrap().ino()].into();
        let pid = i32::try_from(std::process::id()).unwrap();
        close_of(pid, &mut lost).unwrap();
        assert!(lost.is_empty());
        let error = ours.read(&mut [0]).unwrap_err();
        assert!(matches!(
            error.kind(),
            io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
        ));
        assert!(listener.accept().is_ok_and(|(mut peer, _)| {
            !matches!(peer.read(&mut [0]), Ok(length) if length > 0)
        }));
    }
}
