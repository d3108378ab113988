// SPDX-License-Identifier: Apache-2.0
//! A VM is bounded on its host by the cgroup that the daemon makes, or does not start.

use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bulkhead_proto::cri::{LinuxContainerResources, PodSandboxState};
use bulkhead_tests::client::assert_fails;
use bulkhead_tests::daemon::Networking;
use tonic::Code;

use crate::resources::{daemon, host_cgroup, pod_config, sleeper, start};

/// A cgroup below which nobody can make another.
struct Closed(&'static str);

impl Closed {
    fn new(name: &'static str) -> Self {
        let closed = Self(name);
        fs::create_dir(closed.path()).expect("a cgroup");
        fs::write(closed.path().join("cgroup.max.descendants"), "0").expect("no more cgroups");
        closed
    }

    fn path(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup").join(self.0)
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.path());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_cannot_be_bounded_does_not_start_unless_the_configuration_allows_it() {
    let closed = Closed::new("closed-to-vms");
    let parent = format!("cgroup_parent = \"{}\"\n", closed.0);
    let (mut daemon, mut client, busybox) = daemon(&parent).await;
    let refused = client.run_pod("unbounded").await;
    let words = ["cannot be bounded", closed.0, "allow_unbounded_vms"];
    assert_fails(refused, Code::FailedPrecondition, &words);
    assert_eq!(daemon.vmm_pids().len(), 0);

    let allowed = format!("{parent}allow_unbounded_vms = true\n");
    daemon.restart_with(Networking::Loopback, &allowed).await;
    let mut client = daemon.client().await;
    let pod = client.run_pod("unbounded").await.expect("run pod");
    let config = sleeper(&busybox, "main", LinuxContainerResources::default());
    start(&mut client, &pod, config).await;
    let state = client.pod_state(&pod.id).await.expect("state");
    assert_eq!(state, PodSandboxState::SandboxReady);
    client.end_pod(&pod).await;
}

fn unified(keys: &[(&str, &str)]) -> LinuxContainerResources {
    LinuxContainerResources {
        unified: keys
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn swap_and_io_of_a_vm_are_limited_as_the_pod_or_all_its_containers_ask_for() {
    let (daemon, mut client, busybox) = daemon("").await;
    // The disk below the daemon's directories. A partition has the limits of its disk, so its minor number may differ.
    let device = fs::metadata("/var/lib/bulkhead").expect("a disk").st_dev();
    let device = format!("{}:{}", major(device), minor(device));
    let io_max = format!("{device} wbps=104857600");
    let wanted = pod_config(&client, "asks", unified(&[("io.max", &io_max)]));
    let pod = client.run_pod_with(wanted).await.expect("run pod");
    let host = |file: &str| fs::read_to_string(host_cgroup(&daemon).join(file)).expect(file);
    assert!(host("io.max").starts_with(&io_max.replace("wbps", "rbps=max wbps")));
    assert_eq!(host("memory.swap.max"), "max\n");
    let swapless = unified(&[("memory.swap.max", "0"), ("io.max", &io_max)]);
    let config = sleeper(&busybox, "one", swapless);
    start(&mut client, &pod, config).await;
    assert_eq!(host("memory.swap.max"), "0\n");
    // CRI's own limit, which is for memory and swap together.
    let swapping = LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        memory_swap_limit_in_bytes: (64 << 20) + 4096,
        ..Default::default()
    };
    let two = start(&mut client, &pod, sleeper(&busybox, "two", swapping)).await;
    assert_eq!(host("memory.swap.max"), "4096\n");
    client.stop(&two, 0).await.expect("stop");
    assert_eq!(host("memory.swap.max"), "0\n");

    let wrong = sleeper(&busybox, "wrong", unified(&[("io.max", "sda wbps=1")]));
    let refused = client.create(&pod, wrong).await;
    assert_fails(refused, Code::InvalidArgument, &["io.max", "sda wbps=1"]);
    let wrong = pod_config(&client, "wrong", unified(&[("io.max", "sda wbps=1")]));
    let refused = client.run_pod_with(wrong).await;
    assert_fails(refused, Code::InvalidArgument, &["io.max", "sda wbps=1"]);
    // The host has no such device, so the VM would not be limited.
    let absent = pod_config(&client, "absent", unified(&[("io.max", "4000:1 wbps=1")]));
    let refused = client.run_pod_with(absent).await;
    assert_fails(refused, Code::FailedPrecondition, &["io.max", "4000:1"]);
    client.end_pod(&pod).await;
}

fn major(device: u64) -> u64 {
    (device >> 8) & 0xfff
}

fn minor(device: u64) -> u64 {
    (device & 0xff) | ((device >> 12) & 0xfff00)
}
