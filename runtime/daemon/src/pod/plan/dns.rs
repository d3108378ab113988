// SPDX-License-Identifier: Apache-2.0
//! The DNS settings of a pod.

use bulkhead_network::Attachment;

use crate::pod::life::spec::{Dns, PodSpec};

/// The pod's own settings, else those of the network, else those of the host in `resolv_conf`. A pod without a network
/// gets no settings from the host, which it could not use.
pub fn of_pod(spec: &PodSpec, attachment: &Attachment, resolv_conf: &str) -> Dns {
    if let Some(dns) = &spec.dns {
        return dns.clone();
    }
    let found = &attachment.dns;
    if !found.servers.is_empty() {
        return Dns {
            servers: found.servers.clone(),
            searches: found.searches.clone(),
            options: found.options.clone(),
        };
    }
    if attachment.tap.is_none() {
        return Dns::default();
    }
    parse(resolv_conf)
}

/// Parses resolv.conf(5). A name server on the host's loopback is left out, because a guest cannot reach it.
fn parse(text: &str) -> Dns {
    let mut dns = Dns::default();
    for line in text.lines() {
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => dns.servers.extend(
                words
                    .take(1)
                    .filter(|server| !server.starts_with("127.") && server != "::1"),
            ),
            Some("search") => dns.searches = words.collect(),
            Some("options") => dns.options.extend(words),
            _ => {}
        }
    }
    dns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_is_read_without_the_hosts_own_resolver() {
        let dns =
            parse("# c\nnameserver 127.0.0.53\nnameserver 1.1.1.1\nsearch a b\noptions ndots:5\n");
        assert_eq!(dns.servers, ["1.1.1.1"]);
        assert_eq!(dns.searches, ["a", "b"]);
        assert_eq!(dns.options, ["ndots:5"]);
    }
}
