// SPDX-License-Identifier: Apache-2.0
//! The pod's network interface as CNI defined it on the host: name, MTU, addresses, routes. After a checkpoint all of it
//! is replaced.

mod connections;
pub mod netlink;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use bulkhead_proto::agent;
use tokio::time::{Instant, sleep};

use self::netlink::Netlink;

const CLASS: &str = "/sys/class/net";
/// What the directory of an interface has if there is a device behind it.
const DEVICE: &str = "device";
/// How long the interface may take to appear after the guest has started.
const APPEAR_TIMEOUT: Duration = Duration::from_secs(5);
const APPEAR_PAUSE: Duration = Duration::from_millis(2);
/// The longest interface name: IFNAMSIZ minus its terminating NUL.
const MAX_NAME_BYTES: usize = 15;
const MAX_ADDRESSES: usize = 256;
const MAX_ROUTES: usize = 4096;
const MAX_NEIGHBORS: usize = 4096;
/// Settings of the interface that are switched off. Addresses and routes come from the host, not from router
/// advertisements; and the host's addresses need no duplicate address detection.
const IPV6_SETTINGS: [&str; 2] = ["accept_ra", "accept_dad"];

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("guest has no network device, or its kernel did not find it within {APPEAR_TIMEOUT:?}")]
    NoInterface,
    #[error("{0:?} is not a name for an interface")]
    BadName(String),
    #[error("{0:?} is not an IP address with a prefix length")]
    BadPrefix(String),
    #[error("{0:?} is not an IP address")]
    BadAddress(String),
    #[error("{0:?} is not a MAC address")]
    BadMac(String),
    #[error("too many addresses, routes or neighbours")]
    TooMany,
    #[error("{what} {object}")]
    Kernel {
        what: &'static str,
        object: String,
        source: io::Error,
    },
}

/// An address and its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    pub address: IpAddr,
    pub bits: u8,
}

/// A route to add. Where a number is 0, the kernel chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    pub destination: Prefix,
    /// `None` if the destination is on the link.
    pub gateway: Option<IpAddr>,
    pub source: Option<IpAddr>,
    pub priority: u32,
    pub mtu: u32,
    pub advmss: u32,
}

/// Brings the loopback interface up.
pub fn start_loopback() -> io::Result<()> {
    const LOOPBACK_INDEX: u32 = 1;
    Netlink::open()?.set_up(LOOPBACK_INDEX)
}

/// What the host asks for, checked.
#[derive(Debug)]
struct Wanted {
    name: String,
    mac: [u8; 6],
    mtu: u32,
    addresses: Vec<Prefix>,
    routes: Vec<Route>,
    neighbors: Vec<(IpAddr, [u8; 6])>,
}

impl Wanted {
    fn parse(wanted: &agent::Interface) -> Result<Self, NetworkError> {
        check_name(&wanted.name)?;
        if wanted.addresses.len() > MAX_ADDRESSES
            || wanted.routes.len() > MAX_ROUTES
            || wanted.neighbors.len() > MAX_NEIGHBORS
        {
            return Err(NetworkError::TooMany);
        }
        let addresses = wanted.addresses.iter().map(|one| prefix(one));
        let routes = wanted.routes.iter().map(route);
        let neighbors = wanted.neighbors.iter();
        let neighbors = neighbors.map(|one| Ok((address(&one.address)?, mac(&one.mac)?)));
        Ok(Self {
            name: wanted.name.clone(),
            mac: mac(&wanted.mac)?,
            mtu: wanted.mtu,
            addresses: addresses.collect::<Result<_, _>>()?,
            routes: routes.collect::<Result<_, _>>()?,
            neighbors: neighbors.collect::<Result<_, NetworkError>>()?,
        })
    }
}

/// Makes the error of a request to the kernel.
fn kernel(
    what: &'static str,
    object: &dyn std::fmt::Debug,
) -> impl FnOnce(io::Error) -> NetworkError + use<> {
    let object = format!("{object:?}");
    move |source| NetworkError::Kernel {
        what,
        object,
        source,
    }
}

/// Checks what [`configure`] and [`replace`] check first.
pub fn check(wanted: &agent::Interface) -> Result<(), NetworkError> {
    Wanted::parse(wanted).map(drop)
}

