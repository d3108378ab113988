// SPDX-License-Identifier: Apache-2.0
//! Network programs beside plain TCP: what users run unprivileged, and what needs a module of the kernel.

use std::io::{Read, Write};
use std::net::TcpListener;

use bulkhead_tests::workload::{Asks, Workload, ask};

const GATEWAY: &str = "10.88.0.1";
/// The user of Istio's proxy, whose own connections must not be redirected.
const PROXY: i64 = 1337;

#[tokio::test(flavor = "multi_thread")]
async fn ping_as_a_user() {
    let title = "ping: a user without capabilities pings itself and the gateway";
    let mut work = Workload::start("network", title).await;
    let id = work.run(work.idle("main").user(1000)).await;
    for (case, address) in [("itself", "127.0.0.1"), ("the gateway", GATEWAY)] {
        let line = format!("ping -c 2 -W 20 {address} | tail -n 2 | head -n 1");
        work.says(case, &id, &line, |said| said.contains(" 0% packet loss"))
            .await;
    }
    work.finish().await;
}

/// Istio's rules: inbound connections to 15006, outbound ones to 15001, but not the proxy's own.
const ISTIO: &str = "set -e
    iptables -t nat -N ISTIO_REDIRECT
    iptables -t nat -A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
    iptables -t nat -N ISTIO_IN_REDIRECT
    iptables -t nat -A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006
    iptables -t nat -N ISTIO_INBOUND
    iptables -t nat -A PREROUTING -p tcp -j ISTIO_INBOUND
    iptables -t nat -A ISTIO_INBOUND -p tcp --dport 15008 -j RETURN
    iptables -t nat -A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
    iptables -t nat -N ISTIO_OUTPUT
    iptables -t nat -A OUTPUT -p tcp -j ISTIO_OUTPUT
    iptables -t nat -A ISTIO_OUTPUT -o lo -s 127.0.0.6/32 -j RETURN
    iptables -t nat -A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN
    iptables -t nat -A ISTIO_OUTPUT -m owner --gid-owner 1337 -j RETURN
    iptables -t nat -A ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN
    iptables -t nat -A ISTIO_OUTPUT -j ISTIO_REDIRECT
    iptables-save -t nat | grep -c ISTIO_";

