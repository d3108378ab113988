// SPDX-License-Identifier: Apache-2.0
//! Network: the guest has what CNI configured, and traffic between pods, the host and its ports arrives unchanged.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use bulkhead_proto::cri::{
    NetworkConfig, PodSandboxNetworkStatus, PodSandboxStatusRequest, PortMapping, Protocol,
    RuntimeConfig, UpdateRuntimeConfigRequest,
};
use bulkhead_tests::client::{Client, Pod, assert_fails};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::{PATIENCE, try_until_blocking};
use tonic::Code;

const GATEWAY: &str = "10.88.0.1";

pub async fn addresses(client: &mut Client, id: &str) -> PodSandboxNetworkStatus {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: id.into(),
        verbose: false,
    };
    let answer = client.runtime.pod_sandbox_status(request).await;
    let status = answer.expect("status").into_inner().status;
    status.and_then(|status| status.network).expect("a network")
}

/// Runs a pod with one container that sleeps. Returns the pod, the container's id, and the pod's first address.
async fn start(client: &mut Client, name: &str, image: &str) -> (Pod, String, String) {
    let pod = client.run_pod(name).await.expect("run pod");
    start_in(client, pod, image).await
}

async fn start_in(client: &mut Client, pod: Pod, image: &str) -> (Pod, String, String) {
    let id = client
        .run_script(&pod, "main", image, "exec sleep 1000")
        .await;
    let address = addresses(client, &pod.id).await.ip;
    (pod, id, address)
}

/// Listens for one connection, sends `bytes`, and reads until the end. Returns the address and the thread, which
/// returns what it read.
fn serve_once(address: &str, bytes: Vec<u8>) -> (SocketAddr, std::thread::JoinHandle<Vec<u8>>) {
    let address: IpAddr = address.parse().expect("an address");
    let listener = TcpListener::bind((address, 0)).expect("listen");
    let at = listener.local_addr().expect("its address");
    let served = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        stream.set_read_timeout(Some(PATIENCE)).expect("time limit");
        let mut writer = stream.try_clone().expect("clone");
        let writing = std::thread::spawn(move || {
            // Some clients close the connection when their input ends, so without bytes to send nothing is closed here.
            if !bytes.is_empty() {
                writer.write_all(&bytes).expect("send");
                writer.shutdown(std::net::Shutdown::Write).expect("end");
            }
        });
        let mut back = Vec::new();
        stream.read_to_end(&mut back).expect("receive");
        writing.join().expect("the writer");
        back
    });
    (at, served)
}

fn noise(len: usize) -> Vec<u8> {
    let mut state: u32 = 1;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..len).map(next).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_have_cnis_address_and_reach_the_host_and_each_other() {
    let daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    Registry::shared().push("udp");
    let image = Registry::shared().image("test/udp");
    client.pull(&image).await.expect("pull");
    let (pod, one, _) = start(&mut client, "one", &image).await;
    let (other, two, address) = start(&mut client, "two", &image).await;
    assert!(address.starts_with("10.88."), "{address}");
    let shown = client.shell(&two, "ip -4 addr show eth0").await;
    assert!(shown.contains(&address), "{shown}");
    for target in [GATEWAY, &address] {
        let line = format!("ping -c 2 -W 10 {target}");
        let answer = client.shell(&one, &line).await;
        assert!(answer.contains(" 0% packet loss"), "{target}: {answer}");
    }
    // Busybox's nc ends when its standard input ends. So the reader's stays open.
    client
        .shell(
            &two,
            "udp-echo 53 >/dev/null 2>&1 &
             (head -c 2000000 /dev/zero | nc -l -p 8000 >/dev/null 2>&1) &",
        )
        .await;
    for port in [53, 8000] {
        client.until_listening(&two, port).await;
    }
    let line =
        format!("mkfifo /open; sleep 60 >/open & nc -w 20 {address} 8000 </open | wc -c; kill $!");
    assert_eq!(client.shell(&one, &line).await, "2000000\n");
    // UDP, with datagrams that fit a frame and ones that are fragmented.
    for len in [5, 5000] {
        let line = format!("udp-echo {address} 53 $(head -c {len} /dev/zero | tr '\\0' x) | wc -c");
        assert_eq!(client.shell(&one, &line).await, format!("{}\n", len + 1));
    }
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
    ask(&socket, &format!("{address}:53"));
    for pod in [&pod, &other] {
        client.end_pod(pod).await;
    }
}

/// Sends a datagram to a `udp-echo` until it answers.
fn ask(socket: &UdpSocket, address: &str) {
    let limit = Some(Duration::from_secs(1));
    socket.set_read_timeout(limit).expect("time limit");
    let answered = try_until_blocking(&format!("{address} answers"), PATIENCE, || {
        let mut answer = [0; 16];
        socket.send_to(b"question", address).expect("send");
        let received = socket.recv_from(&mut answer);
        let (len, _) = received.map_err(|error| error.to_string())?;
        Ok(answer[..len].to_vec())
    });
    let answer = answered.unwrap_or_else(|late| panic!("{late}"));
    assert_eq!(answer, b"question");
}

