// SPDX-License-Identifier: Apache-2.0
//! Who may call CRI: root, and whom the configuration names, whatever the modes of the socket are.

use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use bulkhead_tests::daemon::{Daemon, Networking, program};
use bulkhead_tests::wait::{until, whether};

/// Opens the socket, its directories and the way to them for everybody.
fn open_to_all(socket: &Path) {
    for path in socket.ancestors().take(3) {
        std::fs::set_permissions(path, Permissions::from_mode(0o777)).expect("chmod");
    }
}

/// Runs `bulkhead ps` as another user. Returns whether it is answered, and what it says.
fn ps_as(daemon: &Daemon, user: u32, group: u32) -> (bool, String) {
    let output = Command::new("setpriv")
        .args([&format!("--reuid={user}"), &format!("--regid={group}")])
        .arg("--clear-groups")
        .arg(program("bulkhead"))
        .arg("--socket")
        .arg(daemon.socket())
        .arg("ps")
        .output()
        .expect("run setpriv");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.success(), said)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_of_another_user_is_refused_though_the_socket_is_open_to_all() {
    let mut daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mode = |daemon: &Daemon| std::fs::metadata(daemon.socket()).expect("socket").mode() & 0o777;
    // The socket has its mode a moment after it can be connected to.
    until("only root may connect", async || {
        whether(mode(&daemon) == 0o600, format!("{:o}", mode(&daemon)))
    })
    .await;
    open_to_all(&daemon.socket());
    let (answered, said) = ps_as(&daemon, 65_534, 65_534);
    assert!(!answered, "a stranger is answered");
    let log = daemon.output();
    let line = log
        .lines()
        .find(|line| line.contains("a client of CRI is refused"));
    let line = line.unwrap_or_else(|| panic!("no line about it; the client said {said}\n{log}"));
    assert!(line.contains("user 65534 and group 65534"), "{line}");
    assert!(ps_as(&daemon, 0, 0).0, "root is refused");

    daemon
        .restart_with(Networking::Loopback, "socket_gid = 4242\n")
        .await;
    until("the group may connect", async || {
        let found = std::fs::metadata(daemon.socket()).expect("socket");
        let seen = (found.gid(), found.mode() & 0o777);
        whether(seen == (4242, 0o660), seen)
    })
    .await;
    open_to_all(&daemon.socket());
    let (answered, said) = ps_as(&daemon, 65_534, 4242);
    assert!(answered, "who is named is refused: {said}");
    assert!(
        !ps_as(&daemon, 65_534, 65_534).0,
        "another group is answered"
    );
    assert!(ps_as(&daemon, 0, 0).0, "root is refused");
}
