// SPDX-License-Identifier: Apache-2.0
//! The rtnetlink requests that the agent needs, over one blocking socket. The kernel has handled a request when `send`
//! returns. The formats are those of `linux/rtnetlink.h`.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

use super::{Prefix, Route};

const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const GET_ADDRESS: u16 = 22;
const NEW_ROUTE: u16 = 24;
const NEW_NEIGHBOR: u16 = 28;
const ERROR: u16 = 2;
const DONE: u16 = 3;

const REQUEST: u16 = 1;
const REQUEST_ACK: u16 = REQUEST | 4;
/// All that there are.
const DUMP: u16 = 0x300;
const REPLACE: u16 = 0x100;
const CREATE: u16 = 0x400;

const LINK_ADDRESS: u16 = 1;
const LINK_NAME: u16 = 3;
const LINK_MTU: u16 = 4;
const LINK_UP: u32 = 1;

const ADDRESS_ADDRESS: u16 = 1;
const ADDRESS_LOCAL: u16 = 2;
/// No duplicate address detection, because the host assigns the addresses.
const ADDRESS_NO_DAD: u8 = 2;

const ROUTE_DESTINATION: u16 = 1;
const ROUTE_INTERFACE: u16 = 4;
const ROUTE_GATEWAY: u16 = 5;
const ROUTE_PRIORITY: u16 = 6;
const ROUTE_SOURCE: u16 = 7;
const ROUTE_METRICS: u16 = 8;
const METRIC_MTU: u16 = 2;
const METRIC_ADVMSS: u16 = 8;
const ROUTE_TABLE_MAIN: u8 = 254;
const ROUTE_BY_BOOT: u8 = 3;
const ROUTE_SCOPE_UNIVERSE: u8 = 0;
const ROUTE_SCOPE_LINK: u8 = 253;
const ROUTE_UNICAST: u8 = 1;
const ROUTE_ON_LINK: u32 = 4;

const NEIGHBOR_ADDRESS: u16 = 1;
const NEIGHBOR_MAC: u16 = 2;
const NEIGHBOR_PERMANENT: u16 = 0x80;

const HEADER_BYTES: usize = 16;
/// Of an address: family, prefix length, flags, scope, interface.
const ADDRESS_HEADER_BYTES: usize = 8;
/// The kernel puts no more into one datagram.
const DUMP_BYTES: usize = 32 << 10;

#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
}

impl Netlink {
    pub fn open() -> io::Result<Self> {
        // No protocol means number 0, which is NETLINK_ROUTE.
        let socket = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok(Self { socket })
    }

    pub fn set_up(&mut self, index: u32) -> io::Result<()> {
        self.ask(NEW_LINK, 0, link(index, LINK_UP, LINK_UP))
    }

    /// The kernel then removes the routes and neighbours of the interface.
    pub fn set_down(&mut self, index: u32) -> io::Result<()> {
        self.ask(NEW_LINK, 0, link(index, 0, LINK_UP))
    }

    /// Sets the name, the MAC address and the MTU. An MTU of 0 leaves it unchanged.
    pub fn identify(&mut self, index: u32, name: &str, mac: [u8; 6], mtu: u32) -> io::Result<()> {
        self.ask(NEW_LINK, 0, identity(index, name, mac, mtu))
    }

    pub fn add_address(&mut self, index: u32, prefix: Prefix) -> io::Result<()> {
        let flags = if prefix.address.is_ipv6() {
            ADDRESS_NO_DAD
        } else {
            0
        };
        let mut message = address(index, prefix, flags);
        attribute(&mut message, ADDRESS_ADDRESS, &octets(prefix.address));
        self.ask(NEW_ADDRESS, CREATE | REPLACE, message)
    }

    /// It is no error if the interface does not have the address: it may have gone with another one.
    pub fn remove_address(&mut self, index: u32, prefix: Prefix) -> io::Result<()> {
        match self.ask(DELETE_ADDRESS, 0, address(index, prefix, 0)) {
            Err(e) if e.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
            answer => answer,
        }
    }

    /// The addresses of all interfaces, each with the index of its interface.
    pub fn addresses(&mut self) -> io::Result<Vec<(u32, Prefix)>> {
        self.send(GET_ADDRESS, REQUEST | DUMP, vec![0; ADDRESS_HEADER_BYTES])?;
        let mut found = Vec::new();
        let mut answer = vec![0; DUMP_BYTES];
        loop {
            let (length, _) = recv(&self.socket, &mut answer[..], RecvFlags::empty())?;
            if addresses(answer.get(..length).unwrap_or_default(), &mut found)? {
                return Ok(found);
            }
        }
    }

