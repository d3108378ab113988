// SPDX-License-Identifier: Apache-2.0
//! The file in which the daemon keeps what a delegate listed last, for the next daemon.
//!
//! Pods and containers are kept in the run directory, because after a reboot none of them runs any more; images in the
//! state directory.

use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use prost::Message;

/// The longest file. 1000 containers with their labels take about 2 MiB.
const FILE_BYTES: u64 = 16 << 20;

/// What is kept in a file: it belongs to the server at one socket.
pub trait OfSocket: Message + Default {
    fn socket(&self) -> &str;
}

/// The file of one delegate.
#[derive(Clone, Debug)]
pub struct Kept(PathBuf);

impl Kept {
    pub fn new(directory: &Path, name: &str) -> Self {
        Self(directory.join(format!("{name}.list")))
    }

    /// Reads what is kept of the server at this socket.
    pub fn read<T: OfSocket>(&self, socket: &str) -> Option<T> {
        let mut bytes = Vec::new();
        let file = File::open(&self.0).ok()?;
        let read = file.take(FILE_BYTES + 1).read_to_end(&mut bytes);
        let saved = read.map(|_| T::decode(bytes.as_slice()));
        match saved {
            Ok(Ok(saved)) => Some(saved).filter(|saved| saved.socket() == socket),
            Ok(Err(error)) => {
                tracing::warn!("{} is not used: {error}", self.0.display());
                None
            }
            Err(error) => {
                tracing::warn!("{} cannot be read: {error}", self.0.display());
                None
            }
        }
    }

    /// Replaces the file.
    pub fn write(&self, saved: &impl OfSocket) -> io::Result<()> {
        let bytes = saved.encode_to_vec();
        if bytes.len() as u64 > FILE_BYTES {
            let text = format!("a list of {} bytes is too long to be kept", bytes.len());
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        let temporary = self.0.with_extension("new");
        let mut file = File::create(&temporary)?;
        file.set_permissions(Permissions::from_mode(0o600))?;
        file.write_all(&bytes)?;
        std::fs::rename(&temporary, &self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::roll::Saved;
    use super::*;

    #[test]
    fn what_is_kept_belongs_to_a_socket_and_damage_is_no_list() {
        let directory = tempfile::tempdir().unwrap();
        let kept = Kept::new(directory.path(), "runc");
        assert_eq!(kept.read::<Saved>("/c.sock"), None);
        let saved = Saved {
            socket: "/c.sock".into(),
            ..Default::default()
        };
        kept.write(&saved).unwrap();
        assert_eq!(kept.read("/c.sock"), Some(saved));
        assert_eq!(kept.read::<Saved>("/other.sock"), None);
        std::fs::write(directory.path().join("runc.list"), b"\xff\xff").unwrap();
        assert_eq!(kept.read::<Saved>("/c.sock"), None);
    }
}