#[tokio::test(flavor = "multi_thread")]
async fn istios_redirection() {
    let title = "Istio: iptables of an init container redirect all connections of the pod but those of the proxy's user";
    let listener = TcpListener::bind(("0.0.0.0", 0)).expect("listen on the host");
    let port = listener.local_addr().expect("its address").port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let _ = stream.write_all(b"direct\n");
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    let mut work = Workload::start("network", title).await;
    let config = work
        .script("init", ISTIO)
        .capabilities(&["NET_ADMIN", "NET_RAW"]);
    let init = work.run(config).await;
    let code = work.client.exited(&init).await.exit_code;
    let log = work.log("init").await;
    work.row(
        "the init container",
        code == 0,
        format!("exit code {code}, rules: {log}"),
    );
    let proxies = "for port in 15001:outbound 15006:inbound; do \
        (while :; do echo ${port#*:} | nc -N -l -p ${port%:*}; done) & done; wait";
    let proxy = work.script("proxy", proxies).user(PROXY);
    let proxy = work.run(proxy).await;
    let app = work.run(work.idle("app").user(1000)).await;
    for port in [15001, 15006] {
        work.client.until_listening(&proxy, port).await;
    }
    let line = format!("nc -w 30 {GATEWAY} {port} </dev/null");
    work.equals(
        "a program's connection goes to the proxy",
        &app,
        &line,
        "outbound",
    )
    .await;
    work.equals(
        "the proxy's own goes where it should",
        &proxy,
        &line,
        "direct",
    )
    .await;
    let address = work.address(&work.pod.clone()).await;
    let inbound = ask(&address, 8080, "").await;
    let inbound = inbound.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    work.row(
        "a connection from outside goes to the proxy",
        inbound == Ok("inbound\n".to_owned()),
        format!("{inbound:?}"),
    );
    work.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wireguard_between_two_pods() {
    let title = "WireGuard: two pods make a tunnel, and what goes through it arrives";
    let mut work = Workload::start("network", title).await;
    let second = work.another_pod("second").await;
    let first = work.pod.clone();
    let mut ends = Vec::new();
    for (pod, name) in [(&first, "one"), (&second, "two")] {
        let config = work.idle(name).capabilities(&["NET_ADMIN"]);
        let id = work.run_in(pod, config).await;
        let line = "umask 077; wg genkey >/tmp/key && wg pubkey </tmp/key";
        let key = work.says("a key", &id, line, |said| said.len() == 44).await;
        ends.push((id, key, work.address(pod).await));
    }
    let [(one, key_one, address_one), (two, key_two, address_two)] = ends.try_into().expect("two");
    for (id, number, key, address) in [
        (&one, 1, &key_two, &address_two),
        (&two, 2, &key_one, &address_one),
    ] {
        let line = format!(
            "ip link add wg0 type wireguard && wg set wg0 private-key /tmp/key listen-port 51820 peer {key} \
             allowed-ips 10.77.0.0/24 endpoint {address}:51820 && ip addr add 10.77.0.{number}/24 dev wg0 && ip link set wg0 up && \
             wg show wg0 | grep -c peer"
        );
        work.equals("an end of the tunnel", id, &line, "1").await;
    }
    work.says(
        "ping through it",
        &one,
        "ping -c 2 -W 20 10.77.0.2 | tail -n 2 | head -n 1",
        |said| said.contains(" 0% packet loss"),
    )
    .await;
    work.sh(
        &two,
        "(nc -l -p 5000 >/tmp/got; echo end >>/tmp/got) >/dev/null 2>&1 &",
    )
    .await;
    work.client.until_listening(&two, 5000).await;
    work.sh(&one, "seq 100000 | nc -N 10.77.0.2 5000").await;
    let line =
        "until tail -n 1 /tmp/got | grep -q end; do sleep 0.2; done; sed '$d' /tmp/got | sha256sum";
    let (_, expected) = work.sh(&one, "seq 100000 | sha256sum").await;
    work.equals("600 kB through it", &two, line, &expected)
        .await;
    work.says(
        "both sides have shaken hands",
        &two,
        "wg show wg0 latest-handshakes",
        |said| !said.ends_with("\t0"),
    )
    .await;
    work.finish().await;
}

/// perl knows no names for SCTP, so these are its numbers: protocol 132.
const SCTP_SERVER: &str = "perl -MSocket -e 'socket(S, AF_INET, SOCK_STREAM, 132) or die $!; \
    bind(S, sockaddr_in(5000, INADDR_ANY)) or die $!; listen(S, 5) or die $!; $| = 1; print \"listens\\n\"; \
    while (accept(C, S)) { while (sysread(C, $text, 65536)) { syswrite(C, uc $text); } close C; }'";

#[tokio::test(flavor = "multi_thread")]
async fn sctp_between_two_pods() {
    let title = "SCTP: a server in one pod answers a client in another, as telephony does";
    let mut work = Workload::start("network", title).await;
    let config = work.script("server", SCTP_SERVER);
    let server = work.run(config).await;
    let line = "grep -q 5000 /proc/net/sctp/eps";
    let listens = work.until("a server listens", &server, line).await;
    if !listens {
        let log = work.log("server").await;
        work.row("what it said", false, log);
    }
    let address = work.address(&work.pod.clone()).await;
    let other = work.another_pod("other").await;
    let client = work.run_in(&other, work.idle("client")).await;
    let line = format!(
        "perl -MSocket -e 'socket(S, AF_INET, SOCK_STREAM, 132) or die $!; \
         connect(S, sockaddr_in(5000, inet_aton(\"{address}\"))) or die $!; syswrite(S, \"by sctp\"); sysread(S, $text, 100); print $text'"
    );
    work.equals("its client in another pod", &client, &line, "BY SCTP")
        .await;
    work.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_nfs_client_and_its_server() {
    let title = "NFS 4.1: a pod mounts what a server (NFS-Ganesha) in another pod exports";
    let mut work = Workload::start_privileged("nfs", title).await;
    let export = work.empty_dir("export");
    let server = work
        .script(
            "server",
            "exec ganesha.nfsd -F -L /dev/stdout -p /run/ganesha.pid -f /etc/ganesha/ganesha.conf",
        )
        .privileged()
        .volume(&export, "/export");
    let server = work.run(server).await;
    // It listens by IPv6 for both.
    let line = "grep -q ':0801 .* 0A ' /proc/net/tcp6 /proc/net/tcp";
    let listens = work.until("the server listens", &server, line).await;
    if !listens {
        let log = work.log("server").await;
        work.row("what it said", false, log);
    }
    let address = work.address(&work.pod.clone()).await;
    let other = work.another_pod("other").await;
    let config = work.idle("client").privileged();
    let client = work.run_in(&other, config).await;
    let own = work.address(&other).await;
    // Not by 4.2: reads by its READ_PLUS fail with EIO with this server, which is Debian 12's.
    let line = format!(
        "mount -i -t nfs4 -o vers=4.1,addr={address},clientaddr={own},proto=tcp,sec=sys,hard {address}:/export /mnt && \
         grep -c ' /mnt nfs4 ' /proc/mounts"
    );
    if !work.until("mount -t nfs4", &client, &line).await {
        let log = work.log("server").await;
        let said = log.lines().filter(|line| !line.contains("EVENT"));
        work.row("what it said", false, said.collect::<Vec<_>>().join("; "));
    }
    let line = "cd /mnt && seq 50000 >numbers && mkdir a && mv numbers a/ && chmod 640 a/numbers && chown 5:6 a/numbers && sync && \
        stat -c '%u %g %a' a/numbers && sha256sum <a/numbers";
    let (_, sum) = work.sh(&server, "seq 50000 | sha256sum").await;
    let expected = format!("5 6 640\n{sum}");
    work.equals("files, owners and modes", &client, line, &expected)
        .await;
    work.equals(
        "the server has them",
        &server,
        "sha256sum </export/a/numbers",
        &sum,
    )
    .await;
    let line = "cd /mnt && flock lock echo locked && cd / && umount /mnt && echo unmounted";
    work.equals("locks, and umount", &client, line, "locked\nunmounted")
        .await;
    work.finish().await;
}
