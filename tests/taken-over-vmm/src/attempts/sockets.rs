// SPDX-License-Identifier: Apache-2.0
//! Sockets: services of the host by path, name and number; families one by one; what the daemon's connections take.

use libc::{
    AF_ALG, AF_BLUETOOTH, AF_CAN, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_RDS, AF_TIPC,
    AF_UNIX, AF_VSOCK, EACCES, EADDRNOTAVAIL, EAFNOSUPPORT, ECONNREFUSED, ECONNRESET, EHOSTUNREACH,
    EINPROGRESS, EINVAL, ENETUNREACH, ENODEV, ENOENT, EPERM, EPROTONOSUPPORT, EROFS,
    ESOCKTNOSUPPORT, ETIMEDOUT, SCM_CREDENTIALS, SCM_RIGHTS, SO_MARK, SO_SNDBUFFORCE, SOCK_DGRAM,
    SOCK_NONBLOCK, SOCK_RAW, SOCK_SEQPACKET, SOCK_STREAM, SOL_SOCKET,
};

use super::calls::{connect, connect_unix, done, inet_address, send_with, socket, unix_address};
use crate::attempt::Answer::{No, Works};
use crate::attempt::{Answer, Attempt};
use crate::bait;
use crate::world::{Tried, World, call};

const AF_XDP: i32 = 44;
const AF_KCM: i32 = 41;
const AF_NFC: i32 = 39;
const AF_RXRPC: i32 = 33;
const AF_SMC: i32 = 43;
const AF_QIPCRTR: i32 = 42;
const NETLINK_NETFILTER: i32 = 12;
const NETLINK_XFRM: i32 = 6;
const NOT_THERE: &[Answer] = &[No(ENOENT)];
const FORBIDDEN: &[Answer] = &[No(EPERM)];
/// A socket alone reaches nothing: its network is empty. Whether there is one depends on the kernel's modules.
const SURFACE: &[Answer] = &[
    Works,
    No(EAFNOSUPPORT),
    No(EPERM),
    No(EACCES),
    No(EPROTONOSUPPORT),
    No(ESOCKTNOSUPPORT),
    No(EINVAL),
];
const SURFACE_REFUSED: &[Answer] = &[No(EPERM), No(EAFNOSUPPORT)];
const NO_VSOCK: &[Answer] = &[
    No(ENODEV),
    No(ECONNRESET),
    No(ECONNREFUSED),
    No(EAFNOSUPPORT),
    No(ENETUNREACH),
    No(EHOSTUNREACH),
    No(EADDRNOTAVAIL),
    No(EINPROGRESS),
    No(ETIMEDOUT),
    No(EACCES),
];
const EMPTY: &str = "its network is empty; only the lists keep it from this part of the kernel";

fn any(world: &World, family: i32, kind: i32, protocol: i32) -> Tried {
    socket(world, family, kind, protocol).map(|_| true)
}

/// `CID` and port of a vsock.
fn vsock_address(cid: u32, port: u32) -> Vec<u8> {
    let family = u16::try_from(AF_VSOCK).unwrap_or(0).to_ne_bytes();
    [
        family.as_slice(),
        &[0; 2],
        &port.to_ne_bytes(),
        &cid.to_ne_bytes(),
        &[0; 4],
    ]
    .concat()
}

fn set(world: &World, option: i32) -> Tried {
    let value = [1i32];
    done(call!(
        world,
        setsockopt,
        world.held.ready,
        SOL_SOCKET,
        option,
        &value,
        4
    ))
}