/// Configures the interface. A second call with the same request changes nothing.
pub async fn configure(wanted: &agent::Interface) -> Result<(), NetworkError> {
    let wanted = Wanted::parse(wanted)?;
    let index = wait_for_device().await?;
    let mut netlink = Netlink::open().map_err(kernel("open", &"netlink"))?;
    set(&mut netlink, index, wanted)
}

/// Takes everything from the interface that it has, and configures it anew. TCP connections that `pids` have from
/// addresses that are gone are closed in between, while nothing can be sent to their peers: those may be the peers of the
/// pod from which this one is a copy.
pub async fn replace(
    wanted: Option<&agent::Interface>,
    pids: Vec<i32>,
) -> Result<(), NetworkError> {
    let wanted = wanted.map(Wanted::parse).transpose()?;
    let index = match (&wanted, find(Path::new(CLASS))) {
        (_, Some(index)) => index,
        (Some(_), None) => return Err(NetworkError::NoInterface),
        (None, None) => return Ok(()),
    };
    let mut netlink = Netlink::open().map_err(kernel("open", &"netlink"))?;
    // This removes routes and neighbours, too.
    netlink
        .set_down(index)
        .map_err(kernel("take down interface", &index))?;
    let addresses = |netlink: &mut Netlink| {
        let addresses = netlink.addresses();
        addresses.map_err(kernel("list", &"addresses"))
    };
    for (of, address) in addresses(&mut netlink)? {
        if of == index {
            netlink
                .remove_address(index, address)
                .map_err(kernel("remove address", &address))?;
        }
    }
    let kept = addresses(&mut netlink)?.into_iter().map(|(_, one)| one);
    let new = wanted.iter().flat_map(|wanted| wanted.addresses.clone());
    let kept: HashSet<IpAddr> = kept.chain(new).map(|one| one.address).collect();
    let closed = tokio::task::spawn_blocking(move || connections::close(&kept, &pids)).await;
    closed
        .map_err(io::Error::other)
        .and_then(|closed| closed)
        .map_err(kernel("close", &"connections"))?;
    match wanted {
        Some(wanted) => set(&mut netlink, index, wanted),
        None => Ok(()),
    }
}

fn set(netlink: &mut Netlink, index: u32, wanted: Wanted) -> Result<(), NetworkError> {
    netlink
        .identify(index, &wanted.name, wanted.mac, wanted.mtu)
        .map_err(kernel("set name, address and MTU of", &wanted.name))?;
    for setting in IPV6_SETTINGS {
        // Fails if the kernel has no IPv6. Then there is nothing to set.
        let _ = fs::write(
            format!("/proc/sys/net/ipv6/conf/{}/{setting}", wanted.name),
            "0",
        );
    }
    netlink
        .set_up(index)
        .map_err(kernel("bring up", &wanted.name))?;
    let usable = Usable::on(&wanted.name);
    let addresses = wanted.addresses.into_iter();
    for address in addresses.filter(|one| usable.has(one.address)) {
        netlink
            .add_address(index, address)
            .map_err(kernel("add address", &address))?;
    }
    // Before the routes, because a gateway may be one of these neighbours.
    let neighbors = wanted.neighbors.into_iter();
    for (address, mac) in neighbors.filter(|one| usable.has(one.0)) {
        netlink
            .add_neighbor(index, address, mac)
            .map_err(kernel("add neighbour", &address))?;
    }
    for route in wanted
        .routes
        .into_iter()
        .filter(|one| usable.has(one.destination.address))
    {
        netlink
            .add_route(index, &route)
            .map_err(kernel("add route", &route))?;
    }
    Ok(())
}

/// Which addresses an interface can have.
struct Usable {
    ipv6: bool,
}

impl Usable {
    /// A pod may have switched IPv6 off by a sysctl, although its network has it. Then it has only IPv4, as on a node,
    /// where the kernel removes the addresses that CNI has set.
    fn on(interface: &str) -> Self {
        let setting = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
        let disabled = fs::read_to_string(setting).is_ok_and(|value| value.trim() != "0");
        Self { ipv6: !disabled }
    }

    fn has(&self, address: IpAddr) -> bool {
        self.ipv6 || address.is_ipv4()
    }
}

fn check_name(name: &str) -> Result<(), NetworkError> {
    let proper = |c: char| c.is_ascii_graphic() && c != '/' && c != ':';
    let usable = (1..=MAX_NAME_BYTES).contains(&name.len()) && name.chars().all(proper);
    if usable && name != "." && name != ".." {
        Ok(())
    } else {
        Err(NetworkError::BadName(name.to_owned()))
    }
}

