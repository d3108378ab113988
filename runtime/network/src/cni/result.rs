// SPDX-License-Identifier: Apache-2.0
//! The final result of a chain's `ADD`, as far as it is used here.
//!
//! Source: the CNI specification 1.1.0, "ADD Success". Versions 0.3 and 0.4 have the same fields. A plugin is chosen by
//! the administrator, but its output is limited and checked like any other input.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::Value;

use crate::link::{INTERFACE, Route, is_cidr};
use crate::request::Dns;

const MOST_ADDRESSES: usize = 256;
const MOST_ROUTES: usize = 4096;
const MOST_INTERFACES: usize = 1024;

/// The final result of a chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddResult {
    /// The result as the last plugin wrote it. `CHECK` and `DEL` need it again.
    pub text: String,
    /// The addresses of the pod's interface, with prefix lengths.
    pub addresses: Vec<String>,
    pub routes: Vec<Route>,
    pub dns: Dns,
    /// Other interfaces of the pod than [`INTERFACE`]. A VM does not get them.
    pub others: Vec<String>,
}

#[derive(Deserialize)]
struct RawResult {
    #[serde(default)]
    interfaces: Vec<RawInterface>,
    #[serde(default)]
    ips: Vec<RawIp>,
    #[serde(default)]
    routes: Vec<RawRoute>,
    #[serde(default)]
    dns: RawDns,
}

#[derive(Deserialize)]
struct RawInterface {
    #[serde(default)]
    name: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct RawIp {
    address: String,
    #[serde(default)]
    gateway: String,
    interface: Option<usize>,
}

/// `mtu`, `advmss`, `priority` and `table` exist since 1.1.0.
#[derive(Deserialize)]
struct RawRoute {
    dst: String,
    #[serde(default)]
    gw: String,
    #[serde(default)]
    mtu: u32,
    #[serde(default)]
    advmss: u32,
    #[serde(default)]
    priority: u32,
    table: Option<u32>,
}

#[derive(Default, Deserialize)]
struct RawDns {
    #[serde(default)]
    nameservers: Vec<String>,
    #[serde(default)]
    domain: String,
    #[serde(default)]
    search: Vec<String>,
    #[serde(default)]
    options: Vec<String>,
}

/// The main routing table (`RT_TABLE_MAIN`). Others are used only with routing rules, which a guest does not have.
const MAIN_TABLE: u32 = 254;

impl AddResult {
    pub fn parse(value: &Value) -> Result<Self, String> {
        let text = value.to_string();
        if !value.is_object() {
            return Err(format!("an invalid result: {text}"));
        }
        let raw: RawResult =
            RawResult::deserialize(value).map_err(|e| format!("an invalid result: {e}"))?;
        if raw.ips.len() > MOST_ADDRESSES
            || raw.routes.len() > MOST_ROUTES
            || raw.interfaces.len() > MOST_INTERFACES
        {
            return Err("too many interfaces, addresses or routes".to_owned());
        }
        // The result also lists the host's interfaces. Those of the pod have a sandbox.
        let ours =
            |interface: &RawInterface| !interface.sandbox.is_empty() && interface.name == INTERFACE;
        let mut ips = Vec::new();
        for ip in &raw.ips {
            let is_ours = match ip.interface {
                Some(index) => ours(interface(&raw.interfaces, index, &ip.address)?),
                None => true,
            };
            if is_ours {
                check_cidr(&ip.address)?;
                ips.push(ip);
            }
        }
        let gateway = |ipv6: bool| {
            let mut same_family = ips.iter().filter(|ip| ip.address.contains(':') == ipv6);
            same_family
                .find(|ip| !ip.gateway.is_empty())
                .map(|ip| ip.gateway.clone())
        };
        let main = |route: &RawRoute| route.table.is_none_or(|table| table == MAIN_TABLE);
        let mut routes = Vec::new();
        for route in raw.routes.into_iter().filter(main) {
            check_cidr(&route.dst)?;
            let via = Some(route.gw).filter(|gateway| !gateway.is_empty());
            let via = via
                .or_else(|| gateway(route.dst.contains(':')))
                .unwrap_or_default();
            if !via.is_empty() && via.parse::<IpAddr>().is_err() {
                return Err(format!("the invalid gateway {via:?}"));
            }
            routes.push(Route {
                destination: route.dst,
                gateway: via,
                priority: route.priority,
                mtu: route.mtu,
                advmss: route.advmss,
                ..Route::default()
            });
        }
        let mut searches = raw.dns.search;
        if searches.is_empty() && !raw.dns.domain.is_empty() {
            searches.push(raw.dns.domain);
        }
        let addresses = ips.iter().map(|ip| ip.address.clone()).collect();
        let others = raw
            .interfaces
            .into_iter()
            .filter(|one| !one.sandbox.is_empty() && one.name != INTERFACE && one.name != "lo");
        Ok(Self {
            text,
            addresses,
            routes,
            dns: Dns {
                servers: raw.dns.nameservers,
                searches,
                options: raw.dns.options,
            },
            others: others.map(|one| one.name).collect(),
        })
    }
}

/// Returns the interface that has an address.
fn interface<'a>(
    all: &'a [RawInterface],
    index: usize,
    address: &str,
) -> Result<&'a RawInterface, String> {
    let number = all.len();
    all.get(index).ok_or_else(|| {
        format!(
            "the address {address:?} of interface {index}, but the result lists {number} interfaces"
        )
    })
}