const DUAL_STACK: &str = r#"{
  "cniVersion": "1.0.0",
  "name": "bulkhead-dual",
  "plugins": [{
    "type": "bridge", "bridge": "bulkhead-dual", "isGateway": true, "mtu": 1400,
    "dns": { "nameservers": ["10.89.0.53"], "search": ["from.cni"] },
    "ipam": {
      "type": "host-local", "dataDir": "/run/bulkhead-tests-ipam",
      "ranges": [[{ "subnet": "10.89.0.0/24" }], [{ "subnet": "fd00:89::/64" }]],
      "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }, { "dst": "172.30.0.0/16", "gw": "10.89.0.77" }]
    }
  }]
}"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_dual_stack_pod_has_addresses_routes_mtu_and_dns_and_carries_ten_megabytes_unchanged() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    daemon.configure_network("10-dual.conflist", DUAL_STACK);
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let (pod, id, _) = start(&mut client, "dual", &busybox).await;
    let network = addresses(&mut client, &pod.id).await;
    assert!(network.ip.starts_with("10.89.0."), "{network:?}");
    let six = &network.additional_ips[0].ip;
    assert!(six.starts_with("fd00:89::"), "{network:?}");
    let shown = client
        .shell(
            &id,
            "ip addr show eth0; ip route; ip -6 route; cat /etc/resolv.conf",
        )
        .await;
    for expected in [
        "mtu 1400",
        &network.ip,
        &format!("{six}/64"),
        "default via 10.89.0.1 dev eth0",
        "172.30.0.0/16 via 10.89.0.77 dev eth0",
        "default via fd00:89::1 dev eth0",
        "nameserver 10.89.0.53",
        "search from.cni",
    ] {
        assert!(shown.contains(expected), "{expected:?} is not in {shown}");
    }
    assert!(!shown.contains("tentative"), "{shown}");
    // Ping and low ports need no privilege, as in containerd's pods.
    let line =
        "cat /proc/sys/net/ipv4/ping_group_range /proc/sys/net/ipv4/ip_unprivileged_port_start";
    let settings = client.shell(&id, line).await;
    assert_eq!(settings, "0\t2147483647\n0\n");
    for gateway in ["10.89.0.1", "fd00:89::1"] {
        let answer = client
            .shell(&id, &format!("ping -c 1 -W 10 {gateway}"))
            .await;
        assert!(answer.contains(" 0% packet loss"), "{answer}");
        // From the host into the pod, and back.
        let sent = noise(10_000_000);
        let (at, served) = serve_once(gateway, sent.clone());
        let line = format!(
            "mkfifo /open; sleep 60 >/open & nc {} {} </open >/data; kill $!; rm /open",
            at.ip(),
            at.port()
        );
        client.shell(&id, &line).await;
        assert_eq!(served.join().expect("the server"), b"");
        let (at, served) = serve_once(gateway, Vec::new());
        let line = format!("nc {} {} </data; rm /data", at.ip(), at.port());
        client.shell(&id, &line).await;
        let back = served.join().expect("the server");
        assert!(back == sent, "{} bytes came back changed", back.len());
    }
    client.end_pod(&pod).await;

    // A pod may do without IPv6, though its network has it.
    let mut config = client.pod_config("four");
    let sysctls = ["all", "default", "eth0"];
    let sysctls = sysctls.map(|name| (format!("net.ipv6.conf.{name}.disable_ipv6"), "1".into()));
    config.linux.get_or_insert_default().sysctls = sysctls.into();
    let pod = client.run_pod_with(config).await.expect("run pod");
    let (pod, id, address) = start_in(&mut client, pod, &busybox).await;
    let shown = client.shell(&id, "ip addr; ip route; ip -6 route").await;
    assert!(shown.contains(&format!("inet {address}/24")), "{shown}");
    assert!(shown.contains("default via 10.89.0.1"), "{shown}");
    assert!(!shown.contains("inet6"), "{shown}");
    client.shell(&id, "ping -c 1 -W 10 10.89.0.1").await;
    client.end_pod(&pod).await;
}

/// A chain whose plugins take address ranges, port mappings and bandwidth limits from the runtime.
const CAPABLE: &str = r#"{
  "cniVersion": "1.0.0",
  "name": "bulkhead-capable",
  "plugins": [
    {
      "type": "bridge", "bridge": "bulkhead-cap", "isGateway": true, "hairpinMode": true,
      "capabilities": { "ipRanges": true },
      "ipam": { "type": "host-local", "dataDir": "/run/bulkhead-tests-ipam", "routes": [{ "dst": "0.0.0.0/0" }] }
    },
    { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true },
    { "type": "bandwidth", "capabilities": { "bandwidth": true } }
  ]
}"#;