/// Waits until the kernel has found the network device. Returns the index of its interface.
async fn wait_for_device() -> Result<u32, NetworkError> {
    let deadline = Instant::now() + APPEAR_TIMEOUT;
    loop {
        if let Some(index) = find(Path::new(CLASS)) {
            return Ok(index);
        }
        if Instant::now() > deadline {
            return Err(NetworkError::NoInterface);
        }
        sleep(APPEAR_PAUSE).await;
    }
}

/// The pod's interface is the only one with a device: those that the kernel makes by itself, such as `lo` and `sit0`,
/// have none. Its address cannot tell it, because in a VM that began as a copy of another one it has that one's.
fn find(class: &Path) -> Option<u32> {
    fs::read_dir(class).ok()?.flatten().find_map(|entry| {
        let interface = entry.path();
        if !interface.join(DEVICE).exists() {
            return None;
        }
        let index = fs::read_to_string(interface.join("ifindex")).ok()?;
        index.trim().parse().ok()
    })
}

fn prefix(text: &str) -> Result<Prefix, NetworkError> {
    let bad = || NetworkError::BadPrefix(text.to_owned());
    let (address, bits) = text.split_once('/').ok_or_else(bad)?;
    let address: IpAddr = address.parse().map_err(|_| bad())?;
    let bits: u8 = bits.parse().map_err(|_| bad())?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    if bits > most {
        Err(bad())
    } else {
        Ok(Prefix { address, bits })
    }
}

fn route(route: &agent::Route) -> Result<Route, NetworkError> {
    let given = |text: &str| (!text.is_empty()).then(|| address(text)).transpose();
    Ok(Route {
        destination: prefix(&route.destination)?,
        gateway: given(&route.gateway)?,
        source: given(&route.source)?,
        priority: route.priority,
        mtu: route.mtu,
        advmss: route.advmss,
    })
}

fn address(text: &str) -> Result<IpAddr, NetworkError> {
    text.parse()
        .map_err(|_| NetworkError::BadAddress(text.to_owned()))
}

fn mac(text: &str) -> Result<[u8; 6], NetworkError> {
    let octets = text.split(':').map(|octet| u8::from_str_radix(octet, 16));
    let octets: Result<Vec<u8>, _> = octets.collect();
    let octets = octets.ok().and_then(|octets| octets.try_into().ok());
    octets.ok_or_else(|| NetworkError::BadMac(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_interface_is_the_one_with_a_device() {
        let class = tempfile::tempdir().unwrap();
        let interface = |name: &str, index: &str| {
            let interface = class.path().join(name);
            fs::create_dir(&interface).unwrap();
            fs::write(interface.join("ifindex"), index).unwrap();
            interface
        };
        interface("lo", "1\n");
        interface("sit0", "2\n");
        assert_eq!(find(class.path()), None);
        let device = interface("eth0", "3\n").join(DEVICE);
        fs::create_dir(device).unwrap();
        assert_eq!(find(class.path()), Some(3));
        assert_eq!(find(&class.path().join("none")), None);
    }

    #[tokio::test]
    async fn an_interface_without_a_proper_address_is_refused() {
        let wanted = agent::Interface {
            mac: "02:00".into(),
            name: "eth0".into(),
            ..Default::default()
        };
        let refused = configure(&wanted).await.unwrap_err();
        assert!(matches!(refused, NetworkError::BadMac(mac) if mac == "02:00"));
    }

    #[test]
    fn a_mac_is_six_octets() {
        assert_eq!(mac("02:00:00:aB:ff:01").unwrap(), [2, 0, 0, 0xab, 0xff, 1]);
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "02:00:00:00:00:1ff",
            "x",
        ] {
            assert!(mac(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn prefixes_are_addresses_with_a_length_that_fits() {
        for good in [
            "10.88.0.5/16",
            "fd00::5/64",
            "0.0.0.0/0",
            "::/0",
            "1.2.3.4/32",
        ] {
            assert!(prefix(good).is_ok(), "{good}");
        }
        for bad in [
            "10.88.0.5",
            "10.88.0.5/33",
            "fd00::5/129",
            "x/8",
            "1.2.3.4/-1",
            "1.2.3.4/8/8",
            "",
        ] {
            assert!(prefix(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn interface_names_are_words() {
        for good in ["eth0", "net1", "a-b.c_d"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "..", "a/b", "sixteen-bytes-xx", "a b", "a:1"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
