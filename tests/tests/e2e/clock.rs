// SPDX-License-Identifier: Apache-2.0
//! A pod's clock is the host's, also after somebody has set that.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bulkhead_proto::cri::ContainerStatus;
use bulkhead_tests::client::{Client, container};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::kubelet::{mount, with_mounts};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::{until, whether};

const SLEEP: [&str; 2] = ["sleep", "1000"];
const HOUR: Duration = Duration::from_secs(3600);
/// How far a guest's clock may be from the host's.
const MOST_APART_MS: f64 = 10.0;
/// The bit of adjtimex(2)'s status for a clock in nanoseconds.
const STA_NANO: i128 = 0x2000;
/// How finely the host's kernel counts the time for files, at 250 ticks a second.
const TICK_NANOSECONDS: i128 = 4_000_000;
/// How often the clocks are compared at once.
const SAMPLES: usize = 8;

/// The clock of a host that may be set, because the host is a VM of its own. It is right again when this is dropped.
struct HostClock {
    right: SystemTime,
    since: Instant,
}

impl HostClock {
    /// `None` on a host that others use.
    fn of_emulated_host() -> Option<Self> {
        let is_emulated = std::env::var("BULKHEAD_KVM_HOST").is_ok_and(|host| host == "emulated");
        is_emulated.then(|| Self {
            right: SystemTime::now(),
            since: Instant::now(),
        })
    }

    fn set(&self, ahead: Duration) {
        let right = self.right.duration_since(UNIX_EPOCH).expect("after 1970");
        let time = (right + self.since.elapsed() + ahead).as_secs_f64();
        let time = format!("@{time:.6}");
        let output = Command::new("date").args(["-s", &time]).output();
        let output = output.expect("run date");
        assert!(output.status.success(), "{output:?}");
    }
}

impl Drop for HostClock {
    fn drop(&mut self) {
        self.set(Duration::ZERO);
    }
}

fn host_nanoseconds() -> i128 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("after 1970").as_nanos().cast_signed()
}

/// Waits until the container's clock shows the host's second, or the next to it.
async fn until_it_follows(client: &mut Client, id: &str, what: &str) {
    let since = Instant::now();
    let what = format!("the pod follows {what}");
    until(&what, async || {
        let before = host_nanoseconds() / 1_000_000_000;
        let shown = client.shell(id, "date +%s").await;
        let shown: i128 = shown.trim().parse().expect("a number");
        let after = host_nanoseconds() / 1_000_000_000;
        let follows = (before - 1..=after + 1).contains(&shown);
        whether(follows, format!("{shown}, the host: {before} to {after}"))
    })
    .await;
    println!("{what}: seen after {:.1?}", since.elapsed());
}

/// How far the container's clock is ahead of the host's, at least and at most, in milliseconds. The container reads its
/// clock, writes a file of the host, which gets the host's time, and reads its clock again.
pub async fn milliseconds_ahead(client: &mut Client, id: &str, shared: &Path) -> (f64, f64) {
    let line = format!(
        "cd /tmp; for i in $(seq {SAMPLES}); do adjtimex >b$i; echo >/shared/$i; adjtimex >a$i; done; \
         for i in $(seq {SAMPLES}); do cat b$i a$i | awk '/status:/ {{status = $2}} /time.tv_/ {{printf \"%s \", $2}} END {{print status}}'; done"
    );
    let said = client.shell(id, &line).await;
    let (mut least, mut most) = (i128::MIN, i128::MAX);
    for (number, line) in (1..).zip(said.lines()) {
        let parts: Vec<i128> = line
            .split_whitespace()
            .map(|one| one.parse().expect("a number"))
            .collect();
        let [b_s, b_part, a_s, a_part, status] = parts[..] else {
            panic!("{said}");
        };
        // The kernel's clock may be in nanoseconds (STA_NANO); its field is called tv_usec all the same.
        let unit = if status & STA_NANO == 0 { 1000 } else { 1 };
        let nanoseconds = |seconds, part| seconds * 1_000_000_000 + part * unit;
        let (before, after) = (nanoseconds(b_s, b_part), nanoseconds(a_s, a_part));
        let file = fs::metadata(shared.join(number.to_string())).expect("the file");
        let host = i128::from(file.mtime()) * 1_000_000_000 + i128::from(file.mtime_nsec());
        least = least.max(before - host - TICK_NANOSECONDS);
        most = most.min(after - host);
    }
    let ms = |nanoseconds: i128| nanoseconds as f64 / 1e6;
    (ms(least), ms(most))
}

async fn exits(client: &mut Client, id: &str) -> ContainerStatus {
    client.stop(id, 0).await.expect("stop");
    client.exited(id).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_follows_the_hosts_clock_and_no_container_ends_before_it_started() {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let shared = daemon.path("shared");
    fs::create_dir(&shared).expect("a directory to share");
    let Some(clock) = HostClock::of_emulated_host() else {
        println!(
            "NOT RUN: this host's clock is others' too, so it is not set; run scripts/kvm-host on a host without KVM"
        );
        return;
    };
    let began = Instant::now();
    let pod = client.run_pod("pod").await.expect("run pod");
    let early = with_mounts(
        container("early", &busybox, &SLEEP),
        vec![mount(&shared, "/shared")],
    );
    let early = client.create(&pod, early).await.expect("create");
    client.start(&early).await.expect("start");

    clock.set(HOUR);
    until_it_follows(&mut client, &early, "a clock that was set forward").await;
    let ahead = container("ahead", &busybox, &SLEEP);
    let ahead = client.create(&pod, ahead).await.expect("create");
    client.start(&ahead).await.expect("start");

    // The VM does not run while the clock is set back.
    let vmm = daemon.vmm_pids()[0].to_string();
    let signal = |signal: &str| {
        let sent = Command::new("kill").args([signal, &vmm]).status();
        assert!(sent.expect("run kill").success(), "{signal}");
    };
    signal("-STOP");
    clock.set(Duration::ZERO);
    tokio::time::sleep(Duration::from_secs(1)).await;
    signal("-CONT");
    until_it_follows(&mut client, &early, "a clock that was set back meanwhile").await;

    for id in [&ahead, &early] {
        let found = match id == &early {
            // It goes on for the measurement below.
            true => client.status(id).await.expect("status"),
            false => exits(&mut client, id).await,
        };
        let now = i64::try_from(host_nanoseconds()).expect("before 2262");
        let elapsed = i64::try_from(began.elapsed().as_nanos()).expect("not long");
        assert!(found.started_at <= now, "in the future: {found:?}");
        assert!(now - found.started_at <= elapsed, "{found:?}");
        if id == &ahead {
            assert!(found.finished_at > found.started_at, "{found:?}");
            assert!(found.finished_at <= now, "in the future: {found:?}");
        }
    }
    until("the clocks are as close as promised", async || {
        let (least, most) = milliseconds_ahead(&mut client, &early, &shared).await;
        let said = format!("ahead by {least:.1} to {most:.1} ms");
        println!("{said}");
        whether(least <= MOST_APART_MS && most >= -MOST_APART_MS, said)
    })
    .await;
    let early = exits(&mut client, &early).await;
    assert!(early.finished_at > early.started_at, "{early:?}");
    client.end_pod(&pod).await;
}