    pub fn add_route(&mut self, index: u32, to: &Route) -> io::Result<()> {
        match self.ask(NEW_ROUTE, CREATE | REPLACE, route(index, to, 0)) {
            // The gateway is in none of the interface's networks, as with point-to-point plugins.
            Err(e) if to.gateway.is_some() && is_unreachable(&e) => {
                self.ask(NEW_ROUTE, CREATE | REPLACE, route(index, to, ROUTE_ON_LINK))
            }
            answer => answer,
        }
    }

    pub fn add_neighbor(&mut self, index: u32, address: IpAddr, mac: [u8; 6]) -> io::Result<()> {
        let mut message = vec![family(address), 0, 0, 0];
        message.extend(index.to_ne_bytes());
        message.extend(NEIGHBOR_PERMANENT.to_ne_bytes());
        message.extend([0, ROUTE_UNICAST]);
        attribute(&mut message, NEIGHBOR_ADDRESS, &octets(address));
        attribute(&mut message, NEIGHBOR_MAC, &mac);
        self.ask(NEW_NEIGHBOR, CREATE | REPLACE, message)
    }

    fn ask(&mut self, kind: u16, flags: u16, body: Vec<u8>) -> io::Result<()> {
        self.send(kind, REQUEST_ACK | flags, body)?;
        let mut answer = [0; 4096];
        let (length, _) = recv(&self.socket, &mut answer[..], RecvFlags::empty())?;
        acknowledged(answer.get(..length).unwrap_or_default())
    }

    fn send(&mut self, kind: u16, flags: u16, body: Vec<u8>) -> io::Result<()> {
        let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
        let length = u32::try_from(HEADER_BYTES + body.len()).map_err(io::Error::other)?;
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        send(&self.socket, &message, SendFlags::empty())?;
        Ok(())
    }
}

fn is_unreachable(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EINVAL)
    )
}

