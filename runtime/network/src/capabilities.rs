// SPDX-License-Identifier: Apache-2.0
//! What a pod wants beside an interface, as the capabilities that plugins may declare: ports of the host, limits of its
//! traffic, subnets, DNS, annotations.
//!
//! Source: CNI's CONVENTIONS.md for the capabilities' forms.

use serde_json::{Map, Value, json};

use crate::bandwidth;
use crate::failure::NetworkError;
use crate::request::AttachRequest;

/// The capability by which containerd and CRI-O pass a pod's annotations on.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";

/// By name. `ip_ranges`: the subnets that addresses come from, where the node's configuration says so.
pub fn of_request(
    request: &AttachRequest,
    ip_ranges: &[String],
) -> Result<Map<String, Value>, NetworkError> {
    let mut found = Map::new();
    // Port 0 of the host: the container's port is declared, not published.
    let published = request.port_mappings.iter();
    let published: Vec<_> = published.filter(|one| one.host_port != 0).collect();
    if !published.is_empty() {
        found.insert("portMappings".to_owned(), json!(published));
    }
    if let Some(bandwidth) = bandwidth::of_annotations(&request.annotations)? {
        found.insert("bandwidth".to_owned(), json!(bandwidth));
    }
    if !ip_ranges.is_empty() {
        // Each is a set of its own: a pod gets an address of every set.
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
