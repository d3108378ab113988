// SPDX-License-Identifier: Apache-2.0
//! Pods whose VMs are forked from a template: they differ where they must, are as large as booted ones, cost less, and
//! boot when there is no template.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use bulkhead_proto::cri::{
    LinuxContainerResources, PodSandboxState, PodSandboxStatusRequest, StatusRequest,
};
use bulkhead_tests::cgroups;
use bulkhead_tests::client::{Client, Pod, container};
use bulkhead_tests::daemon::{Daemon, Networking, program};
use bulkhead_tests::faults::Action;
use bulkhead_tests::kubelet::{mount, with_mounts};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::table::Table;
use bulkhead_tests::wait::{until, whether};
use serde_json::Value;

use super::clock::milliseconds_ahead;
use super::growth::fill;
use super::resources::{
    MIB, guest_memory_mib, host_cgroup, memory, pod_config, resize, sleeper, start,
};

/// The configuration of a daemon whose VMs boot.
const BOOTED: &str = "sandbox.templates_mib = 0\n";
/// How many forks of one template are compared.
const FORKS: usize = 6;
/// How far the clock of a guest that has just been forked may be from the host's.
const MOST_APART_MS: f64 = 50.0;
/// A guest adds memory in blocks of this size.
const BLOCK_MIB: i64 = 128;
/// How many VMs of a kind are measured.
const MEASURED: u64 = 2;
/// Makes four connections of the guest to itself and shows which ports the kernel chose for them. Only its secrets make
/// them different from those of another guest.
const PORTS: &str = r#"
    for port in 7001 7002 7003 7004; do
        httpd -p 127.0.0.1:$port -h /tmp
        (sleep 60 | nc 127.0.0.1 $port) >/dev/null 2>&1 &
    done
    while [ $(grep -c "0100007F:1B5[9A-C] 01" /proc/net/tcp) -lt 4 ]; do sleep 0.1; done
    awk '$3 ~ /^0100007F:1B5/ && $4 == "01" {print $3, $2}' /proc/net/tcp | sort | sed 's/.*://'
"#;
/// What no two pods may have in common, and commands that show it.
pub const VALUES: [(&str, &str); 11] = [
    (
        "the kernel's random uuid",
        "cat /proc/sys/kernel/random/uuid",
    ),
    ("boot id", "cat /proc/sys/kernel/random/boot_id"),
    ("/dev/urandom", "head -c 8 /dev/urandom | od -An -t x1"),
    ("getrandom(2)", "mktemp -u XXXXXX"),
    ("MAC address", "cat /sys/class/net/eth0/address"),
    ("IP address", "ip -4 -o addr show eth0 | awk '{print $4}'"),
    ("hostname", "hostname"),
    (
        "stack of a process",
        "awk '/stack/ {print $1}' /proc/self/maps",
    ),
    (
        "mappings of a process",
        "awk '$1 ~ /^7/ {print $1; exit}' /proc/self/maps",
    ),
    // Where the C library of a process gets the canary of its stack from.
    (
        "AT_RANDOM of a process",
        "at=$(od -An -v -t x8 -w16 /proc/$$/auxv | awk '$1 ~ /^0*19$/ {print $2}'); \
         dd if=/proc/$$/mem bs=1 skip=$((0x$at)) count=16 2>/dev/null | od -An -t x1",
    ),
    ("TCP ports", PORTS),
];

pub async fn daemon(networking: Networking, config: &str) -> (Daemon, Client, String) {
    let daemon = Daemon::start_with(networking, config).await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    (daemon, client, busybox)
}

/// How VMs began, as `crictl info` shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    forked: u64,
    booted: u64,
    fell_back: u64,
    made: u64,
    failed: u64,
}

/// What `crictl info` shows of the daemon.
pub async fn details(client: &mut Client) -> Value {
    let request = StatusRequest { verbose: true };
    let status = client.runtime.status(request).await.expect("status");
    serde_json::from_str(&status.into_inner().info["config"]).expect("JSON of the status")
}

async fn info(client: &mut Client) -> Value {
    details(client).await["templates"].clone()
}