pub const ALL: &[Attempt] = &[
    Attempt::refused("connect to the daemon's socket", NOT_THERE, |w| {
        connect_unix(w, w.facts.path("run/bulkhead.sock").as_bytes_with_nul())
    }),
    Attempt::refused("connect to D-Bus", NOT_THERE, |w| {
        connect_unix(w, b"/run/dbus/system_bus_socket\0")
    }),
    Attempt::refused("connect to systemd", NOT_THERE, |w| {
        connect_unix(w, b"/run/systemd/private\0")
    }),
    Attempt::refused("write to the host's log", NOT_THERE, |w| {
        connect(w, AF_UNIX, SOCK_DGRAM, &unix_address(b"/dev/log\0"))
    }),
    Attempt::refused(
        "connect to an abstract socket",
        &[No(ECONNREFUSED), No(EPERM)],
        |w| connect_unix(w, &[b"\0", bait::NAME.as_bytes()].concat()),
    ),
    Attempt::refused("listen at a path", &[No(EROFS), No(EACCES)], |w| {
        let socket = socket(w, AF_UNIX, SOCK_STREAM, 0)?;
        let address = unix_address(b"/socket\0");
        done(call!(w, bind, socket, address.as_slice(), address.len()))
    }),
    Attempt::harmless(
        "listen at an abstract name",
        &[Works],
        "the names are those of its network namespace",
        |w| {
            let socket = socket(w, AF_UNIX, SOCK_STREAM, 0)?;
            let address = unix_address(b"\0name");
            done(call!(w, bind, socket, address.as_slice(), address.len()))
        },
    ),
    Attempt::refused(
        "connect to a service on the loopback",
        &[No(ENETUNREACH), No(EACCES), No(EADDRNOTAVAIL)],
        |w| {
            connect(
                w,
                AF_INET,
                SOCK_STREAM,
                &inet_address([127, 0, 0, 1], w.facts.port),
            )
        },
    ),
    Attempt::refused(
        "connect to the metadata service of a cloud",
        &[No(ENETUNREACH), No(EACCES)],
        |w| {
            connect(
                w,
                AF_INET,
                SOCK_STREAM,
                &inet_address([169, 254, 169, 254], 80),
            )
        },
    ),
    Attempt::refused("send a datagram", &[No(ENETUNREACH)], |w| {
        connect(w, AF_INET, SOCK_DGRAM, &inet_address([8, 8, 8, 8], 53))
    }),
    Attempt::refused(
        "connect by IPv6",
        &[
            No(ENETUNREACH),
            No(EACCES),
            No(EADDRNOTAVAIL),
            No(EAFNOSUPPORT),
        ],
        |w| {
            let family = u16::try_from(AF_INET6).unwrap_or(0).to_ne_bytes();
            let mut address = [family.as_slice(), &[0; 26]].concat();
            // Port 80 of ::1.
            address[3] = 80;
            address[23] = 1;
            connect(w, AF_INET6, SOCK_STREAM, &address)
        },
    ),
    Attempt::harmless(
        "listen on a TCP port",
        &[Works, No(EADDRNOTAVAIL), No(EACCES)],
        "its network is empty",
        |w| {
            let socket = socket(w, AF_INET, SOCK_STREAM, 0)?;
            let address = inet_address([0; 4], 8080);
            done(call!(w, bind, socket, address.as_slice(), address.len()))
        },
    ),
    Attempt::refused("send raw IP packets", FORBIDDEN, |w| {
        any(w, AF_INET, SOCK_RAW, 1)
    }),
    Attempt::refused("send raw frames", FORBIDDEN, |w| {
        any(w, AF_PACKET, SOCK_RAW, 0x0300)
    }),
    Attempt::refused("open a socket of the family XDP", SURFACE_REFUSED, |w| {
        any(w, AF_XDP, SOCK_RAW, 0)
    }),
    Attempt::harmless(
        "open a socket of the family netlink (route)",
        SURFACE,
        EMPTY,
        |w| any(w, AF_NETLINK, SOCK_RAW, 0),
    ),
    Attempt::harmless(
        "open a socket of the family netlink (netfilter)",
        SURFACE,
        EMPTY,
        |w| any(w, AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER),
    ),
    Attempt::harmless(
        "open a socket of the family netlink (XFRM)",
        SURFACE,
        EMPTY,
        |w| any(w, AF_NETLINK, SOCK_RAW, NETLINK_XFRM),
    ),
    Attempt::harmless("open a socket of the family ALG", SURFACE, EMPTY, |w| {
        any(w, AF_ALG, SOCK_SEQPACKET, 0)
    }),
    Attempt::harmless(
        "open a socket of the family Bluetooth",
        SURFACE,
        EMPTY,
        |w| any(w, AF_BLUETOOTH, SOCK_RAW, 1),
    ),
    Attempt::harmless("open a socket of the family CAN", SURFACE, EMPTY, |w| {
        any(w, AF_CAN, SOCK_DGRAM, 2)
    }),
    Attempt::harmless("open a socket of the family TIPC", SURFACE, EMPTY, |w| {
        any(w, AF_TIPC, SOCK_DGRAM, 0)
    }),
    Attempt::harmless("open a socket of the family RDS", SURFACE, EMPTY, |w| {
        any(w, AF_RDS, SOCK_SEQPACKET, 0)
    }),
    Attempt::harmless("open a socket of the family KCM", SURFACE, EMPTY, |w| {
        any(w, AF_KCM, SOCK_SEQPACKET, 0)
    }),
    Attempt::harmless("open a socket of the family NFC", SURFACE, EMPTY, |w| {
        any(w, AF_NFC, SOCK_RAW, 1)
    }),
    Attempt::harmless("open a socket of the family RxRPC", SURFACE, EMPTY, |w| {
        any(w, AF_RXRPC, SOCK_DGRAM, AF_INET)
    }),
    Attempt::harmless("open a socket of the family SMC", SURFACE, EMPTY, |w| {
        any(w, AF_SMC, SOCK_STREAM, 0)
    }),
    Attempt::harmless("open a socket of the family QRTR", SURFACE, EMPTY, |w| {
        any(w, AF_QIPCRTR, SOCK_DGRAM, 0)
    }),
    Attempt::refused("connect to a vsock service of the host", NO_VSOCK, |w| {
        connect(
            w,
            AF_VSOCK,
            SOCK_STREAM | SOCK_NONBLOCK,
            &vsock_address(2, 22),
        )
    }),
    Attempt::refused("connect to a vsock service of itself", NO_VSOCK, |w| {
        connect(
            w,
            AF_VSOCK,
            SOCK_STREAM | SOCK_NONBLOCK,
            &vsock_address(1, 22),
        )
    }),
    Attempt::refused(
        "lie to the daemon who it is (`SCM_CREDENTIALS`)",
        &[No(EPERM), No(EINVAL)],
        |w| {
            let peer = [w.facts.daemon.to_ne_bytes(), [0; 4], [0; 4]].concat();
            send_with(w, w.held.ready, SCM_CREDENTIALS, &peer)
        },
    ),
    Attempt::harmless(
        "send the daemon a descriptor (`SCM_RIGHTS`)",
        &[Works, No(libc::EAGAIN)],
        "the daemon takes none: it ends with the message",
        |w| send_with(w, w.held.ready, SCM_RIGHTS, &w.held.kvm.to_ne_bytes()),
    )
    .heard(),
    Attempt::refused(
        "enlarge a socket's buffer beyond the host's limit",
        FORBIDDEN,
        |w| set(w, SO_SNDBUFFORCE),
    ),
    Attempt::refused("mark packets for the host's routing", FORBIDDEN, |w| {
        set(w, SO_MARK)
    }),
    Attempt::harmless(
        "learn a path of the host from its sockets (`getsockname`)",
        &[Works],
        "a path alone opens nothing",
        |w| {
            let (mut name, mut size) = ([0u8; 128], [128u32]);
            done(call!(w, getsockname, w.held.vsock, &mut name, &mut size))
        },
    ),
    Attempt::harmless(
        "let more of the daemon's connections wait (`listen`)",
        &[Works],
        "a request of the daemon has a time limit, and the kernel limits the number",
        |w| done(call!(w, listen, w.held.control, 1 << 20)),
    ),
];
