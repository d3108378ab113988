// SPDX-License-Identifier: Apache-2.0
//! What a pod wants in addition to an interface: ports of the host, traffic limits, subnets, DNS, annotations. CNI
//! plugins get these as the capabilities that they declare.
//!
//! Source: CNI's CONVENTIONS.md for the format of capabilities.

use serde_json::{Map, Value, json};

use crate::bandwidth;
use crate::failure::NetworkError;
use crate::request::AttachRequest;

/// The capability with a pod's annotations, which containerd and CRI-O also use.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// The capabilities of a pod by name. `ip_ranges` are the subnets for its addresses, if they are configured.
pub fn of_request(
    request: &AttachRequest,
    ip_ranges: &[String],
) -> Result<Map<String, Value>, NetworkError> {
    let mut found = Map::new();
    // A host port of 0 means that the container's port is only declared, not published.
    let published = request.port_mappings.iter();
    let published: Vec<_> = published.filter(|one| one.host_port != 0).collect();
    if !published.is_empty() {
        found.insert("portMappings".to_owned(), json!(published));
    }
    if let Some(bandwidth) = bandwidth::of_annotations(&request.annotations)? {
        found.insert("bandwidth".to_owned(), json!(bandwidth));
    }
    if !ip_ranges.is_empty() {
        // Each subnet is a set of its own, because a pod gets one address from every set.
        let sets: Vec<_> = ip_ranges
            .iter()
            .map(|subnet| json!([{ "subnet": subnet }]))
            .collect();
        found.insert("ipRanges".to_owned(), json!(sets));
    }
    if let Some(dns) = &request.dns {
        let dns =
            json!({ "servers": dns.servers, "searches": dns.searches, "options": dns.options });
        found.insert("dns".to_owned(), dns);
    }
    if !request.annotations.is_empty() {
        found.insert(ANNOTATIONS.to_owned(), json!(request.annotations));
    }
    Ok(found)
}
