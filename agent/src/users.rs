// SPDX-License-Identifier: Apache-2.0
//! The user namespace that a pod's containers share, if the pod has one. Its root has no privileges in the guest.
//!
//! It is created once, when the guest is configured for its pod, and kept by a descriptor. Image layers are mounted
//! with mapped owners. Files that the agent creates for the pod (volumes, pipes) belong to mapped owners at once.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use bulkhead_proto::agent::{IdRange, Ownership, UserNamespace};

use crate::sys;
use crate::sys::spawn::in_new_user_namespace;

/// The pod's user namespace. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct PodUsers(Arc<OnceLock<Users>>);

#[derive(Debug)]
struct Users {
    namespace: OwnedFd,
    uids: IdRange,
    gids: IdRange,
}

impl PodUsers {
    /// Creates the namespace. Further calls do nothing.
    pub fn make(&self, wanted: &UserNamespace) -> io::Result<()> {
        if self.0.get().is_some() {
            return Ok(());
        }
        let range = |range: Option<IdRange>| {
            let range = range.unwrap_or_default();
            // The last id means "no change" to system calls, so it must not be in the range.
            let end = range.first.checked_add(range.length);
            end.filter(|_| range.length > 0).map(|_| range)
        };
        let (Some(uids), Some(gids)) = (range(wanted.uids), range(wanted.gids)) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a range of users or groups is empty or too large",
            ));
        };
        let namespace = in_new_user_namespace(|pid| {
            for (file, range) in [("uid_map", uids), ("gid_map", gids)] {
                let line = format!("0 {} {}", range.first, range.length);
                fs::write(format!("/proc/{pid}/{file}"), line)?;
            }
            Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
        })?;
        // Cannot be set already, because configuration calls run one after the other.
        let _ = self.0.set(Users {
            namespace,
            uids,
            gids,
        });
        Ok(())
    }

    pub fn namespace(&self) -> Option<BorrowedFd<'_>> {
        self.0.get().map(|users| users.namespace.as_fd())
    }

    /// Converts an ownership by users of the pod to the guest's ids.
    pub fn owned(&self, ownership: &Ownership) -> io::Result<Ownership> {
        let (uid, gid) = self.in_guest(ownership.uid, ownership.gid)?;
        Ok(Ownership {
            uid,
            gid,
            ..*ownership
        })
    }

    /// The guest's ids for a user and a group of the pod.
    pub fn in_guest(&self, uid: u32, gid: u32) -> io::Result<(u32, u32)> {
        let Some(users) = self.0.get() else {
            return Ok((uid, gid));
        };
        let mapped = |id: u32, range: IdRange| {
            let id = (id < range.length).then(|| range.first + id);
            id.ok_or_else(|| io::Error::from_raw_os_error(libc::EOVERFLOW))
        };
        Ok((mapped(uid, users.uids)?, mapped(gid, users.gids)?))
    }

    /// Makes a detached mount show its owners as the pod's users.
    pub fn map_owners(&self, mount: impl AsFd) -> io::Result<()> {
        match self.namespace() {
            Some(namespace) => sys::map_owners(mount.as_fd(), namespace),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_moved_into_the_range_or_refused() {
        let users = PodUsers::default();
        assert_eq!(users.in_guest(7, 8).unwrap(), (7, 8));
        let range = |first, length| IdRange { first, length };
        let namespace = File::open("/proc/self/ns/user").unwrap().into();
        let made = Users {
            namespace,
            uids: range(1000, 100),
            gids: range(5000, 10),
        };
        users.0.set(made).unwrap();
        assert_eq!(users.in_guest(99, 9).unwrap(), (1099, 5009));
        assert!(users.in_guest(100, 0).is_err());
        assert!(users.in_guest(0, 10).is_err());
    }

    #[test]
    fn empty_and_endless_ranges_are_refused() {
        for (first, length) in [(0, 0), (1, u32::MAX)] {
            let range = Some(IdRange { first, length });
            let wanted = UserNamespace {
                uids: range,
                gids: range,
            };
            let error = PodUsers::default().make(&wanted).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