async fn counts(client: &mut Client) -> Counts {
    let info = info(client).await;
    let count = |name: &str| {
        info[name]
            .as_u64()
            .unwrap_or_else(|| panic!("{name}: {info}"))
    };
    Counts {
        forked: count("forked"),
        booted: count("booted"),
        fell_back: count("fellBack"),
        made: count("templatesMade"),
        failed: count("templatesFailed"),
    }
}

/// The memory of all templates that there are, in MiB.
async fn templates(client: &mut Client) -> Vec<u64> {
    let info = info(client).await;
    let all = info["templates"].as_array().expect("a list of templates");
    let size = |one: &Value| one["memoryMib"].as_u64().expect("memoryMib");
    all.iter().map(size).collect()
}

/// Whether the status of a pod says that its VM was forked.
async fn is_forked(client: &mut Client, pod: &Pod) -> bool {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    };
    let answer = client.runtime.pod_sandbox_status(request).await;
    let info = answer.expect("status").into_inner().info;
    let info: Value = serde_json::from_str(&info["info"]).expect("JSON of the pod's status");
    info["vm"]["is_forked"].as_bool().expect("is_forked")
}

/// Runs a pod with a container that sleeps, and a command in it. Returns the pod and the container.
async fn working(client: &mut Client, name: &str, busybox: &str) -> (Pod, String) {
    let pod = client.run_pod(name).await.expect("run pod");
    let id = client
        .run_script(&pod, "main", busybox, "exec sleep 1000")
        .await;
    assert_eq!(client.shell(&id, "hostname").await, format!("{name}\n"));
    (pod, id)
}

/// Runs a pod that is forked. Returns it and its values.
pub async fn show(mut client: Client, name: String, busybox: String) -> (Pod, Vec<String>) {
    let pod = client.run_pod(&name).await.expect("run pod");
    assert!(is_forked(&mut client, &pod).await, "{name} has booted");
    let id = client
        .run_script(&pod, "main", &busybox, "exec sleep 1000")
        .await;
    // One line for each value.
    let line = |(_, command)| format!("{{ {command}\n}} | tr -s '\\n' ' '; echo\n");
    let script: String = VALUES.into_iter().map(line).collect();
    let shown = client.shell(&id, &script).await;
    let values: Vec<String> = shown.lines().map(|one| one.trim().to_owned()).collect();
    assert_eq!(values.len(), VALUES.len(), "{shown}");
    (pod, values)
}