fn published(
    protocol: Protocol,
    container_port: i32,
    host_port: i32,
    host_ip: &str,
) -> PortMapping {
    PortMapping {
        protocol: protocol.into(),
        container_port,
        host_port,
        host_ip: host_ip.into(),
    }
}

/// Connects to a TCP server and returns what it sends; `None` if nobody answers.
fn greeting(address: &str) -> Option<String> {
    let address: SocketAddr = address.parse().expect("an address");
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).ok()?;
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

#[tokio::test(flavor = "multi_thread")]
async fn port_mappings_bandwidth_and_address_ranges_reach_plugins_with_these_capabilities() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    daemon.configure_network("10-capable.conflist", CAPABLE);
    let mut client = daemon.client().await;
    Registry::shared().push("udp");
    let image = Registry::shared().image("test/udp");
    client.pull(&image).await.expect("pull");
    let cidr = |pod_cidr: &str| UpdateRuntimeConfigRequest {
        runtime_config: Some(RuntimeConfig {
            network_config: Some(NetworkConfig {
                pod_cidr: pod_cidr.into(),
            }),
        }),
    };
    let refused = client.runtime.update_runtime_config(cidr("10.87")).await;
    assert_fails(refused, Code::InvalidArgument, &["10.87", "subnet"]);
    let told = client
        .runtime
        .update_runtime_config(cidr("10.87.3.0/24"))
        .await;
    told.expect("tell the pods' subnet");

    let mut config = client.pod_config("server");
    config.port_mappings = vec![
        published(Protocol::Tcp, 80, 18080, ""),
        published(Protocol::Udp, 53, 18053, ""),
        published(Protocol::Tcp, 80, 18081, "10.87.3.1"),
    ];
    let ingress = "kubernetes.io/ingress-bandwidth".to_owned();
    let egress = "kubernetes.io/egress-bandwidth".to_owned();
    config.annotations.insert(ingress.clone(), "64M".into());
    config.annotations.insert(egress, "much".into());
    let refused = client.run_pod_with(config.clone()).await;
    assert_fails(
        refused,
        Code::InvalidArgument,
        &["egress-bandwidth", "much"],
    );
    config.annotations.retain(|name, _| *name == ingress);
    let before = qdiscs();
    assert!(!before.contains("tbf"), "{before}");
    let pod = client.run_pod_with(config).await.expect("run pod");
    let (server, id, address) = start_in(&mut client, pod, &image).await;
    assert!(address.starts_with("10.87.3."), "{address}");
    let during = qdiscs();
    assert!(
        during.contains("tbf") && during.contains("64Mbit"),
        "{during}"
    );

    let (asker, from, _) = start(&mut client, "asker", &image).await;
    let serving = "udp-echo 53 >/dev/null 2>&1 &
        (while true; do echo hello | nc -l -p 80; done) >/dev/null 2>&1 &";
    client.shell(&id, serving).await;
    client.until_listening(&id, 53).await;
    for address in ["127.0.0.1:18080", "10.0.2.15:18080", "10.87.3.1:18081"] {
        // Each `nc` serves one connection.
        client.until_listening(&id, 80).await;
        let said = tokio::task::block_in_place(|| greeting(address));
        assert_eq!(said.as_deref(), Some("hello\n"), "{address}");
    }
    let elsewhere = tokio::task::block_in_place(|| greeting("10.0.2.15:18081"));
    assert_eq!(elsewhere, None, "published on one address of the host only");
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
    tokio::task::block_in_place(|| ask(&socket, "10.0.2.15:18053"));
    // From another pod, and from the pod itself, to which the bridge sends the frames back (hairpin).
    for asking in [&from, &id] {
        client.until_listening(&id, 80).await;
        let said = client
            .shell(asking, "nc -w 20 10.0.2.15 18080 </dev/null")
            .await;
        assert_eq!(said, "hello\n");
    }
    let line = "udp-echo 10.0.2.15 18053 datagram";
    assert_eq!(client.shell(&from, line).await, "datagram\n");
    for pod in [&server, &asker] {
        client.end_pod(pod).await;
    }
    assert_eq!(greeting("127.0.0.1:18080"), None);
    let after = qdiscs();
    assert!(!after.contains("tbf"), "{after}");
}

fn qdiscs() -> String {
    let output = std::process::Command::new("tc")
        .args(["qdisc", "show"])
        .output();
    String::from_utf8_lossy(&output.expect("run tc").stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_cni_configuration_a_pod_has_loopback_only() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let (pod, id, address) = start(&mut client, "alone", &busybox).await;
    assert_eq!(address, "");
    client.shell(&id, "ping -c 1 -W 5 127.0.0.1").await;
    client.end_pod(&pod).await;
}
