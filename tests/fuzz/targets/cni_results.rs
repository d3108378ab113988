// SPDX-License-Identifier: Apache-2.0
//! Results of CNI plugins.
//!
//! What is accepted are addresses and gateways that can be set in the guest.
#![no_main]

use std::net::IpAddr;

use bulkhead_network::fuzzing::AddResult;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(value) = serde_json::from_slice(bytes) else {
        return;
    };
    let Ok(result) = AddResult::parse(&value) else {
        return;
    };
    // The text says the same. JSON's numbers may be rounded in it.
    let again: serde_json::Value = serde_json::from_str(&result.text).expect("the result as text");
    let again = AddResult {
        text: result.text.clone(),
        ..AddResult::parse(&again).expect("the same result")
    };
    assert_eq!(again, result);
    let destinations = result.routes.iter().map(|route| &route.destination);
    for cidr in result.addresses.iter().chain(destinations) {
        let (address, prefix) = cidr.split_once('/').expect("a prefix length");
        assert!(
            address.parse::<IpAddr>().is_ok() && prefix.bytes().all(|byte| byte.is_ascii_digit()),
            "{cidr}"
        );
    }
    for route in &result.routes {
        let gateway = &route.gateway;
        assert!(
            gateway.is_empty() || gateway.parse::<IpAddr>().is_ok(),
            "{gateway}"
        );
    }
});
