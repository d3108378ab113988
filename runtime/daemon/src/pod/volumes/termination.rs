// SPDX-License-Identifier: Apache-2.0
//! A container's termination message: what it wrote to its termination log in the guest is copied to kubelet's file on
//! the host, before its exit is reported.

use std::io::{self, Write};
use std::path::Path;

use bulkhead_host::{Guest, open_without_links};
use bulkhead_text::chain;
use rustix::fs::OFlags;

/// At most so much is copied. kubelet reads only the last 4 KiB.
const MOST_BYTES: u32 = 32 << 10;

/// The name of the guest's volume for a container's termination log.
pub fn volume_name(container: &str) -> String {
    format!("termination-log-{container}")
}

/// Copies the termination log of `container` to `path`. Errors are only logged: without a termination message nothing
/// else fails.
pub async fn copy_back(guest: &Guest, container: &str, path: &Path) {
    let content = match guest
        .agent
        .read_volume(&volume_name(container), MOST_BYTES)
        .await
    {
        Ok(content) => content,
        Err(error) => {
            return guest.remarks.warn(format_args!(
                "read the termination log of {container}: {}",
                chain(&error)
            ));
        }
    };
    let owned = path.to_owned();
    let written = tokio::task::spawn_blocking(move || write(&owned, &content)).await;
    if let Err(error) = written.unwrap_or_else(|e| Err(io::Error::other(e))) {
        guest
            .remarks
            .warn(format_args!("write {}: {error}", path.display()));
    }
}

/// Writes the content into the file that kubelet made. Makes no new file and follows no link.
fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = open_without_links(path, OFlags::WRONLY | OFlags::NONBLOCK)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    file.set_len(0)?;
    file.write_all(content)
}

#[cfg(test)]
mod tests {
    use super::write;

    #[test]
    fn only_a_regular_file_that_is_there_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        assert!(write(&path, b"x").is_err());
        std::fs::write(&path, "an older and longer one").unwrap();
        write(&path, b"last words").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"last words");
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(write(&link, b"x").is_err());
        assert!(write(directory.path(), b"x").is_err());
    }
}
