// SPDX-License-Identifier: Apache-2.0
//! A pod's interface: its name, routes and neighbours.

use std::net::IpAddr;

/// The name of CNI's interface in the namespace.
pub const INTERFACE: &str = "eth0";
/// The MTU of an interface that has none set, and of a guest without a network.
pub const DEFAULT_MTU: u16 = 1500;

/// Whether a text is an address with a prefix length (CIDR notation). Rust's parser of numbers also takes a sign before
/// the digits, but other programs that get this text do not.
pub fn is_cidr(text: &str) -> bool {
    let parsed = text.split_once('/').and_then(|(address, prefix)| {
        let address: IpAddr = address.parse().ok()?;
        let digits = prefix.bytes().all(|byte| byte.is_ascii_digit());
        let bits: u8 = prefix.parse().ok().filter(|_| digits)?;
        Some(bits <= if address.is_ipv4() { 32 } else { 128 })
    });
    parsed == Some(true)
}

/// A route of the pod. 0 and empty mean "not set".
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// In CIDR notation.
    pub destination: String,
    /// Empty if the destination is on the link.
    pub gateway: String,
    /// The preferred source address.
    pub source: String,
    pub priority: u32,
    pub mtu: u32,
    /// The largest TCP segment that is advertised.
    pub advmss: u32,
}

/// A static neighbour: its MAC address is known without ARP or NDP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbor {
    pub address: String,
    pub mac: [u8; 6],
}

#[cfg(test)]
mod tests {
    use super::is_cidr;

    #[test]
    fn an_address_has_a_prefix_length_of_digits_that_fits() {
        for text in ["10.0.0.1/8", "0.0.0.0/0", "fd00::1/128"] {
            assert!(is_cidr(text), "{text}");
        }
        for text in [
            "10.0.0.1",
            "10.0.0.1/33",
            "fd00::1/129",
            "10.0.0.1/+8",
            "10.0.0.1/",
            "x/8",
        ] {
            assert!(!is_cidr(text), "{text}");
        }
    }

    #[test]
    fn for_all_numbers_a_prefix_length_fits_its_address() {
        for (address, most) in [("10.1.2.3", 32), ("fd00::1", 128)] {
            for bits in 0..=1000 {
                assert_eq!(
                    is_cidr(&format!("{address}/{bits}")),
                    bits <= most,
                    "{address}/{bits}"
                );
            }
        }
    }
}
