// SPDX-License-Identifier: Apache-2.0
//! Pods that begin as a warmed one: their containers go on where it was saved, in as many pods as ask for it, and a pod or
//! container that is not as what was saved begins as any other.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use bulkhead_proto::cri::{ContainerConfig, PodSandboxConfig};
use bulkhead_tests::client::{Client, Pod, assert_fails};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::kubelet::{Kubelet, mount, with_mounts};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::table::Table;
use bulkhead_tests::wait::{until, whether};
use tonic::Code;

use super::checkpoint::{COUNTING, asked, count, counts_on, directory, kept, pod_asked};
use super::cli;
use super::forks::details;
use super::resources::memory;

const ANNOTATION: &str = "bulkhead.dev/warmed";
const TOKENS: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// A pod that is to begin as a warmed one.
fn warmed(client: &Client, name: &str, of: &str) -> PodSandboxConfig {
    let mut config = pod_asked(client, name);
    config.annotations.insert(ANNOTATION.into(), of.into());
    config
}

/// How many pods and containers began warmed, and how many did not.
async fn counts(client: &mut Client) -> [u64; 4] {
    let shown = &details(client).await["warmed"];
    let count = |name: &str| shown[name].as_u64();
    ["pods", "coldPods", "containers", "coldContainers"]
        .map(|name| count(name).unwrap_or_else(|| panic!("{name}: {shown}")))
}

/// Saves a pod as a warmed one. Returns what the command printed, or what it said.
fn warm(daemon: &Daemon, pod: &Pod, more: &[&str]) -> Result<String, String> {
    let mut arguments = vec!["warm", &pod.id];
    arguments.extend(more);
    let output = cli::bulkhead(daemon, &arguments);
    match output.status.success() {
        true => Ok(cli::stdout(&output).trim().to_owned()),
        false => Err(cli::stderr(&output)),
    }
}

