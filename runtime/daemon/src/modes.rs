// SPDX-License-Identifier: Apache-2.0
//! Who may use the files and directories that the daemon makes.
//!
//! The daemon's own files hold environments and records, so only its user may read them. [`keep_to_ourselves`] sees to
//! that for all that it makes. What others use too, such as containers' logs, is made by the other functions here.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use bulkhead_host::open_regular;
use rustix::fs::Mode;

const OWN: u32 = 0o700;
const FOR_ALL: u32 = 0o755;
/// The mode of a log file, as other runtimes have it.
const LOG: u32 = 0o640;

/// From now on, all that this process makes is for its own user, unless it says otherwise.
pub fn keep_to_ourselves() {
    rustix::process::umask(Mode::from_raw_mode(0o077));
}

/// Makes a directory of the daemon, or takes over one that exists. Then only its owner may use it, whatever its mode was.
pub fn own_directory(path: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(OWN).create(path)?;
    fs::set_permissions(path, Permissions::from_mode(OWN))
}

/// Makes a directory that others use too, with its parents. What exists stays as it is.
pub fn directory_for_all(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        directory_for_all(parent)?;
    }
    match fs::create_dir(path) {
        Ok(()) => fs::set_permissions(path, Permissions::from_mode(FOR_ALL)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Opens a log file, or makes it, to write at its end. A link is not followed. A pipe or device is an error, and is not
/// waited for.
pub fn log_file(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.append(true);
    match open_regular(path, options.clone().create_new(true)) {
        Ok(file) => {
            file.set_permissions(Permissions::from_mode(LOG))?;
            Ok(file)
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => open_regular(path, &mut options),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_directory_of_the_daemon_is_closed_whatever_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        own_directory(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        own_directory(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
    }

    #[test]
    fn a_directory_for_others_is_open_and_one_that_exists_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        directory_for_all(&path).unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o755, 0o755));
        fs::set_permissions(&path, Permissions::from_mode(0o711)).unwrap();
        directory_for_all(&path).unwrap();
        assert_eq!(mode(&path), 0o711);
        fs::write(directory.path().join("file"), "").unwrap();
        assert!(directory_for_all(&directory.path().join("file/x")).is_err());
    }
}
