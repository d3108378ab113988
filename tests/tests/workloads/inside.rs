// SPDX-License-Identifier: Apache-2.0
//! Systems inside of a pod: an init system, and a container engine.

use bulkhead_tests::workload::{Asks, Workload, get};

#[tokio::test(flavor = "multi_thread")]
async fn systemd_as_the_first_process() {
    let title = "systemd as PID 1: it boots, limits and restarts services, keeps a journal, and powers off when it is stopped";
    let mut work = Workload::start_privileged("systemd", title).await;
    let config = work
        .program("main", &["/sbin/init"])
        .privileged()
        .env("container", "bulkhead");
    let id = work.run(config).await;
    let line = "systemctl is-system-running | grep -E 'running|degraded' || { systemctl list-jobs; false; }";
    work.until("it has booted", &id, line).await;
    let line = "systemctl --failed --no-legend --plain | awk '{print $1}' | tr '\\n' ' '";
    work.equals("units that failed", &id, line, "").await;
    let line =
        "systemctl show -P NRestarts -P ActiveState workload | tr '\\n' ' ' | grep -x '1 active '";
    work.until("a service that died was started again", &id, line)
        .await;
    let line = "cat /sys/fs/cgroup/system.slice/workload.service/memory.max";
    work.equals("the service's MemoryMax=64M", &id, line, "67108864")
        .await;
    let line = "journalctl -u workload --no-pager -o cat | grep -c 'started by systemd'";
    work.equals("its lines in the journal", &id, line, "2")
        .await;
    let line = "systemd-run --quiet --wait --pipe -p DynamicUser=yes -p PrivateTmp=yes sh -c 'id -u; ls /tmp | wc -l'";
    work.says("systemd-run with a sandbox", &id, line, |said| {
        said.ends_with("\n0") && !said.starts_with("0\n")
    })
    .await;
    // The image's signal is SIGRTMIN+3.
    work.client.stop(&id, 120).await.expect("stop");
    let code = work.client.exited(&id).await.exit_code;
    // It powers off, and in a PID namespace the kernel makes that a SIGINT to its first process.
    work.row("it ends by its own signal", code == 130, code);
    work.finish().await;
}

/// As the image `docker` does it: no process may stay in the root of the cgroup that has children with limits.
const DOCKERD: &str = "
    mkdir /sys/fs/cgroup/init
    for process in $(cat /sys/fs/cgroup/cgroup.procs); do echo $process >/sys/fs/cgroup/init/cgroup.procs; done
    for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do echo +$controller >/sys/fs/cgroup/cgroup.subtree_control; done
    exec dockerd --host unix:///var/run/docker.sock";
const TINY: &str = "mkdir -p /tmp/tiny/bin /tmp/tiny/tmp && cp /bin/busybox /tmp/tiny/bin/ && \
    for name in sh echo cat mkdir ls httpd chown stat wget; do ln -s busybox /tmp/tiny/bin/$name; done && \
    tar -C /tmp/tiny -c . | docker import - tiny | cut -c 1-7";

#[tokio::test(flavor = "multi_thread")]
async fn docker_in_the_pod() {
    let title =
        "Docker in a pod: overlay2, runs and builds images, limits containers, publishes ports";
    let mut work = Workload::start_privileged("docker", title).await;
    let data = work.empty_dir("docker");
    let config = work
        .script("main", DOCKERD)
        .privileged()
        .volume(&data, "/var/lib/docker");
    let id = work.run(config).await;
    let line = "docker info --format '{{.Driver}} {{.CgroupVersion}}' | grep -x 'overlay2 2'";
    if !work
        .until("its storage driver and cgroups", &id, line)
        .await
    {
        let log = work.log("main").await;
        work.row("what dockerd said", false, log);
    }
    work.equals("docker import", &id, TINY, "sha256:").await;
    // On stderr docker warns that this kernel has no swap, which is so (docs/guest-kernel.md).
    let line = "docker run --rm --memory 64m tiny /bin/sh -c 'echo hello; cat /sys/fs/cgroup/memory.max' 2>/dev/null";
    work.equals("docker run with a limit", &id, line, "hello\n67108864")
        .await;
    let line = "docker build -q -t built /srv | cut -c 1-7 && docker run --rm built && \
        docker run --rm built /bin/stat -c '%u %g' /made/file";
    work.equals("docker build", &id, line, "sha256:\nbuilt\n5 6")
        .await;
    let line = "docker run -d --name web -p 8080:80 tiny /bin/httpd -f -p 80 -h /bin | wc -c";
    work.equals("docker run -d -p", &id, line, "65").await;
    let address = work.address(&work.pod.clone()).await;
    let (head, body) = get(&address, 8080, "/busybox", "").await;
    let right = head.contains(" 200 ") && body.starts_with(b"\x7fELF");
    work.row(
        "the published port, from outside",
        right,
        format!("{} bytes", body.len()),
    );
    let line = "docker stop -t 5 web && docker rm web && docker ps -aq | wc -l";
    work.equals("docker stop, rm", &id, line, "web\nweb\n0")
        .await;
    work.finish().await;
}
