// SPDX-License-Identifier: Apache-2.0
//! What programs ask of a kernel that a pod's own kernel must have as a node's has it.

use bulkhead_proto::cri::HugepageLimit;
use bulkhead_tests::workload::{Asks, Workload};

#[tokio::test(flavor = "multi_thread")]
async fn inotify_watches_of_many_directories() {
    let title =
        "inotify: one program watches 20,000 directories, as file servers, IDEs and bundlers do";
    let mut work = Workload::start("kernel", title).await;
    let id = work.run(work.idle("main").user(1000)).await;
    let line = "mkdir /tmp/many && cd /tmp/many && seq 20000 | xargs mkdir && ls | wc -l";
    work.equals("directories", &id, line, "20000").await;
    let line = "inotifywait -m -r -q -e create --format %w%f -o /tmp/seen /tmp/many 2>/tmp/errors & \
        for i in $(seq 600); do touch /tmp/many/20000/x$i; grep -q 20000/x /tmp/seen && break; kill -0 $! || break; sleep 0.5; done; \
        cat /tmp/errors; head -c 300 /tmp/seen; kill $!; \
        head /proc/sys/fs/inotify/*";
    work.says("an event of the last one", &id, line, |said| {
        said.contains("/tmp/many/20000/x")
    })
    .await;
    work.finish().await;
}

/// perl's own functions are the system calls.
const WRITE_SEGMENT: &str = "perl -e '$id = shmget(4711, 64 << 20, 01600) // die $!; shmwrite($id, \"from one\", (64 << 20) - 8, 8) or die $!; \
    $q = msgget(4712, 01600) // die $!; msgsnd($q, pack(\"l! a*\", 5, \"a message\"), 0) or die $!; \
    $s = semget(4713, 2, 01600) // die $!; semop($s, pack(\"s3\", 1, 3, 0)) or die $!; print \"written\"'";
const READ_SEGMENT: &str = "perl -e '$id = shmget(4711, 0, 0) // die $!; shmread($id, $text, (64 << 20) - 8, 8) or die $!; \
    $q = msgget(4712, 0) // die $!; msgrcv($q, $message, 64, 5, 0) or die $!; \
    $s = semget(4713, 0, 0) // die $!; semop($s, pack(\"s3\", 1, -3, 2048)) or die $!; \
    print $text, \", \", (unpack(\"l! a*\", $message))[1], \", taken\"'";

#[tokio::test(flavor = "multi_thread")]
async fn system_v_shared_memory() {
    let title = "System V IPC: containers of a pod share segments, queues and semaphores, and other pods see none of them";
    let mut work = Workload::start("kernel", title).await;
    let one = work.run(work.idle("one")).await;
    let two = work.run(work.idle("two")).await;
    work.equals(
        "a segment of 64 MiB, a queue, semaphores",
        &one,
        WRITE_SEGMENT,
        "written",
    )
    .await;
    work.equals(
        "another container of the pod",
        &two,
        READ_SEGMENT,
        "from one, a message, taken",
    )
    .await;
    let other = work.another_pod("other").await;
    let three = work.run_in(&other, work.idle("three")).await;
    let line = "ipcs | grep -c 0x; ipcs -l | grep -i 'max total shared memory'";
    let none = |said: &str| said.starts_with("0\n");
    work.says("another pod", &three, &format!("{line}; true"), none)
        .await;
    work.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_of_32_bits() {
    let title = "A program of 32 bits (i386) runs, with files, processes and sockets";
    let mut work = Workload::start("kernel", title).await;
    let id = work.run(work.idle("main")).await;
    let old = "/opt/busybox-of-32-bits";
    let line =
        format!("{old} sh -c 'echo $((1 + 1)); {old} uname -m; {old} ls /opt | {old} wc -l'");
    work.equals("a shell, its children, a pipe", &id, &line, "2\nx86_64\n1")
        .await;
    let line = format!(
        "({old} httpd -f -p 8000 -h /opt & echo $! >/tmp/pid); sleep 1; {old} wget -q -O - http://127.0.0.1:8000/busybox-of-32-bits | \
         cmp - {old} && kill $(cat /tmp/pid) && echo same"
    );
    work.equals("a server and its client", &id, &line, "same")
        .await;
    work.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fuse_in_the_pod() {
    let title = "FUSE: a container with SYS_ADMIN and /dev/fuse mounts a file system that one of its processes serves";
    let mut work = Workload::start("kernel", title).await;
    let config = work
        .idle("main")
        .capabilities(&["SYS_ADMIN"])
        .device("/dev/fuse");
    let id = work.run(config).await;
    let line = "truncate -s 16M /tmp/disk && mkfs.ext4 -q -E root_owner=0:0 /tmp/disk && mkdir /tmp/mounted && \
        fuse2fs -o fakeroot /tmp/disk /tmp/mounted && grep -c ' /tmp/mounted fuse' /proc/mounts";
    work.equals("mounted", &id, line, "1").await;
    let line = "cd /tmp/mounted && seq 20000 >numbers && mkdir -p a/b && mv numbers a/b && ln -s a/b/numbers link && sha256sum <link";
    let expected = "seq 20000 | sha256sum";
    let (_, expected) = work.sh(&id, expected).await;
    work.equals("files, directories, links", &id, line, &expected)
        .await;
    let line = "umount /tmp/mounted && e2fsck -fn /tmp/disk >/dev/null 2>&1; debugfs -R 'stat a/b/numbers' /tmp/disk 2>/dev/null | \
        grep -o 'Size: [0-9]*' | head -n 1";
    work.equals(
        "what was written is in the image",
        &id,
        line,
        "Size: 108894",
    )
    .await;
    work.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn huge_pages_of_a_program() {
    const MAPPED: &str = "
import mmap
MAP_HUGETLB = 0x40000
pages = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB)
for offset in range(0, 8 << 20, 4096): pages[offset] = 7
meminfo = dict(line.split(':') for line in open('/proc/meminfo'))
print(sum(pages[offset] for offset in range(0, 8 << 20, 4096)), meminfo['HugePages_Total'].strip(), meminfo['HugePages_Free'].strip())
try:
    mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB)
except OSError as error: print(error.errno)
";
    let title =
        "hugetlbfs: a program maps the huge pages that its container was given, and no more";
    let mut work = Workload::start("python", title).await;
    let mut config = work.idle("main").memory_mib(128);
    let linux = config.linux.get_or_insert_default();
    linux.resources.get_or_insert_default().hugepage_limits = vec![HugepageLimit {
        page_size: "2MB".into(),
        limit: 8 << 20,
    }];
    let id = work.run(config).await;
    let line = format!("python3 -c \"{MAPPED}\"");
    // ENOMEM.
    work.equals("8 MiB of pages of 2 MiB", &id, &line, "14336 4 0\n12")
        .await;
    work.finish().await;
}