/// How far the clock of a new fork is ahead of the host's, at least and at most, in milliseconds.
async fn clock_of_fork(daemon: &Daemon, client: &mut Client, busybox: &str) -> (f64, f64) {
    let shared = daemon.path("shared");
    fs::create_dir(&shared).expect("a directory to share");
    let pod = client.run_pod("clock").await.expect("run pod");
    let config = container("main", busybox, &["sleep", "1000"]);
    let config = with_mounts(config, vec![mount(&shared, "/shared")]);
    let id = client.create(&pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    let ahead = milliseconds_ahead(client, &id, &shared).await;
    client.end_pod(&pod).await;
    ahead
}

#[tokio::test(flavor = "multi_thread")]
async fn forks_of_one_template_have_nothing_in_common_that_must_differ() {
    let (daemon, mut client, busybox) = daemon(Networking::Bridge, "").await;
    let forks: Vec<_> = (0..FORKS)
        .map(|number| {
            let name = format!("fork-{number}");
            tokio::spawn(show(client.clone(), name, busybox.clone()))
        })
        .collect();
    let mut shown = Vec::new();
    for fork in forks {
        shown.push(fork.await.expect("a fork"));
    }
    let mut table = Table::new("forks of one template, started at the same time");
    for (number, (what, _)) in VALUES.iter().enumerate() {
        let all = shown.iter().map(|(_, values)| values[number].as_str());
        let all: Vec<&str> = all.collect();
        let different: BTreeSet<&str> = all.iter().copied().collect();
        let right = different.len() == FORKS && !different.contains("");
        table.row(what, right, all.join(" | "));
    }
    let expected = Counts {
        forked: FORKS as u64,
        made: 1,
        ..Counts::default()
    };
    table.equal("counters", counts(&mut client).await, expected);
    let (stopped, _) = &shown[0];
    client.stop_pod(&stopped.id).await.expect("stop");
    let run = daemon.path("run/pods").join(&stopped.id[..16]);
    let report = fs::read_to_string(run.join("exit.json")).expect("exit report");
    // As a booted one does, and not by a reset or a fault of the agent.
    let is_off = report.contains("guest_shutdown");
    table.row("a fork powers off", is_off, report.trim());
    for (pod, _) in shown {
        client.end_pod(&pod).await;
    }
    let (least, most) = clock_of_fork(&daemon, &mut client, &busybox).await;
    table.row(
        "clock of a fork alone",
        least <= MOST_APART_MS && most >= -MOST_APART_MS,
        format!("ahead by {least:.1} to {most:.1} ms"),
    );
    table.finish();
}

/// What is compared of very many forks: all but what has few values or takes long to show.
fn is_quick((what, _): &(&str, &str)) -> bool {
    !["TCP ports", "stack of a process"].contains(what)
}

/// Makes and removes so many forks of one template, one after the other, as `BULKHEAD_FORKS` says.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes an hour: scripts/test --only forks::very_many"]
async fn very_many_forks_have_nothing_in_common_and_leave_nothing() {
    let count =
        std::env::var("BULKHEAD_FORKS").map_or(1000, |text| text.parse().expect("a number"));
    let (daemon, mut client, busybox) = daemon(Networking::Bridge, "").await;
    let (first, _) = working(&mut client, "first", &busybox).await;
    client.end_pod(&first).await;
    let before = daemon.census();
    let wanted: Vec<_> = VALUES.into_iter().filter(is_quick).collect();
    let line = |(_, command): &(&str, &str)| format!("{{ {command}\n}} | tr -s '\\n' ' '; echo\n");
    let script: String = wanted.iter().map(line).collect();
    let mut seen = vec![BTreeSet::new(); wanted.len()];
    for number in 0..count {
        let pod = client
            .run_pod(&format!("fork-{number}"))
            .await
            .expect("run pod");
        let id = client
            .run_script(&pod, "main", &busybox, "exec sleep 1000")
            .await;
        let shown = client.shell(&id, &script).await;
        client.end_pod(&pod).await;
        let values: Vec<&str> = shown.lines().map(str::trim).collect();
        assert_eq!(values.len(), wanted.len(), "{shown}");
        for ((what, _), (seen, value)) in wanted.iter().zip(seen.iter_mut().zip(values)) {
            assert!(
                !value.is_empty() && seen.insert(value.to_owned()),
                "fork {number}: {what}: {value}"
            );
        }
        if number % 100 == 99 {
            println!("{} forks: no value has come twice", number + 1);
        }
    }
    let expected = Counts {
        forked: count + 1,
        made: 1,
        ..Counts::default()
    };
    assert_eq!(counts(&mut client).await, expected);
    daemon.census().assert_equals(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_boot_where_templates_may_not_take_enough_memory() {
    let (daemon, mut client, busybox) =
        daemon(Networking::Loopback, "sandbox.templates_mib = 1\n").await;
    for name in ["first", "second"] {
        let (pod, _) = working(&mut client, name, &busybox).await;
        assert!(!is_forked(&mut client, &pod).await, "{name}");
        client.end_pod(&pod).await;
    }
    let expected = Counts {
        booted: 2,
        // It is not tried again at once.
        failed: 1,
        ..Counts::default()
    };
    assert_eq!(counts(&mut client).await, expected);
    assert!(templates(&mut client).await.is_empty());
    let log = daemon.output();
    for words in ["no template could be made", "sandbox.templates_mib"] {
        assert!(log.contains(words), "the log does not say {words:?}");
    }
}

/// Puts a new file in place of `path`, as an upgrade does. `more` is added at its end.
fn replace(path: &Path, from: &Path, more: &[u8]) {
    let mut bytes = fs::read(from).expect("read the file");
    bytes.extend(more);
    let new = path.with_extension("new");
    fs::write(&new, bytes).expect("write a new file");
    let mode = fs::metadata(from).expect("its mode").permissions();
    fs::set_permissions(&new, mode).expect("set its mode");
    fs::rename(&new, path).expect("replace the file");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_kernel_or_vmm_makes_a_new_template() {
    let directory = tempfile::tempdir_in("/var/lib/bulkhead").expect("a directory");
    let file = |name: &str| directory.path().join(name);
    let (kernel, vmm) = (file("vmlinux"), file("bulkhead-vmm"));
    replace(&kernel, &program("vmlinux"), b"");
    replace(&vmm, &program("bulkhead-vmm"), b"");
    let config = format!(
        "kernel = \"{}\"\nvmm = \"{}\"\n",
        kernel.display(),
        vmm.display()
    );
    let (_daemon, mut client, busybox) = daemon(Networking::Loopback, &config).await;
    let mut pods = vec![working(&mut client, "old", &busybox).await];
    for (name, path) in [("vmlinux", &kernel), ("bulkhead-vmm", &vmm)] {
        // Something at the end changes nothing but the file.
        replace(path, &program(name), b"\0");
        pods.push(working(&mut client, &format!("new-{name}"), &busybox).await);
    }
    let expected = Counts {
        forked: 3,
        made: 3,
        ..Counts::default()
    };
    assert_eq!(counts(&mut client).await, expected);
    assert_eq!(
        templates(&mut client).await.len(),
        1,
        "the old ones are gone"
    );
    for (pod, id) in pods {
        assert!(is_forked(&mut client, &pod).await);
        assert_eq!(client.shell(&id, "echo well").await, "well\n");
        client.end_pod(&pod).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_fork_fails_boots() {
    let config = "sandbox.templates_mib = 512\n";
    let (mut daemon, faults) = Daemon::start_faulty(Networking::Bridge, config).await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let (first, _) = working(&mut client, "first", &busybox).await;
    assert!(is_forked(&mut client, &first).await);
    client.end_pod(&first).await;
    let before = daemon.census();

    // The fork goes on by then, and holds all that a pod has.
    faults.plan("HearAgent.after", 0, Action::Fail);
    let (pod, id) = working(&mut client, "falls-back", &busybox).await;
    assert!(!is_forked(&mut client, &pod).await);
    assert_eq!(daemon.vmm_pids().len(), 1, "the fork has ended");
    assert_eq!(
        client
            .shell(&id, "ip -4 addr show eth0 | grep -c inet")
            .await,
        "1\n"
    );
    let expected = Counts {
        forked: 1,
        booted: 1,
        fell_back: 1,
        made: 1,
        failed: 0,
    };
    assert_eq!(counts(&mut client).await, expected);
    assert!(templates(&mut client).await.is_empty(), "it is given up");
    let log = daemon.output();
    assert!(
        log.contains("could not be forked, so it boots"),
        "no warning"
    );
    client.end_pod(&pod).await;
    daemon.census().assert_equals(&before);

    // Another daemon makes another template. This fork answers, and is lost when it is to become the pod's.
    daemon.kill();
    daemon.restart().await;
    let mut client = daemon.client().await;
    let (first, _) = working(&mut client, "first-again", &busybox).await;
    assert!(is_forked(&mut client, &first).await);
    client.end_pod(&first).await;
    let before = daemon.census();
    faults.plan("ConfigureGuest.before", 0, Action::Fail);
    let (pod, _) = working(&mut client, "lost", &busybox).await;
    assert!(!is_forked(&mut client, &pod).await);
    let expected = Counts {
        forked: 2,
        ..expected
    };
    assert_eq!(counts(&mut client).await, expected);
    let log = daemon.output();
    assert!(log.contains("was forked and lost, so it boots"), "{log}");
    client.end_pod(&pod).await;
    daemon.census().assert_equals(&before);
}

/// Memory and CPUs that a guest has.
async fn guest_size(client: &mut Client, id: &str) -> (i64, i64) {
    let cpus = client.shell(id, "grep -c ^processor /proc/cpuinfo").await;
    let cpus = cpus.trim().parse().expect("a number");
    (guest_memory_mib(client, id).await, cpus)
}

/// Whether a container can have so much memory at once.
async fn can_fill(client: &mut Client, id: &str, mebibytes: i64) -> bool {
    let filled = client.exec(id, &["sh", "-c", &fill(mebibytes)], 0).await;
    filled.expect("exec").exit_code == 0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_is_as_large_as_a_booted_vm_and_grows() {
    let (mut daemon, mut client, busybox) = daemon(Networking::Loopback, BOOTED).await;
    let limited = |mebibytes| LinuxContainerResources {
        cpu_quota: if mebibytes == 64 { 0 } else { 200_000 },
        cpu_period: 100_000,
        ..memory(mebibytes)
    };
    let sizes = [(64, 200), (300, 300)];
    let mut booted = Vec::new();
    for (limit, _) in sizes {
        let config = pod_config(&client, &format!("boots-{limit}"), limited(limit));
        let pod = client.run_pod_with(config).await.expect("run pod");
        let none = LinuxContainerResources::default();
        let id = start(&mut client, &pod, sleeper(&busybox, "main", none)).await;
        booted.push(guest_size(&mut client, &id).await);
        client.end_pod(&pod).await;
    }

    daemon.restart_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let mut table = Table::new("MiB and CPUs of guests that were forked");
    for ((limit, more), (memory_mib, cpus)) in sizes.into_iter().zip(booted) {
        let config = pod_config(&client, &format!("forks-{limit}"), limited(limit));
        let pod = client.run_pod_with(config).await.expect("run pod");
        let none = LinuxContainerResources::default();
        let id = start(&mut client, &pod, sleeper(&busybox, "main", none)).await;
        let forked = is_forked(&mut client, &pod).await;
        table.row(&format!("limit {limit}: forked"), forked, forked);
        let (seen, seen_cpus) = guest_size(&mut client, &id).await;
        let right = (memory_mib..=memory_mib + BLOCK_MIB).contains(&seen);
        table.row(
            &format!("limit {limit}: memory"),
            right,
            format!("{seen} MiB, booted: {memory_mib} MiB"),
        );
        table.equal(&format!("limit {limit}: CPUs"), seen_cpus, cpus);
        let host = host_cgroup(&daemon);
        let quota = fs::read_to_string(host.join("cpu.max")).expect("cpu.max");
        let expected = if limit == 64 {
            "max 100000"
        } else {
            "200000 100000"
        };
        table.equal(
            &format!("limit {limit}: the host's CPU limit"),
            quota.trim(),
            expected,
        );
        // One of them says enough, and much memory takes long on a slow host.
        if limit == sizes[0].0 {
            let within = can_fill(&mut client, &id, limit - 14).await;
            table.row("what it allows", within, within);
            let beyond = can_fill(&mut client, &id, limit + 10).await;
            table.row("more than it allows", !beyond, beyond);
            // The guest may have a part of a block more than the host's limit allows.
            let line = "dd if=/dev/zero of=/file bs=1M count=200 2>/dev/null && \
                        cat /file >/dev/null && rm /file && echo well";
            let worked = client.shell(&id, line).await;
            table.equal("after work with files", worked.trim(), "well");
            resize(&mut client, &pod, limited(more))
                .await
                .expect("resize");
            let (grown, _) = guest_size(&mut client, &id).await;
            let right = grown >= more && grown >= seen + more - limit - BLOCK_MIB;
            table.row("memory, resized", right, format!("{grown} MiB"));
            let within = can_fill(&mut client, &id, more - 50).await;
            table.row("what it allows, resized", within, within);
        }
        client.end_pod(&pod).await;
    }
    table.finish();
}

fn available_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("meminfo");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next());
    let kibibytes: Option<u64> = kibibytes.and_then(|number| number.parse().ok());
    kibibytes.expect("MemAvailable") << 10
}

/// What a VM of this daemon takes: of the host's available memory, and in its cgroup. In MiB.
async fn cost(daemon: &Daemon, client: &mut Client, busybox: &str) -> (u64, u64) {
    // The first one leaves what all share.
    let (warm, _) = working(client, "warm", busybox).await;
    let (earlier, before) = (daemon.vmm_pids(), available_bytes());
    let mut pods = vec![warm];
    for number in 0..MEASURED {
        pods.push(
            client
                .run_pod(&format!("measured-{number}"))
                .await
                .expect("run pod"),
        );
    }
    let taken = before.saturating_sub(available_bytes()) / MEASURED;
    let pids = daemon.vmm_pids().into_iter();
    let charged: u64 = pids
        .filter(|pid| !earlier.contains(pid))
        .map(|pid| {
            let path = cgroups::of_process(pid).join("memory.current");
            let text = fs::read_to_string(path).expect("memory.current");
            text.trim().parse::<u64>().expect("a number")
        })
        .sum();
    for pod in &pods {
        client.end_pod(pod).await;
    }
    let mib = MIB.cast_unsigned();
    (taken / mib, charged / MEASURED / mib)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fork_costs_less_than_half_of_a_booted_vm() {
    let (mut daemon, mut client, busybox) = daemon(Networking::Loopback, BOOTED).await;
    let booted = cost(&daemon, &mut client, &busybox).await;
    daemon.restart_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let forked = cost(&daemon, &mut client, &busybox).await;
    let template = info(&mut client).await["templates"].clone();
    let mut table = Table::new("MiB that a VM takes of the host");
    for (what, forked, booted) in [
        ("of MemAvailable", forked.0, booted.0),
        ("memory.current", forked.1, booted.1),
    ] {
        let seen = format!("forked {forked}, booted {booted}");
        table.row(what, forked * 2 < booted, seen);
    }
    table.row("templates", true, template);
    table.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_while_it_makes_a_template_leaves_nothing() {
    let (mut daemon, mut client, busybox) = daemon(Networking::Bridge, BOOTED).await;
    let (warm, _) = working(&mut client, "warm", &busybox).await;
    client.end_pod(&warm).await;
    let before = daemon.census();
    daemon.restart_with(Networking::Bridge, "").await;
    // When its VM is there, and later, when its guest boots.
    for (number, delay_ms) in [0, 1200].into_iter().enumerate() {
        let name = format!("half-{number}");
        let mut waiting = daemon.client().await;
        let call = tokio::spawn(async move { waiting.run_pod(&name).await });
        until("the template's VM is there", async || {
            let vmms = daemon.vmm_pids();
            whether(vmms.len() == 1, vmms)
        })
        .await;
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        daemon.kill();
        call.await
            .expect("the call's task")
            .expect_err("the daemon is killed");
        daemon.restart().await;
        let mut client = daemon.client().await;
        for id in client.pod_ids().await {
            client.stop_pod(&id).await.expect("stop");
            client.remove_pod(&id).await.expect("remove");
        }
        until("the template's VM is gone", async || {
            let vmms = daemon.vmm_pids();
            whether(vmms.is_empty(), vmms)
        })
        .await;
        daemon.census().assert_equals_but_for_processes(&before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn forks_live_on_without_the_daemon_that_made_their_template() {
    let (mut daemon, mut client, busybox) = daemon(Networking::Bridge, "").await;
    let (warm, _) = working(&mut client, "warm", &busybox).await;
    client.end_pod(&warm).await;
    let before = daemon.census();
    let (pod, id) = working(&mut client, "stays", &busybox).await;
    assert!(is_forked(&mut client, &pod).await);
    daemon.restart().await;
    let mut client = daemon.client().await;
    assert_eq!(counts(&mut client).await, Counts::default());
    assert!(templates(&mut client).await.is_empty());
    let state = client.pod_state(&pod.id).await.expect("state");
    assert_eq!(state, PodSandboxState::SandboxReady);
    assert!(is_forked(&mut client, &pod).await);
    assert_eq!(client.shell(&id, "echo again").await, "again\n");
    let (next, _) = working(&mut client, "next", &busybox).await;
    let expected = Counts {
        forked: 1,
        made: 1,
        ..Counts::default()
    };
    assert_eq!(counts(&mut client).await, expected);
    assert_eq!(client.shell(&id, "echo still").await, "still\n");
    for pod in [&pod, &next] {
        client.end_pod(pod).await;
    }
    daemon.census().assert_equals_but_for_processes(&before);
}
