// SPDX-License-Identifier: Apache-2.0
//! The commands `bulkhead run`, `ps`, `logs`, `exec` and others.

use std::process::{Command, Output, Stdio};

use bulkhead_tests::census::Census;
use bulkhead_tests::daemon::{Daemon, Networking, program};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::wait::until;

fn command(daemon: &Daemon, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("bulkhead"));
    command
        .arg("--socket")
        .arg(daemon.socket())
        .args(arguments)
        .stdin(Stdio::null());
    command
}

pub fn bulkhead(daemon: &Daemon, arguments: &[&str]) -> Output {
    command(daemon, arguments).output().expect("run bulkhead")
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Starts a daemon and runs a pod, because its first pod makes the parent cgroup, which stays. Returns the daemon, the
/// image, and a census.
async fn used_daemon() -> (Daemon, String, Census) {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let busybox = Registry::shared().image("test/busybox");
    let ran = bulkhead(&daemon, &["run", &busybox, "true"]);
    assert!(ran.status.success(), "{}", stderr(&ran));
    let before = daemon.census();
    (daemon, busybox, before)
}

#[tokio::test(flavor = "multi_thread")]
async fn run_passes_output_and_exit_code_on_and_removes_all_but_the_image() {
    let (daemon, busybox, before) = used_daemon().await;
    let script = "echo out $WORD; echo err >&2; printf unfinished; exit 7";
    let ran = bulkhead(
        &daemon,
        &["run", "-e", "WORD=yes", &busybox, "sh", "-c", script],
    );
    assert_eq!(stdout(&ran), "out yes\nunfinished");
    assert_eq!(stderr(&ran), "err\n");
    assert_eq!(ran.status.code(), Some(7));

    let script = "grep Seccomp: /proc/self/status; echo 1 >/proc/sys/kernel/panic || echo refused";
    let confined = bulkhead(&daemon, &["run", &busybox, "sh", "-c", script]);
    assert_eq!(stdout(&confined), "Seccomp:\t2\nrefused\n");

    let missing = bulkhead(&daemon, &["run", &busybox, "no-such-command"]);
    assert_eq!(missing.status.code(), Some(127));
    assert!(
        stderr(&missing).contains("no-such-command"),
        "{}",
        stderr(&missing)
    );
    let no_image = format!("{busybox}:no-such-tag");
    let no_image = bulkhead(&daemon, &["run", &no_image]);
    assert_eq!(no_image.status.code(), Some(125));
    assert!(
        stderr(&no_image).contains("no-such-tag"),
        "{}",
        stderr(&no_image)
    );

    assert_eq!(
        stdout(&bulkhead(&daemon, &["ps", "--all"])).lines().count(),
        1
    );
    let images = stdout(&bulkhead(&daemon, &["images"]));
    assert!(images.contains(&busybox), "{images}");
    daemon.census().assert_equals(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_run_removes_its_pod_and_the_other_commands_find_it_until_then() {
    let (daemon, busybox, before) = used_daemon().await;
    let arguments = [
        "run",
        "--name",
        "kept",
        &busybox,
        "sh",
        "-c",
        "echo here; sleep 1000",
    ];
    let mut run = command(&daemon, &arguments)
        .stdout(Stdio::piped())
        .spawn()
        .expect("run bulkhead");
    let row = until("the container runs", async || {
        let listed = stdout(&bulkhead(&daemon, &["ps"]));
        let row = listed.lines().find(|line| line.contains("Running"));
        row.map(str::to_owned).ok_or(listed)
    })
    .await;
    assert!(row.contains("kept") && row.contains(&busybox), "{row}");
    let id = row.split_whitespace().nth(3).expect("a container id");
    let exec = bulkhead(&daemon, &["exec", id, "sh", "-c", "echo executed; exit 5"]);
    assert_eq!(
        (stdout(&exec).as_str(), exec.status.code()),
        ("executed\n", Some(5))
    );
    assert_eq!(stdout(&bulkhead(&daemon, &["logs", id])), "here\n");

    let pid = run.id().to_string();
    let interrupted = Command::new("kill").args(["-INT", &pid]).status();
    assert!(interrupted.expect("interrupt").success());
    assert_eq!(run.wait().expect("wait").code(), Some(130));
    assert_eq!(
        stdout(&bulkhead(&daemon, &["ps", "--all"])).lines().count(),
        1
    );
    daemon.census().assert_equals(&before);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_daemon_the_message_says_what_to_do() {
    let mut daemon = Daemon::start_with(Networking::Loopback, "").await;
    daemon.kill();
    let output = bulkhead(&daemon, &["ps"]);
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(
        said.contains("bulkhead serve") && said.contains("bulkhead.sock"),
        "{said}"
    );
}
