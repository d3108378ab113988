// SPDX-License-Identifier: Apache-2.0
//! The pod's own files: `/etc/hosts`, `/etc/resolv.conf`, `/etc/hostname`. The agent keeps one copy, which all
//! containers see. Creating their texts is pure.

use std::fmt::Write;
use std::fs;
use std::io;
use std::os::unix::fs::chown;

use bulkhead_proto::agent::{ConfigureSandboxRequest, Dns, HostEntry};

pub const DIRECTORY: &str = "/run/pod";
pub const RESOLV_CONF: &str = "/run/pod/resolv.conf";
pub const HOSTS: &str = "/run/pod/hosts";
pub const HOSTNAME: &str = "/run/pod/hostname";
pub const SHM: &str = "/run/pod/shm";
/// The pod's message queues, for a pod whose users may not mount them themselves.
pub const MQUEUE: &str = "/run/pod/mqueue";
const MACHINE_ID: &str = "/run/machine-id";

/// Writes the files. They belong to the pod's root user, whose ids in the guest are given.
pub fn write(request: &ConfigureSandboxRequest, (uid, gid): (u32, u32)) -> io::Result<()> {
    let put = |path: &str, text: String| {
        fs::write(path, text)?;
        chown(path, Some(uid), Some(gid))
    };
    fs::create_dir_all(DIRECTORY)?;
    // Containers may have the file of an earlier configuration, so it is written without DNS, too.
    if request.dns.is_some() || fs::exists(RESOLV_CONF)? {
        let dns = request.dns.clone().unwrap_or_default();
        put(RESOLV_CONF, resolv_conf(&dns))?;
    }
    put(HOSTS, hosts(&request.hosts))?;
    put(HOSTNAME, format!("{}\n", one_word(&request.hostname)))?;
    fs::write(MACHINE_ID, format!("{}\n", one_word(&request.machine_id)))
}

fn resolv_conf(dns: &Dns) -> String {
    let mut text = String::new();
    let searches: Vec<String> = dns.searches.iter().map(|s| one_word(s)).collect();
    if !searches.is_empty() {
        let _ = writeln!(text, "search {}", searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {}", one_word(server));
    }
    let options: Vec<String> = dns.options.iter().map(|s| one_word(s)).collect();
    if !options.is_empty() {
        let _ = writeln!(text, "options {}", options.join(" "));
    }
    text
}

fn hosts(entries: &[HostEntry]) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\n\
         fe00::1\tip6-allnodes\n\
         fe00::2\tip6-allrouters\n",
    );
    for entry in entries {
        let names: Vec<String> = entry.names.iter().map(|name| one_word(name)).collect();
        let _ = writeln!(text, "{}\t{}", one_word(&entry.address), names.join(" "));
    }
    text
}

/// Removes characters that would end a line or a field.
fn one_word(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_whitespace() && !c.is_control())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::{hosts, resolv_conf};
    use bulkhead_proto::agent::{Dns, HostEntry};

    #[test]
    fn resolv_conf_has_a_line_for_each_kind() {
        let strings = |list: &[&str]| list.iter().map(ToString::to_string).collect();
        let dns = Dns {
            servers: strings(&["10.0.0.10", "fd00::a"]),
            searches: strings(&["a.svc", "b.svc"]),
            options: strings(&["ndots:5"]),
        };
        let expected =
            "search a.svc b.svc\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n";
        assert_eq!(resolv_conf(&dns), expected);
        assert_eq!(resolv_conf(&Dns::default()), "");
        let dns = Dns {
            servers: strings(&["1.1.1.1\noptions evil"]),
            ..Dns::default()
        };
        assert_eq!(resolv_conf(&dns), "nameserver 1.1.1.1optionsevil\n");
    }

    #[test]
    fn hosts_start_with_localhost() {
        let entry = HostEntry {
            address: "10.1.2.3".into(),
            names: vec!["pod".into(), "alias".into()],
        };
        let text = hosts(&[entry]);
        assert!(text.starts_with("127.0.0.1\tlocalhost\n"));
        assert!(text.ends_with("10.1.2.3\tpod alias\n"));
    }
}