fn check_cidr(text: &str) -> Result<(), String> {
    match is_cidr(text) {
        true => Ok(()),
        false => Err(format!("the invalid address {text:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: Value) -> Result<AddResult, String> {
        AddResult::parse(&value)
    }

    #[test]
    fn what_is_the_pods_is_told_from_what_is_the_hosts() {
        let result = parse(serde_json::json!({
            "interfaces": [{"name": "br"}, {"name": "eth0", "sandbox": "/n"}, {"name": "net1", "sandbox": "/n"}],
            "ips": [
                {"address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 1},
                {"address": "10.9.9.9/24", "interface": 0},
                {"address": "10.8.0.1/24", "interface": 2},
                {"address": "fd00::5/64", "gateway": "fd00::1"}
            ],
            "routes": [
                {"dst": "0.0.0.0/0"},
                {"dst": "10.2.0.0/16", "gw": "10.1.0.9", "mtu": 1400, "priority": 7, "advmss": 1300},
                {"dst": "::/0"},
                {"dst": "10.3.0.0/16", "table": 100}
            ],
            "dns": {"nameservers": ["10.1.0.53"], "domain": "cluster.local"}
        }))
        .unwrap();
        assert_eq!(result.addresses, ["10.1.0.5/16", "fd00::5/64"]);
        assert_eq!(result.others, ["net1"]);
        let routes: Vec<_> = result
            .routes
            .iter()
            .map(|route| {
                (
                    route.destination.as_str(),
                    route.gateway.as_str(),
                    route.mtu,
                )
            })
            .collect();
        assert_eq!(
            routes,
            [
                ("0.0.0.0/0", "10.1.0.1", 0),
                ("10.2.0.0/16", "10.1.0.9", 1400),
                ("::/0", "fd00::1", 0)
            ]
        );
        assert_eq!(result.dns.servers, ["10.1.0.53"]);
        assert_eq!(result.dns.searches, ["cluster.local"]);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (value, word) in [
            (
                serde_json::json!({"ips": [{"address": "10.0.0.300/8"}]}),
                "10.0.0.300/8",
            ),
            (
                serde_json::json!({"routes": [{"dst": "default"}]}),
                "default",
            ),
            (
                serde_json::json!({"routes": [{"dst": "::/0", "gw": "there"}]}),
                "there",
            ),
            (
                serde_json::json!({
                    "interfaces": [{"name": "eth0", "sandbox": "/n"}],
                    "ips": [{"address": "10.0.0.1/8", "interface": 1}]
                }),
                "interface 1, but the result lists 1",
            ),
            (
                serde_json::json!({"ips": [{"address": "10.0.0.1/8", "interface": -1}]}),
                "invalid result",
            ),
            (serde_json::json!({"ips": 3}), "invalid result"),
            (serde_json::json!([]), "invalid result"),
            (
                serde_json::json!({"ips": vec![serde_json::json!({"address": "10.0.0.1/8"}); 300]}),
                "too many",
            ),
        ] {
            let error = parse(value).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
