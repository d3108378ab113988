// SPDX-License-Identifier: Apache-2.0
//! How connections to the guest begin. The host sends the line `CONNECT <port>\n` to say which port of the
//! guest it wants.

use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::RecvFlags;

/// The longest line, `CONNECT 4294967295\n`, and some space.
const LINE_BYTES: usize = 32;

/// What has arrived of the line.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// The line is not complete yet.
    Partial,
    Port(u32),
    /// It is no such line, or the host closed the connection.
    Wrong,
}

/// Reads the line and not a byte more, because the bytes after it belong to the guest.
pub fn read_line(socket: &UnixStream) -> Line {
    let mut bytes = [0; LINE_BYTES];
    let len = match rustix::net::recv(socket, &mut bytes, RecvFlags::PEEK) {
        Ok((len, _)) if len > 0 => len,
        Err(Errno::AGAIN | Errno::INTR) => return Line::Partial,
        Ok(_) | Err(_) => return Line::Wrong,
    };
    let seen = bytes.get(..len).unwrap_or(&[]);
    let Some(end) = seen.iter().position(|&b| b == b'\n') else {
        return if len < LINE_BYTES {
            Line::Partial
        } else {
            Line::Wrong
        };
    };
    let Some(port) = seen.get(..end).and_then(parse) else {
        return Line::Wrong;
    };
    let mut consumed = [0; LINE_BYTES];
    let Some(line) = consumed.get_mut(..end.saturating_add(1)) else {
        return Line::Wrong;
    };
    match rustix::net::recv(socket, line, RecvFlags::empty()) {
        Ok(_) => Line::Port(port),
        Err(_) => Line::Wrong,
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let digits = text.strip_prefix("CONNECT ")?.trim_end_matches('\r');
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn takes_the_line_and_leaves_the_rest() {
        let (mut host, mut ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        assert_eq!(read_line(&ours), Line::Partial);
        host.write_all(b"CONNECT 10").unwrap();
        assert_eq!(read_line(&ours), Line::Partial);
        host.write_all(b"24\nhello").unwrap();
        assert_eq!(read_line(&ours), Line::Port(1024));
        let mut rest = [0; 5];
        ours.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn refuses_other_lines() {
        for line in [
            "GET / HTTP/1.1\r\n",
            "CONNECT x\n",
            "CONNECT 4294967296\n",
            &"C".repeat(40),
        ] {
            let (mut host, ours) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            host.write_all(line.as_bytes()).unwrap();
            assert_eq!(read_line(&ours), Line::Wrong, "{line}");
        }
        let (host, ours) = UnixStream::pair().unwrap();
        drop(host);
        assert_eq!(read_line(&ours), Line::Wrong);
    }
}
