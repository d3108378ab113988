// SPDX-License-Identifier: Apache-2.0
//! Tools of developers and administrators: compilers, debuggers, package managers, benchmarks of disks.

use bulkhead_tests::workload::{Asks, Workload};

#[tokio::test(flavor = "multi_thread")]
async fn git_clone_and_a_compile() {
    let title = "git, make and gcc: zlib is cloned, configured, compiled in parallel, and passes its own tests";
    let mut work = Workload::start("build", title).await;
    let id = work.run(work.idle("main")).await;
    let line = "cd /tmp && git clone -q file:///srv/zlib.git && cd zlib && git status --porcelain | wc -l && git log --format=%s";
    let expected = "0\nthe source of Debian's package";
    work.equals("git clone", &id, line, expected).await;
    let line = "cd /tmp/zlib && ./configure && make -j4 && make test";
    work.says("configure, make -j4, make test", &id, line, |said| {
        said.contains("*** zlib test OK ***") && said.contains("*** zlib shared test OK ***")
    })
    .await;
    work.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strace_and_gdb() {
    let title = "strace and gdb: they start programs and attach to running ones, under the default seccomp profile";
    let mut work = Workload::start("debug", title).await;
    let id = work.run(work.idle("main").default_seccomp()).await;
    let line = "strace -f -e trace=execve,exit_group sh -c '/bin/cat /etc/hostname; exit 3'";
    let (code, said) = work.sh(&id, line).await;
    let right = code == 3
        && said.contains("execve(\"/bin/cat\", [\"/bin/cat\", \"/etc/hostname\"]")
        && said.contains("exit_group(3)");
    work.row("strace -f of a program and its child", right, said);
    let line = "(while sleep 1; do :; done) & child=$!; \
        timeout 20 strace -f -p $child -o /tmp/trace & until grep -q clock_nanosleep /tmp/trace; do sleep 0.2; done; \
        kill %2 $child; grep -m 1 -o clock_nanosleep /tmp/trace";
    work.says("strace -p of a running one", &id, line, |said| {
        said.ends_with("clock_nanosleep")
    })
    .await;
    // gdb-minimal does not know the names of system calls.
    let line = "gdb -nx -batch -ex 'catch syscall 1' -ex run -ex 'print $_exitcode' -ex 'info registers rax' -ex bt \
        -ex delete -ex continue --args /bin/echo from the program";
    work.says("gdb: a program to its first write", &id, line, |said| {
        said.contains("Catchpoint 1 (call to syscall 1)")
            && said.contains("from the program")
            && said.contains("exited normally")
    })
    .await;
    let line = "sleep 1000 & child=$!; sleep 1; gdb -nx -batch -p $child -ex 'info proc' -ex 'x/i $pc' -ex detach; \
        kill $child && echo killed";
    work.says("gdb -p of a running one", &id, line, |said| {
        said.contains("exe = '/usr/bin/sleep'") && said.contains("=> 0x") && said.contains("killed")
    })
    .await;
    work.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn apt_get_install() {
    let title = "apt-get: installs packages with their scripts and users from a repository over HTTP, and removes them";
    let mut work = Workload::start("apt", title).await;
    let served = [
        "busybox",
        "httpd",
        "-f",
        "-p",
        "80",
        "-h",
        "/srv/repository",
    ];
    let repository = work.program("repository", &served);
    work.run(repository).await;
    let config = work.idle("main").env("DEBIAN_FRONTEND", "noninteractive");
    let id = work.run(config).await;
    let line = "apt-get update && apt-cache policy hello | grep Candidate";
    work.says("apt-get update", &id, line, |said| {
        said.contains("Candidate: 2.")
    })
    .await;
    let line = "apt-get install -y hello cron netcat-openbsd";
    work.says("apt-get install", &id, line, |said| {
        said.contains("Setting up cron") && !said.contains("error")
    })
    .await;
    let line = "hello; readlink -f /bin/nc; getent group crontab | cut -d: -f1; \
        dpkg-query -W -f '${Status}\\n' hello cron netcat-openbsd | sort -u; dpkg --audit";
    let expected = "Hello, world!\n/usr/bin/nc.openbsd\ncrontab\ninstall ok installed";
    work.equals(
        "the program, a link, a group, dpkg's records",
        &id,
        line,
        expected,
    )
    .await;
    let line = "apt-get purge -y hello && ! test -e /usr/bin/hello && echo gone";
    work.says("apt-get purge", &id, line, |said| said.ends_with("gone"))
        .await;
    work.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fio_with_io_uring() {
    let title =
        "fio: io_uring reads and writes, buffered and direct, and every block has its checksum";
    let mut work = Workload::start("fio", title).await;
    let data = work.empty_dir("data");
    let id = work.run(work.idle("main").volume(&data, "/data")).await;
    for (case, engine, directory, direct) in [
        ("io_uring, direct, on an emptyDir", "io_uring", "/data", 1),
        (
            "io_uring, on the container's own files",
            "io_uring",
            "/var/tmp",
            0,
        ),
        ("libaio, direct, on an emptyDir", "libaio", "/data", 1),
    ] {
        let line = format!(
            "fio --name=check --directory={directory} --ioengine={engine} --direct={direct} --rw=randrw --bs=4k --size=4m \
             --iodepth=16 --verify=crc32c --verify_fatal=1 --output-format=normal | grep -E 'err=|issued rwts'; \
             rm {directory}/check*"
        );
        work.says(case, &id, &line, |said| said.contains("err= 0"))
            .await;
    }
    work.finish().await;
}
