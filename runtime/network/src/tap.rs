// SPDX-License-Identifier: Apache-2.0
//! Connects CNI's interface with a TAP: each packet that arrives at one leaves through the other, below the namespace's
//! own network stack. So the stack receives no packets. It must not send any through the TAP either, so IPv6 is
//! disabled there.

use std::os::fd::OwnedFd;
use std::path::Path;

use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::{Handle, LinkUnspec, new_connection};

use crate::failure::{NetworkError, device_error};
use crate::interface::Interface;
use crate::link::DEFAULT_MTU;
use crate::{netns, sys};

const TAP: &str = "tap0";
/// Disables IPv6 on the TAP, so that the guest does not get router solicitations of the namespace's stack.
const TAP_WITHOUT_IPV6: &str = "/proc/sys/net/ipv6/conf/tap0/disable_ipv6";
/// The ingress qdisc's handle, "ffff:".
const INGRESS: u32 = 0xffff_0000;

/// A TAP that is connected with CNI's interface.
#[derive(Debug)]
pub struct Joined {
    pub tap: OwnedFd,
    pub mac: [u8; 6],
    pub mtu: u16,
    /// The settings of CNI's interface.
    pub interface: Interface,
}

/// Connects a TAP in the namespace at `path` with `interface`: `tap`, or one that is made.
pub async fn join(
    path: &Path,
    interface: &'static str,
    tap: Option<OwnedFd>,
) -> Result<Joined, NetworkError> {
    netns::inside(path, move || join_here(interface, tap)).await
}

/// Makes a TAP in the namespace at `path` that is connected with nothing.
pub async fn inside(path: &Path) -> Result<OwnedFd, NetworkError> {
    netns::inside_blocking(path, make).await
}

/// Makes a TAP that is connected with nothing, in a namespace of its own. Both last as long as the descriptor.
pub async fn alone() -> Result<OwnedFd, NetworkError> {
    netns::in_a_new_one(make).await
}

fn make() -> Result<OwnedFd, NetworkError> {
    let made = sys::make_tap(TAP);
    made.map_err(device_error(
        "make the TAP (is /dev/net/tun there? modprobe tun)",
    ))
}

async fn join_here(interface: &'static str, tap: Option<OwnedFd>) -> Result<Joined, NetworkError> {
    let (connection, handle, _) = new_connection().map_err(device_error("open netlink"))?;
    let served = tokio::spawn(connection);
    let tap = match tap {
        Some(tap) => tap,
        None => make()?,
    };
    let outer = find(&handle, interface).await?;
    let inner = find(&handle, TAP).await?;
    let mtu = mtu_of(&outer);
    let mac = mac_of(&outer)?;
    let found = Interface::read(&handle, outer.header.index).await?;
    // An error is ignored, because without IPv6 in the kernel the file does not exist.
    let _ = std::fs::write(TAP_WITHOUT_IPV6, "1");
    let up = LinkUnspec::new_with_index(inner.header.index)
        .mtu(mtu.into())
        .up()
        .build();
    handle
        .link()
        .set(up)
        .execute()
        .await
        .map_err(device_error("bring the TAP up"))?;
    redirect(&handle, outer.header.index, inner.header.index).await?;
    redirect(&handle, inner.header.index, outer.header.index).await?;
    served.abort();
    Ok(Joined {
        tap,
        mac,
        mtu,
        interface: found,
    })
}

/// Redirects all packets that arrive at `from` to `to`.
async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), NetworkError> {
    let from = i32::try_from(from).map_err(device_error("convert an interface's index"))?;
    handle
        .qdisc()
        .add(from)
        .ingress()
        .execute()
        .await
        .map_err(device_error("add an ingress qdisc (modprobe sch_ingress)"))?;
    handle
        .traffic_filter(from)
        .add()
        .parent(INGRESS)
        .protocol(ALL_PROTOCOLS)
        .redirect(to)
        .map_err(device_error("make a redirect"))?
        .execute()
        .await
        .map_err(device_error("add a redirect (modprobe cls_u32 act_mirred)"))
}

/// ETH_P_ALL in network byte order, as the kernel expects it in `tcm_info`.
const ALL_PROTOCOLS: u16 = 0x0003_u16.to_be();

async fn find(handle: &Handle, name: &str) -> Result<LinkMessage, NetworkError> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    let found = links
        .try_next()
        .await
        .map_err(device_error("look for an interface"))?;
    found.ok_or_else(|| device_error("look for an interface")(format!("{name} is not there")))
}

fn mtu_of(link: &LinkMessage) -> u16 {
    let mtu = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        });
    mtu.and_then(|mtu| u16::try_from(mtu).ok())
        .unwrap_or(DEFAULT_MTU)
}

fn mac_of(link: &LinkMessage) -> Result<[u8; 6], NetworkError> {
    let mac = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Address(address) => <[u8; 6]>::try_from(address.as_slice()).ok(),
            _ => None,
        });
    mac.ok_or_else(|| {
        device_error("read the interface's address")("it is not an Ethernet address".to_owned())
    })
}
