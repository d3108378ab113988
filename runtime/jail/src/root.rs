// SPDX-License-Identifier: Apache-2.0
//! A root that contains nothing of the host.

use std::ffi::CStr;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope,
};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, mount_remount, unmount,
};

use crate::{JailError, failed};

/// A directory that exists on every host. The new root is mounted there first.
const PLACE: &str = "/proc";
/// The root holds at most mount points, so it is small.
const OPTIONS: &CStr = c"size=256k,nr_inodes=1024,mode=755";
const QUIET: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);
/// The newest Landlock whose rights are asked for. An older kernel gets those that it knows.
const LANDLOCK: ABI = ABI::V6;

/// Replaces the root by an empty read-only directory. Everything else leaves the mount namespace, which must be the
/// process's own.
pub fn empty() -> Result<(), JailError> {
    replace(|_root| Ok(())).map_err(failed("create an empty root"))
}

/// The same with a directory in it for mounts, and a `/proc` that shows only processes of this PID namespace.
pub fn with_mounts(directory: &str) -> Result<(), JailError> {
    let fill = |root: &Path| {
        let proc = root.join("proc");
        fs::create_dir(&proc)?;
        let inside = root.join(directory.trim_start_matches('/'));
        fs::create_dir(&inside)?;
        // Users of containers look up names in it, whatever the daemon's umask is.
        fs::set_permissions(&inside, Permissions::from_mode(0o755))?;
        let options = c"subset=pid,hidepid=invisible";
        Ok(mount("proc", proc, "proc", QUIET, options)?)
    };
    replace(fill).map_err(failed("create a root"))
}

fn replace(fill: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    mount_change(
        "/",
        MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
    )?;
    mount("none", PLACE, "tmpfs", QUIET, OPTIONS)?;
    fill(Path::new(PLACE))?;
    std::env::set_current_dir(PLACE)?;
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    std::env::set_current_dir("/")?;
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY | QUIET, c"")?;
    Ok(())
}

/// Gives up all rights over paths, over TCP ports, and over sockets and processes outside, for good, by Landlock. It stands
/// behind the empty root. Returns false if this kernel has no Landlock.
pub fn forbid_paths() -> Result<bool, JailError> {
    let step = "forbid all paths";
    let rules = || {
        let rules = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
        let rules = rules.handle_access(AccessFs::from_all(LANDLOCK))?;
        let rules = rules.handle_access(AccessNet::from_all(LANDLOCK))?;
        let rules = rules.scope(Scope::from_all(LANDLOCK))?;
        rules.create()?.restrict_self()
    };
    let status = rules().map_err(|e: landlock::RulesetError| failed(step)(io::Error::other(e)))?;
    Ok(status.ruleset != landlock::RulesetStatus::NotEnforced)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_without_paths_keeps_the_files_that_it_has() {
        let there = tempfile::NamedTempFile::new().unwrap();
        fs::write(there.path(), "x").unwrap();
        let path = there.path().to_owned();
        let thread = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            let file = fs::File::open(&path).unwrap();
            let enforced = forbid_paths().unwrap();
            let again = fs::File::open(&path).map(drop).map_err(|e| e.kind());
            (enforced, again, io::read_to_string(file).unwrap())
        });
        let (enforced, again, read) = thread.join().unwrap();
        assert_eq!(read, "x");
        if enforced {
            assert_eq!(again, Err(io::ErrorKind::PermissionDenied));
        } else {
            eprintln!("NOT CHECKED: this kernel has no Landlock");
        }
    }
}