async fn go_on(client: &mut Client, pod: &Pod, config: ContainerConfig) -> String {
    let id = client.create_as_it_is(pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    id
}

/// The root directory of each kubelet, for the configuration.
fn roots(kubelets: &[Kubelet]) -> Vec<String> {
    let root = |kubelet: &Kubelet| {
        let line = kubelet.config();
        line.split('"').nth(1).expect("a root").to_owned()
    };
    kubelets.iter().map(root).collect()
}

/// The volume that kubelet makes for the token of a service account. It has another name in each pod.
fn token(kubelet: &mut Kubelet, name: &str, content: &str) -> bulkhead_proto::cri::Mount {
    let volume = kubelet.volume("kubernetes.io~projected", name);
    kubelet.write(&volume, &[("token", content)], 0o644);
    mount(&volume, TOKENS)
}

/// Whether the VMM of some process maps this file privately.
fn is_mapped(daemon: &Daemon, file: &Path) -> usize {
    let maps = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let is_private =
        |line: &str| line.contains(" rw-p ") && line.ends_with(&file.display().to_string());
    let all = daemon.vmm_pids();
    all.iter()
        .filter(|pid| maps(pid).lines().any(is_private))
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_begin_as_a_warmed_one_with_an_identity_of_their_own() {
    let mut kubelets = ["uid-first", "uid-second", "uid-third"].map(Kubelet::new);
    let roots = roots(&kubelets);
    let place = directory();
    let at = place.path().display();
    let config = format!("sandbox.warmed = \"{at}\"\nvolumes.kubelet_roots = {roots:?}");
    let mut daemon = Daemon::start_with(Networking::Bridge, &config).await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let tokens = [
        "kube-api-access-aaaaa",
        "kube-api-access-bbbbb",
        "kube-api-access-ccccc",
    ];
    let mut mains = kubelets.iter_mut().zip(tokens).map(|(kubelet, name)| {
        let token = token(kubelet, name, name);
        let notes = kubelet.memory_dir("notes", 1024);
        let settings = kubelet.volume("kubernetes.io~configmap", "settings");
        kubelet.write(&settings, &[("a.conf", "a=1"), ("b.conf", "b=1")], 0o644);
        let part = kubelet.sub_path(&settings, "..data/a.conf", "main");
        let mounts = vec![token, mount(&notes, "/notes"), mount(&part, "/etc/a.conf")];
        with_mounts(asked("main", &busybox, COUNTING), mounts)
    });
    let [of_first, of_second, of_third] = [(); 3].map(|()| mains.next().expect("one of three"));
    drop(mains);
    let mut table = Table::new("pods that begin as a warmed one");

    let first = pod_asked(&client, "first");
    let first = client.run_pod_as_it_is(first).await.expect("run pod");
    let main = go_on(&mut client, &first, of_first).await;
    client.shell(&main, "echo noted >/notes/one").await;
    let never = [
        "--timeout",
        "2",
        "one",
        "sh",
        "-c",
        "echo not yet >&2; false",
    ];
    let said = warm(&daemon, &first, &never).expect_err("it does not become ready");
    table.row(
        "one that is not ready",
        said.contains("not yet"),
        said.trim(),
    );
    let ready = ["one", "sh", "-c", "test $(cat /count) -gt 5"];
    let saved = warm(&daemon, &first, &ready).expect("warm");
    table.equal("where it is", saved, format!("{at}/tests/one"));
    // Again: the new one takes the place of the old one.
    warm(&daemon, &first, &ready).expect("warm again");
    let names = fs::read_dir(place.path().join("tests"))
        .expect("list")
        .count();
    table.equal("warmed pods", names, 1);
    let secret = client.shell(&main, "cat /secret").await.trim().to_owned();
    let before = client.container_ids().await;

    let configs = ["second", "third"].map(|name| warmed(&client, name, "one"));
    let pods = configs.map(|config| {
        let mut client = client.clone();
        tokio::spawn(async move { client.run_pod_as_it_is(config).await })
    });
    let mut began = Vec::new();
    for pod in pods {
        began.push(pod.await.expect("a task").expect("run pod"));
    }
    let memory_file = place.path().join("tests/one/memory");
    table.equal(
        "VMMs that share its memory",
        is_mapped(&daemon, &memory_file),
        2,
    );
    table.equal(
        "containers that a client sees",
        client.container_ids().await,
        before,
    );
    // The daemon that hands them out is another one.
    daemon.kill();
    daemon.restart().await;
    let mut client = daemon.client().await;
    let mut seen = HashSet::new();
    for ((pod, config), token) in began.iter().zip([of_second, of_third]).zip(&tokens[1..]) {
        let name = &pod.config.hostname;
        let id = go_on(&mut client, pod, config).await;
        let went_on = count(&mut client, &id).await;
        table.row(&format!("{name} counts on"), went_on > 5, went_on);
        let (told, _) = kept(&mut client, pod, &id, "main").await;
        table.equal(&format!("{name} knows what was saved"), &told, &secret);
        table.equal(
            &format!("{name} has what was in memory, and its setting"),
            client.shell(&id, "cat /notes/one /etc/a.conf").await,
            "noted\na=1".to_owned(),
        );
        until("it has a token of its own", async || {
            let shown = client.shell(&id, &format!("cat {TOKENS}/token")).await;
            whether(shown == **token, shown)
        })
        .await;
        let own = "cat /proc/sys/kernel/random/uuid; hostname; cat /sys/class/net/eth0/address; \
                   ip -4 -o addr show eth0; ping -c 1 -w 30 10.88.0.1 >/dev/null && echo $(hostname) has a network";
        let shown = client.shell(&id, own).await;
        let is_own =
            shown.lines().count() == 5 && shown.lines().all(|line| seen.insert(line.to_owned()));
        table.row(
            &format!("{name} is another pod"),
            is_own,
            shown.replace('\n', " | "),
        );
    }
    // What runs beside it is made as ever.
    let beside = asked("beside", &busybox, "exec sleep 1000");
    let id = go_on(&mut client, &began[0], beside).await;
    table.equal(
        "a container beside it",
        client.shell(&id, "echo yes").await,
        "yes\n".to_owned(),
    );
    // The counts are the daemon's that was started last.
    table.equal("counted", counts(&mut client).await, [0, 0, 2, 0]);
    let ids = began.iter().chain([&first]).map(|pod| pod.id.clone());
    let ids: HashSet<_> = ids.collect();
    let known: HashSet<_> = client.pod_ids().await.into_iter().collect();
    table.equal("pods", known, ids);
    for pod in began.iter().chain([&first]) {
        client.end_pod(pod).await;
    }
    table.equal("VMs at the end", daemon.vmm_pids().len(), 0);
    table.finish();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_as_the_warmed_pod_begins_as_any_other_and_says_why() {
    let mut kubelets = ["uid-first", "uid-other"].map(Kubelet::new);
    let roots = roots(&kubelets);
    let mut sizes = kubelets.iter_mut().zip([1024, 2048]);
    let [of_first, of_other] = [(); 2].map(|()| {
        let (kubelet, size) = sizes.next().expect("one of two");
        vec![mount(&kubelet.memory_dir("notes", size), "/notes")]
    });
    let place = directory();
    let at = place.path().display();
    let config = format!("sandbox.warmed = \"{at}\"\nvolumes.kubelet_roots = {roots:?}");
    let daemon = Daemon::start_with(Networking::Loopback, &config).await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let first = pod_asked(&client, "first");
    let first = client.run_pod_as_it_is(first).await.expect("run pod");
    let main = asked("main", &busybox, COUNTING);
    let id = go_on(&mut client, &first, with_mounts(main.clone(), of_first)).await;
    client.shell(&id, "echo noted >/notes/one").await;
    warm(&daemon, &first, &["one"]).expect("warm");
    for (arguments, word) in [
        (vec!["../x"], "no DNS label"),
        (vec!["--container", "other", "one", "true"], "--container"),
    ] {
        let said = warm(&daemon, &first, &arguments).expect_err(word);
        assert!(said.contains(word), "{said}");
    }
    client.end_pod(&first).await;
    let before = daemon.census();

    let refused = warmed(&client, "wrong", "../one");
    let refused = client.run_pod_as_it_is(refused).await;
    assert_fails(refused, Code::InvalidArgument, &[ANNOTATION, "../one"]);
    let mut elsewhere = warmed(&client, "elsewhere", "one");
    elsewhere.metadata.as_mut().expect("metadata").namespace = "others".into();
    let mut larger = warmed(&client, "larger", "one");
    larger.linux.get_or_insert_default().resources = Some(memory(300));
    let cases = [
        (elsewhere, "others/one is no checkpoint"),
        (
            warmed(&client, "missing", "two"),
            "tests/two is no checkpoint",
        ),
        (larger, "another value of: resources"),
    ];
    for (config, words) in cases {
        let pod = client.run_pod_as_it_is(config).await.expect(words);
        let log = daemon.output();
        assert!(log.contains(words), "the log does not say {words:?}");
        client.end_pod(&pod).await;
    }
    assert_eq!(counts(&mut client).await, [0, 3, 0, 0]);

    // A container that is to run something else, with a volume of another size, and one of another name.
    let config = warmed(&client, "other", "one");
    let other = client.run_pod_as_it_is(config).await.expect("run pod");
    let id = go_on(
        &mut client,
        &other,
        with_mounts(asked("main", &busybox, "exec sleep 1000"), of_other),
    )
    .await;
    assert_eq!(client.shell(&id, "ls /count || echo new").await, "new\n");
    let notes = "ls /notes; df -k /notes | awk 'END { print $2 }'";
    assert_eq!(client.shell(&id, notes).await, "2048\n");
    let again = go_on(
        &mut client,
        &other,
        asked("second", &busybox, "exec sleep 1000"),
    )
    .await;
    client.stop(&again, 0).await.expect("stop");
    assert!(daemon.output().contains("another value of: command"));
    assert_eq!(counts(&mut client).await, [1, 3, 0, 1]);
    client.end_pod(&other).await;

    // The pod is removed before anybody asks for its container.
    let config = warmed(&client, "unused", "one");
    let unused = client.run_pod_as_it_is(config).await.expect("run pod");
    client.end_pod(&unused).await;

    // What was saved cannot be used: the VM is begun, fails, and another one takes its place.
    let memory = place.path().join("tests/one/memory");
    let bytes = fs::metadata(&memory).expect("its memory").len();
    let file = fs::OpenOptions::new().write(true).open(&memory);
    file.and_then(|file| file.set_len(bytes / 2))
        .expect("cut it off");
    let config = warmed(&client, "cut", "one");
    let cut = client.run_pod_as_it_is(config).await.expect("run pod");
    let id = go_on(&mut client, &cut, main).await;
    counts_on(&mut client, &id, 1).await;
    assert_eq!(counts(&mut client).await, [2, 4, 0, 1]);
    client.end_pod(&cut).await;
    until("nothing is left of any of them", async || {
        match daemon.census().difference(&before) {
            None => Ok(()),
            Some(difference) => Err(difference),
        }
    })
    .await;
    fs::remove_dir_all(place.path().join("tests")).expect("a warmed pod can be removed");
}
