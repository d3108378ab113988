// SPDX-License-Identifier: Apache-2.0
//! Reads how CNI's plugins have configured the interface in the namespace. The guest's interface gets the same
//! settings.
//!
//! A plugin's result need not be complete. For example, Calico sets routes that are not in its result, and Amazon's
//! plugin sets a static neighbour. So the namespace itself is read. The result only decides which address comes first.

use std::net::IpAddr;

use futures_util::TryStreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteType,
};

use crate::failure::{NetworkError, device_error};
use crate::link::{Neighbor, Route};

/// The settings of an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// In CIDR notation, without link-local addresses.
    pub addresses: Vec<String>,
    /// Without the routes that the kernel adds for each address.
    pub routes: Vec<Route>,
    pub neighbors: Vec<Neighbor>,
}

impl Interface {
    /// Reads the interface `index` in this thread's namespace.
    pub async fn read(handle: &Handle, index: u32) -> Result<Self, NetworkError> {
        let request = handle.address().get().set_link_index_filter(index);
        let addresses: Vec<_> = request
            .execute()
            .try_collect()
            .await
            .map_err(device_error("read the interface's addresses"))?;
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut wanted = RouteMessage::default();
            wanted.header.address_family = family;
            let found: Result<Vec<_>, _> = handle.route().get(wanted).execute().try_collect().await;
            routes.extend(found.map_err(device_error("read the interface's routes"))?);
        }
        let neighbors: Vec<_> = handle
            .neighbours()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(device_error("read the interface's neighbours"))?;
        Ok(Self {
            addresses: addresses
                .iter()
                .filter_map(|one| address(one, index))
                .collect(),
            routes: routes.iter().filter_map(|one| route(one, index)).collect(),
            neighbors: neighbors
                .iter()
                .filter_map(|one| neighbor(one, index))
                .collect(),
        })
    }

    /// Adds what only CNI's result tells: the order of addresses, and its routes if the namespace has none.
    pub fn complete(mut self, addresses: &[String], routes: &[Route]) -> Self {
        let mut all = addresses.to_vec();
        all.extend(self.addresses);
        let mut seen = Vec::new();
        all.retain(|address| {
            let new = !seen.contains(address);
            seen.push(address.clone());
            new
        });
        self.addresses = all;
        if self.routes.is_empty() {
            self.routes = routes.to_vec();
        }
        // A gateway is reached by a route on the link, which must be made first.
        self.routes.sort_by_key(|route| !route.gateway.is_empty());
        self
    }
}

/// Converts an address of the interface `index`. `None` for others and for link-local ones.
fn address(message: &AddressMessage, index: u32) -> Option<String> {
    let scoped = matches!(
        message.header.scope,
        AddressScope::Universe | AddressScope::Site
    );
    if message.header.index != index || !scoped {
        return None;
    }
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| {
        message.attributes.iter().find_map(wanted)
    };
    // On a point-to-point interface, the attribute `Address` is that of the peer.
    let local = find(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = local.or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })?;
    Some(format!("{address}/{}", message.header.prefix_len))
}

/// Converts a route of the interface `index`. `None` for routes of others, those of other tables, and those that the
/// kernel adds itself.
fn route(message: &RouteMessage, index: u32) -> Option<Route> {
    let header = &message.header;
    if header.kind != RouteType::Unicast
        || header.protocol == RouteProtocol::Kernel
        || header.table != RouteHeader::RT_TABLE_MAIN
    {
        return None;
    }
    let any = match header.address_family {
        AddressFamily::Inet => "0.0.0.0",
        AddressFamily::Inet6 => "::",
        _ => return None,
    };
    let mut destination = any.to_owned();
    let mut route = Route::default();
    let mut ours = false;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => ours = *oif == index,
            RouteAttribute::Destination(address) => destination = text(address)?,
            RouteAttribute::Gateway(address) => route.gateway = text(address)?,
            RouteAttribute::PrefSource(address) => route.source = text(address)?,
            RouteAttribute::Priority(priority) => route.priority = *priority,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(mtu) => route.mtu = *mtu,
                        RouteMetric::Advmss(advmss) => route.advmss = *advmss,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    route.destination = format!("{destination}/{}", header.destination_prefix_length);
    ours.then_some(route)
}

fn text(address: &RouteAddress) -> Option<String> {
    match address {
        RouteAddress::Inet(address) => Some(address.to_string()),
        RouteAddress::Inet6(address) => Some(address.to_string()),
        _ => None,
    }
}

/// Converts a static neighbour of the interface `index`. `None` for others.
fn neighbor(message: &NeighbourMessage, index: u32) -> Option<Neighbor> {
    if message.header.ifindex != index || message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut address = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => {
                address = Some(found.to_string());
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(found)) => {
                address = Some(found.to_string());
            }
            NeighbourAttribute::LinkLayerAddress(found) => mac = found.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbor {
        address: address?,
        mac: mac?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn via(destination: &str, gateway: &str) -> Route {
        Route {
            destination: destination.into(),
            gateway: gateway.into(),
            ..Route::default()
        }
    }

    #[test]
    fn the_result_says_which_address_is_first_and_the_namespace_what_there_is() {
        let found = Interface {
            addresses: vec![
                "fd00::5/64".into(),
                "10.1.0.5/16".into(),
                "10.1.0.6/16".into(),
            ],
            routes: vec![via("0.0.0.0/0", "169.254.1.1"), via("169.254.1.1/32", "")],
            neighbors: Vec::new(),
        };
        let told = ["10.1.0.5/16".to_owned(), "fd00::5/64".to_owned()];
        let whole = found.complete(&told, &[via("0.0.0.0/0", "10.1.0.1")]);
        assert_eq!(
            whole.addresses,
            ["10.1.0.5/16", "fd00::5/64", "10.1.0.6/16"]
        );
        assert_eq!(
            whole.routes,
            [via("169.254.1.1/32", ""), via("0.0.0.0/0", "169.254.1.1")]
        );
        let bare = Interface::default().complete(&told, &[via("::/0", "fd00::1")]);
        assert_eq!(bare.routes, [via("::/0", "fd00::1")]);
    }

    #[test]
    fn routes_of_the_kernels_own_and_of_other_interfaces_are_left_out() {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.kind = RouteType::Unicast;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Boot;
        message.attributes = vec![
            RouteAttribute::Oif(3),
            RouteAttribute::Gateway(RouteAddress::Inet([10, 0, 0, 1].into())),
            RouteAttribute::Metrics(vec![RouteMetric::Mtu(1400)]),
        ];
        let expected = Route {
            mtu: 1400,
            ..via("0.0.0.0/0", "10.0.0.1")
        };
        assert_eq!(route(&message, 3), Some(expected));
        assert_eq!(route(&message, 4), None);
        message.header.protocol = RouteProtocol::Kernel;
        assert_eq!(route(&message, 3), None);
    }
}
