// SPDX-License-Identifier: Apache-2.0
//! Tells the service manager the state of the daemon, by a datagram to its socket (sd_notify(3)).

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The daemon serves.
pub const READY: &str = "READY=1";
pub const STOPPING: &str = "STOPPING=1";
const ALIVE: &str = "WATCHDOG=1";

/// The service manager's socket. Without a service manager there is none, and nothing is sent.
#[derive(Clone, Debug, Default)]
pub struct Notifier {
    socket: Option<OsString>,
    /// How long the daemon may be silent before the service manager restarts it.
    watchdog: Option<Duration>,
}

impl Notifier {
    /// Takes the values of systemd's variables `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`.
    pub fn new(
        socket: Option<OsString>,
        watchdog_usec: Option<&str>,
        watchdog_pid: Option<&str>,
    ) -> Self {
        let ours = watchdog_pid.is_none_or(|pid| pid == std::process::id().to_string());
        let limit = watchdog_usec.and_then(|usec| usec.parse().ok());
        Self {
            socket: socket.filter(|socket| !socket.is_empty()),
            watchdog: limit
                .filter(|usec| ours && *usec > 0)
                .map(Duration::from_micros),
        }
    }

    /// Sends a state. An error is only logged: the service manager notices by itself that the message is missing.
    pub fn tell(&self, state: &str) {
        if let Some(socket) = &self.socket
            && let Err(e) = send(socket, state)
        {
            tracing::warn!("tell {} {state}: {e}", socket.display());
        }
    }

    /// Sends a sign of life regularly, for ever, if the service manager asks for it.
    pub async fn watch(self) {
        let Some(limit) = self.watchdog else {
            return;
        };
        // Half of the limit is what sd_watchdog_enabled(3) recommends.
        let mut ticks = tokio::time::interval(limit / 2);
        loop {
            ticks.tick().await;
            self.tell(ALIVE);
        }
    }
}

fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    let sender = UnixDatagram::unbound()?;
    // A service manager that does not read must not block the daemon.
    sender.set_nonblocking(true)?;
    sender.send_to_addr(state.as_bytes(), &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn a_manager_is_told_on_its_socket_in_the_file_system_or_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("bulkhead-test-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name).unwrap();
        for (manager, socket) in [
            (UnixDatagram::bind(&path), path.into_os_string()),
            (
                UnixDatagram::bind_addr(&abstract_address),
                format!("@{name}").into(),
            ),
        ] {
            let manager = manager.unwrap();
            Notifier::new(Some(socket), None, None).tell(READY);
            assert_eq!(receive(&manager), "READY=1");
        }
    }

    #[test]
    fn without_a_manager_nothing_is_said() {
        for socket in [None, Some(OsString::new()), Some("/nowhere/notify".into())] {
            Notifier::new(socket, None, None).tell(READY);
        }
    }

    #[tokio::test]
    async fn the_watchdog_hears_of_us_before_its_time_is_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let socket = Some(path.into_os_string());
        let pid = std::process::id().to_string();
        for (usec, whose) in [
            (None, None),
            (Some("0"), None),
            (Some("x"), None),
            (Some("9"), Some("1")),
        ] {
            let notifier = Notifier::new(socket.clone(), usec, whose);
            assert_eq!(notifier.watchdog, None, "{usec:?} {whose:?}");
            notifier.watch().await;
        }
        let notifier = Notifier::new(socket, Some("40000"), Some(&pid));
        let watching = tokio::spawn(notifier.watch());
        let heard = tokio::task::spawn_blocking(move || [(); 3].map(|()| receive(&manager)));
        assert_eq!(heard.await.unwrap(), ["WATCHDOG=1"; 3]);
        watching.abort();
    }
}
