// SPDX-License-Identifier: Apache-2.0
//! Who may call CRI. Whoever calls it is root on the node in effect: it can mount any directory of the host.
//!
//! The socket's mode keeps others out already. But a mode can be changed by mistake, and a descriptor of the socket can be
//! passed on. So the daemon also asks the kernel who has connected (SO_PEERCRED), and closes the connection of anybody
//! else.

use std::fmt;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use bulkhead_guest::pace::Pace;
use tokio::net::UnixStream;
use tokio::net::unix::UCred;

const ROOT: u32 = 0;
const FOR_ROOT: u32 = 0o600;
const FOR_OTHERS: u32 = 0o660;
/// So many refusals a second are logged for long, and so many at once. Who may not call must not fill the log either.
const LINES_PER_SECOND: u64 = 1;
const LINES_AT_ONCE: u64 = 20;

/// Who may call, apart from root and the daemon's own user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Callers {
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

/// Who has connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Caller {
    uid: u32,
    gid: u32,
    /// `None` for a process that this PID namespace does not show.
    pid: Option<i32>,
}

/// Lets clients in, and writes a line about those that it does not let in.
#[derive(Debug)]
pub struct Door {
    callers: Callers,
    lines: Pace,
    /// Refusals without a line since the last one.
    silent: u64,
}

impl Callers {
    /// Gives the socket the owner and mode with which these callers can connect.
    pub fn own_socket(self, path: &Path) -> io::Result<()> {
        if self == Self::default() {
            return std::fs::set_permissions(path, Permissions::from_mode(FOR_ROOT));
        }
        chown(path, self.uid, self.gid)?;
        std::fs::set_permissions(path, Permissions::from_mode(FOR_OTHERS))
    }

    fn include(self, caller: Caller) -> bool {
        let own = rustix::process::geteuid().as_raw();
        [Some(ROOT), Some(own), self.uid].contains(&Some(caller.uid))
            || self.gid == Some(caller.gid)
    }
}

impl Door {
    pub fn new(callers: Callers) -> Self {
        Self {
            callers,
            lines: Pace::new(LINES_PER_SECOND, LINES_AT_ONCE),
            silent: 0,
        }
    }

    /// Returns the connection if its other end may call.
    pub fn pass(&mut self, stream: UnixStream) -> Option<UnixStream> {
        let caller = match stream.peer_cred() {
            Ok(found) => Caller::from(found),
            Err(error) => {
                tracing::warn!("a client of CRI is refused: who it is cannot be read: {error}");
                return None;
            }
        };
        if self.callers.include(caller) {
            return Some(stream);
        }
        if self.lines.try_take(1) {
            tracing::warn!(
                unnamed = self.silent,
                "a client of CRI is refused: {caller} is neither root nor who `socket_uid` and `socket_gid` name"
            );
            self.silent = 0;
        } else {
            self.silent += 1;
        }
        None
    }
}

impl From<UCred> for Caller {
    fn from(found: UCred) -> Self {
        Self {
            uid: found.uid(),
            gid: found.gid(),
            pid: found.pid().filter(|pid| *pid > 0),
        }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "process {pid}")?,
            None => write!(f, "a process of another PID namespace")?,
        }
        write!(f, " of user {} and group {}", self.uid, self.gid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRANGER: Caller = Caller {
        uid: 65_534,
        gid: 65_533,
        pid: Some(7),
    };

    #[test]
    fn root_and_who_is_named_may_call_and_nobody_else() {
        let nobody = Callers::default();
        assert!(nobody.include(Caller {
            uid: ROOT,
            ..STRANGER
        }));
        assert!(!nobody.include(STRANGER));
        // Root's group is not root.
        let in_roots_group = Caller {
            gid: ROOT,
            ..STRANGER
        };
        assert!(!nobody.include(in_roots_group));
        let table = [
            (Some(65_534), None, true),
            (Some(65_533), None, false),
            (None, Some(65_533), true),
            (None, Some(65_534), false),
        ];
        for (uid, gid, may) in table {
            assert_eq!(
                Callers { uid, gid }.include(STRANGER),
                may,
                "{uid:?} {gid:?}"
            );
        }
    }

    #[test]
    fn a_caller_is_named_by_process_user_and_group() {
        assert_eq!(
            STRANGER.to_string(),
            "process 7 of user 65534 and group 65533"
        );
        let far = Caller {
            pid: None,
            ..STRANGER
        };
        assert!(far.to_string().starts_with("a process of another PID"));
    }

    #[tokio::test]
    async fn the_kernel_says_who_is_at_the_other_end() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut door = Door::new(Callers::default());
        let caller = Caller::from(theirs.peer_cred().unwrap());
        assert_eq!(caller.uid, rustix::process::geteuid().as_raw());
        assert_eq!(caller.pid, i32::try_from(std::process::id()).ok());
        assert!(door.pass(ours).is_some());
    }

    #[test]
    fn a_socket_is_roots_alone_unless_the_configuration_names_somebody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mode = || std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        Callers::default().own_socket(&path).unwrap();
        assert_eq!(mode(), FOR_ROOT);
        let gid = Some(rustix::process::getegid().as_raw());
        Callers { uid: None, gid }.own_socket(&path).unwrap();
        assert_eq!(mode(), FOR_OTHERS);
    }
}