/// Parses a reply: a header and an error number, which is 0 for success.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let kind = answer
        .get(4..6)
        .and_then(|b| b.try_into().ok())
        .map(u16::from_ne_bytes);
    let error = answer
        .get(HEADER_BYTES..HEADER_BYTES + 4)
        .and_then(|b| b.try_into().ok());
    match (kind, error.map(i32::from_ne_bytes)) {
        (Some(ERROR), Some(0)) => Ok(()),
        (Some(ERROR), Some(error)) => Err(io::Error::from_raw_os_error(error.wrapping_neg())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Parses one datagram of a dump of addresses. Returns whether it was the last one.
fn addresses(datagram: &[u8], found: &mut Vec<(u32, Prefix)>) -> io::Result<bool> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let length = number(rest, 0, u32::from_ne_bytes).and_then(|n| usize::try_from(n).ok());
        let kind = number(rest, 4, u16::from_ne_bytes);
        let body = length.and_then(|length| rest.get(HEADER_BYTES..length));
        let (Some(length), Some(kind), Some(body)) = (length, kind, body) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        match kind {
            DONE => return Ok(true),
            ERROR => return acknowledged(rest).map(|()| true),
            NEW_ADDRESS => found.extend(held(body)),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The interface and the address that a message tells, if it is an IP address.
fn held(body: &[u8]) -> Option<(u32, Prefix)> {
    let bits = *body.get(1)?;
    let index = number(body, 4, u32::from_ne_bytes)?;
    let mut rest = body.get(ADDRESS_HEADER_BYTES..)?;
    let (mut local, mut address) = (None, None);
    while let (Some(length), Some(kind)) = (
        number(rest, 0, u16::from_ne_bytes).map(usize::from),
        number(rest, 2, u16::from_ne_bytes),
    ) {
        let value = rest.get(4..length)?;
        match kind {
            ADDRESS_LOCAL => local = ip(value),
            ADDRESS_ADDRESS => address = ip(value),
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    // Only an interface with a peer has both, and then the other one is the peer's.
    let address = local.or(address)?;
    Some((index, Prefix { address, bits }))
}

fn ip(octets: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from))
        .ok()
}

fn number<T, const N: usize>(bytes: &[u8], at: usize, of: fn([u8; N]) -> T) -> Option<T> {
    let bytes = bytes.get(at..)?.get(..N)?;
    bytes.try_into().ok().map(of)
}

/// The bits of `flags` that are in `change`.
fn link(index: u32, flags: u32, change: u32) -> Vec<u8> {
    let mut message = vec![0; 4];
    message.extend(index.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend(change.to_ne_bytes());
    message
}

fn address(index: u32, prefix: Prefix, flags: u8) -> Vec<u8> {
    let mut message = vec![
        family(prefix.address),
        prefix.bits,
        flags,
        ROUTE_SCOPE_UNIVERSE,
    ];
    message.extend(index.to_ne_bytes());
    attribute(&mut message, ADDRESS_LOCAL, &octets(prefix.address));
    message
}

fn identity(index: u32, name: &str, mac: [u8; 6], mtu: u32) -> Vec<u8> {
    let mut message = link(index, 0, 0);
    attribute(&mut message, LINK_ADDRESS, &mac);
    attribute(&mut message, LINK_NAME, &[name.as_bytes(), b"\0"].concat());
    if mtu > 0 {
        attribute(&mut message, LINK_MTU, &mtu.to_ne_bytes());
    }
    message
}

fn route(index: u32, to: &Route, flags: u32) -> Vec<u8> {
    let destination = to.destination;
    let scope = if to.gateway.is_some() || destination.address.is_ipv6() {
        ROUTE_SCOPE_UNIVERSE
    } else {
        ROUTE_SCOPE_LINK
    };
    let mut message = vec![
        family(destination.address),
        destination.bits,
        0,
        0,
        ROUTE_TABLE_MAIN,
        ROUTE_BY_BOOT,
        scope,
        ROUTE_UNICAST,
    ];
    message.extend(flags.to_ne_bytes());
    if destination.bits > 0 {
        attribute(&mut message, ROUTE_DESTINATION, &network(destination));
    }
    if let Some(gateway) = to.gateway {
        attribute(&mut message, ROUTE_GATEWAY, &octets(gateway));
    }
    if let Some(source) = to.source {
        attribute(&mut message, ROUTE_SOURCE, &octets(source));
    }
    if to.priority > 0 {
        attribute(&mut message, ROUTE_PRIORITY, &to.priority.to_ne_bytes());
    }
    let mut metrics = Vec::new();
    for (kind, value) in [(METRIC_MTU, to.mtu), (METRIC_ADVMSS, to.advmss)] {
        if value > 0 {
            attribute(&mut metrics, kind, &value.to_ne_bytes());
        }
    }
    if !metrics.is_empty() {
        attribute(&mut message, ROUTE_METRICS, &metrics);
    }
    attribute(&mut message, ROUTE_INTERFACE, &index.to_ne_bytes());
    message
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { 2 } else { 10 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The address with a host part of zero. The kernel refuses a route with any other host part.
fn network(prefix: Prefix) -> Vec<u8> {
    let mut octets = octets(prefix.address);
    for (index, octet) in octets.iter_mut().enumerate() {
        let kept = usize::from(prefix.bits).saturating_sub(index * 8).min(8);
        *octet &= match kept {
            0 => 0,
            kept => 0xff << (8 - kept),
        };
    }
    octets
}

fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_gets_its_address_its_name_and_perhaps_an_mtu() {
        let mac = [2, 0, 0, 0xab, 0xff, 1];
        let message = identity(7, "eth0", mac, 1400);
        let address = [10, 0, 1, 0, 2, 0, 0, 0xab, 0xff, 1, 0, 0];
        let name = [9, 0, 3, 0, b'e', b't', b'h', b'0', 0, 0, 0, 0];
        let mtu = [8, 0, 4, 0, 0x78, 5, 0, 0];
        assert_eq!(message[..16], link(7, 0, 0));
        assert_eq!(message[16..], [&address[..], &name, &mtu].concat());
        let plain = identity(7, "eth0", mac, 0);
        assert_eq!(plain[16..], [address, name].concat());
    }

    #[test]
    fn a_route_has_what_was_asked_for_and_nothing_else() {
        let mut to = Route {
            destination: Prefix {
                address: "10.2.0.0".parse().unwrap(),
                bits: 16,
            },
            gateway: None,
            source: None,
            priority: 0,
            mtu: 0,
            advmss: 0,
        };
        let plain = route(7, &to, 0);
        assert_eq!(plain[..8], [2, 16, 0, 0, 254, 3, 253, 1]);
        assert_eq!(
            plain[12..],
            [8, 0, 1, 0, 10, 2, 0, 0, 8, 0, 4, 0, 7, 0, 0, 0]
        );
        to.gateway = Some("10.1.0.1".parse().unwrap());
        to.priority = 5;
        to.mtu = 1400;
        let rich = route(7, &to, 4);
        assert_eq!(rich[6], 0, "through a gateway it is not of the link");
        assert_eq!(rich[8..12], [4, 0, 0, 0]);
        let metrics = [12, 0, 8, 0, 8, 0, 2, 0, 0x78, 5, 0, 0];
        assert!(rich.windows(metrics.len()).any(|part| part == metrics));
    }

    #[test]
    fn an_interface_goes_up_and_down_by_one_bit() {
        assert_eq!(link(7, LINK_UP, LINK_UP)[8..], [1, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(
            link(7, 0, LINK_UP)[4..],
            [7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
        );
    }

    fn prefix(address: &str, bits: u8) -> Prefix {
        let address = address.parse().unwrap();
        Prefix { address, bits }
    }

    /// A message of a dump.
    fn told(kind: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER_BYTES + body.len()).unwrap();
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend([0; 10]);
        message.extend(body);
        message
    }

    #[test]
    fn an_address_is_removed_as_it_was_told() {
        let removed = address(7, prefix("10.1.2.3", 24), 0);
        assert_eq!(removed, [2, 24, 0, 0, 7, 0, 0, 0, 8, 0, 2, 0, 10, 1, 2, 3]);
        let v6 = address(3, prefix("fd00::5", 64), 0);
        assert_eq!((v6[..2].to_vec(), v6.len()), (vec![10, 64], 8 + 20));
    }

    #[test]
    fn a_dump_of_addresses_is_read_to_its_end() {
        let mut peer = address(4, prefix("10.9.0.1", 32), 0);
        attribute(&mut peer, ADDRESS_ADDRESS, &[10, 9, 0, 2]);
        let mut v6 = vec![10, 64, 0, 0, 3, 0, 0, 0];
        attribute(&mut v6, 8, &[1, 2, 3, 4]);
        attribute(
            &mut v6,
            ADDRESS_ADDRESS,
            &octets("fd00::5".parse().unwrap()),
        );
        let mut found = Vec::new();
        let first = [
            told(NEW_ADDRESS, &peer),
            told(NEW_ADDRESS, &v6),
            told(NEW_LINK, &[0; 16]),
            told(NEW_ADDRESS, &[2, 8]),
        ];
        assert!(!addresses(&first.concat(), &mut found).unwrap());
        assert!(addresses(&told(DONE, &[0; 4]), &mut found).unwrap());
        let expected = [(4, prefix("10.9.0.1", 32)), (3, prefix("fd00::5", 64))];
        assert_eq!(found, expected);
        let refused = told(ERROR, &(-13_i32).to_ne_bytes());
        let error = addresses(&refused, &mut found).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(13));
        for broken in [&[1; 3][..], &[4, 0, 0, 0, 20, 0], &[255; 64]] {
            assert!(addresses(broken, &mut found).is_err(), "{broken:?}");
        }
    }

    #[test]
    fn attributes_are_padded_to_four_bytes() {
        let mut message = Vec::new();
        attribute(&mut message, 3, b"eth0\0");
        assert_eq!(message, [9, 0, 3, 0, b'e', b't', b'h', b'0', 0, 0, 0, 0]);
    }

    #[test]
    fn host_bits_are_cleared_in_a_destination() {
        let table = [
            ("10.88.3.5", 16, vec![10, 88, 0, 0]),
            ("10.255.0.0", 9, vec![10, 128, 0, 0]),
            ("1.2.3.4", 0, vec![0; 4]),
        ];
        for (address, bits, expected) in table {
            assert_eq!(
                network(Prefix {
                    address: address.parse().unwrap(),
                    bits
                }),
                expected
            );
        }
    }

    #[test]
    fn an_answer_is_an_error_number() {
        let answer = |error: i32| {
            [
                &[36, 0, 0, 0, 2, 0, 0, 0],
                &[0; 8][..],
                &error.to_ne_bytes(),
            ]
            .concat()
        };
        assert!(acknowledged(&answer(0)).is_ok());
        assert_eq!(
            acknowledged(&answer(-17)).unwrap_err().raw_os_error(),
            Some(17)
        );
        assert!(acknowledged(&[]).is_err());
    }

    #[test]
    fn the_kernels_own_dump_is_understood() {
        let found = Netlink::open().unwrap().addresses().unwrap();
        for (index, address) in found {
            assert!(index > 0 && address.bits <= 128, "{address:?}");
        }
    }
}
