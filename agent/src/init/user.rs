// SPDX-License-Identifier: Apache-2.0
//! The user and groups of a container's process, as Kubernetes and image configurations name them, looked up
//! in the image's own `/etc/passwd` and `/etc/group`.
//!
//! The image's author wrote these files, so only a limited part is read, and invalid lines are skipped. Pure,
//! except for [`read_database`].

use std::fs::File;
use std::io::Read;
use std::path::Path;

use bulkhead_proto::agent::User;
use rustix::fs::OFlags;

use super::paths;

/// Only this much of a file is read. No image needs more, and it takes memory of the guest.
const MAX_DATABASE_BYTES: u64 = 4 << 20;
/// The kernel's NGROUPS_MAX.
const MAX_GROUPS: usize = 65536;
/// To the kernel this means "no change", so it is never a real id.
const INVALID_ID: u32 = u32::MAX;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UserError {
    #[error("unable to find user {0}: no matching entries in passwd file")]
    NoUser(String),
    #[error("unable to find group {0}: no matching entries in group file")]
    NoGroup(String),
    #[error("user or group id {0} is out of range")]
    IdOutOfRange(i64),
    #[error("too many groups")]
    TooManyGroups,
}

/// The user and groups that the process gets.
#[derive(Debug, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// First the primary group, then the groups that the pod requests, then those of the image.
    pub groups: Vec<u32>,
    pub home: Option<Vec<u8>>,
}

/// Reads one of the two files. One that cannot be read counts as empty.
pub fn read_database(path: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Ok(fd) = paths::open(Path::new(path), OFlags::RDONLY | OFlags::NONBLOCK) {
        let _ = File::from(fd)
            .take(MAX_DATABASE_BYTES)
            .read_to_end(&mut bytes);
    }
    bytes
}

/// Looks up a user in the texts of the image's `passwd` and `group`. A user id that is not in `passwd` is valid.
pub fn resolve(user: &User, passwd: &[u8], group: &[u8]) -> Result<Identity, UserError> {
    let (wanted_user, wanted_group) = match (user.uid, user.name.split_once(':')) {
        // A user id in the pod's security context replaces the image's user and group.
        (Some(uid), _) => (checked_id(uid)?.to_string(), ""),
        (None, Some((user, group))) => (user.to_owned(), group),
        (None, None) => (user.name.clone(), ""),
    };
    let wanted_user = if wanted_user.is_empty() {
        "0"
    } else {
        &wanted_user
    };
    let number = wanted_user
        .parse::<u32>()
        .ok()
        .filter(|id| *id != INVALID_ID);
    let entries = || passwd_entries(passwd);
    let by_name = || entries().find(|entry| entry.name == wanted_user.as_bytes());
    let by_number = || entries().find(|entry| Some(entry.uid) == number);
    let entry = if user.uid.is_some() {
        by_number()
    } else {
        by_name().or_else(by_number)
    };
    let uid = entry
        .as_ref()
        .map(|entry| entry.uid)
        .or(number)
        .ok_or_else(|| UserError::NoUser(wanted_user.to_owned()))?;
    let gid = match (user.gid, wanted_group) {
        (Some(gid), _) => checked_id(gid)?,
        (None, "") => entry.as_ref().map_or(0, |entry| entry.gid),
        (None, name) => find_group(name, group)?,
    };

    let mut groups = vec![gid];
    for gid in &user.supplemental_groups {
        groups.push(checked_id(*gid)?);
    }
    if let (false, Some(entry)) = (user.strict_groups, &entry) {
        groups.extend(
            group_entries(group)
                .filter(|g| g.has_member(entry.name))
                .map(|g| g.gid),
        );
    }
    let groups = without_repeats(&groups);
    if groups.len() > MAX_GROUPS {
        return Err(UserError::TooManyGroups);
    }
    let home = entry
        .filter(|entry| !entry.home.is_empty())
        .map(|entry| entry.home.to_vec());
    Ok(Identity {
        uid,
        gid,
        groups,
        home,
    })
}

fn checked_id(id: i64) -> Result<u32, UserError> {
    u32::try_from(id)
        .ok()
        .filter(|id| *id != INVALID_ID)
        .ok_or(UserError::IdOutOfRange(id))
}

fn find_group(wanted: &str, group: &[u8]) -> Result<u32, UserError> {
    group_entries(group)
        .find(|entry| entry.name == wanted.as_bytes())
        .map(|entry| entry.gid)
        .or_else(|| wanted.parse().ok().filter(|id| *id != INVALID_ID))
        .ok_or_else(|| UserError::NoGroup(wanted.to_owned()))
}

fn without_repeats(groups: &[u32]) -> Vec<u32> {
    let mut seen = std::collections::HashSet::new();
    groups
        .iter()
        .copied()
        .filter(|gid| seen.insert(*gid))
        .collect()
}

struct PasswdEntry<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

struct GroupEntry<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

impl GroupEntry<'_> {
    fn has_member(&self, name: &[u8]) -> bool {
        !name.is_empty()
            && self
                .members
                .split(|b| *b == b',')
                .any(|member| member.trim_ascii() == name)
    }
}

fn passwd_entries(file: &[u8]) -> impl Iterator<Item = PasswdEntry<'_>> {
    lines(file).filter_map(|line| {
        let mut fields = line.split(|b| *b == b':');
        let name = fields.next()?;
        let uid = id_field(fields.nth(1)?)?;
        let gid = id_field(fields.next()?)?;
        let home = fields.nth(1).unwrap_or_default();
        Some(PasswdEntry {
            name,
            uid,
            gid,
            home,
        })
    })
}

fn group_entries(file: &[u8]) -> impl Iterator<Item = GroupEntry<'_>> {
    lines(file).filter_map(|line| {
        let mut fields = line.split(|b| *b == b':');
        let name = fields.next()?;
        let gid = id_field(fields.nth(1)?)?;
        Some(GroupEntry {
            name,
            gid,
            members: fields.next().unwrap_or_default(),
        })
    })
}

fn lines(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    file.split(|b| *b == b'\n')
        .map(<[u8]>::trim_ascii)
        .filter(|line| !line.is_empty() && line[0] != b'#')
}

fn id_field(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field)
        .ok()?
        .parse()
        .ok()
        .filter(|id| *id != INVALID_ID)
}

#[cfg(test)]
mod tests {
    use super::{Identity, UserError, resolve};
    use bulkhead_proto::agent::User;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        # comment:x:9:9::/:\n\
        broken line\n\
        half:x:notanumber:1::/:\n\
        app:x:1000:1001:App:/home/app:/bin/sh\r\n\
        1000:x:2000:2000::/home/number:\n\
        nohome:x:3000:3000";
    const GROUP: &[u8] =
        b"root:x:0:\nwheel:x:10:root, app\naudio:x:63:app\nshort:x:5\napp:x:1001:\n";

    fn named(name: &str) -> User {
        User {
            name: name.to_owned(),
            ..User::default()
        }
    }

    fn ids(user: &User) -> Result<(u32, u32, Vec<u32>), UserError> {
        resolve(user, PASSWD, GROUP).map(|i| (i.uid, i.gid, i.groups))
    }

    #[test]
    fn names_and_numbers_of_users_and_groups() {
        let table = [
            ("", (0, 0, vec![0, 10])),
            ("app", (1000, 1001, vec![1001, 10, 63])),
            ("app:audio", (1000, 63, vec![63, 10])),
            ("app:77", (1000, 77, vec![77, 10, 63])),
            ("12345", (12345, 0, vec![0])),
            ("12345:12346", (12345, 12346, vec![12346])),
            ("nohome", (3000, 3000, vec![3000])),
            ("0", (0, 0, vec![0, 10])),
            // A name that looks like a number is first looked up as a name.
            ("1000", (2000, 2000, vec![2000])),
        ];
        for (name, expected) in table {
            assert_eq!(ids(&named(name)), Ok(expected), "{name:?}");
        }
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        assert_eq!(ids(&named("ghost")), Err(UserError::NoUser("ghost".into())));
        assert_eq!(
            ids(&named("app:ghost")),
            Err(UserError::NoGroup("ghost".into()))
        );
        assert_eq!(
            ids(&named("4294967295")),
            Err(UserError::NoUser("4294967295".into()))
        );
        let negative = User {
            uid: Some(-1),
            ..User::default()
        };
        assert_eq!(ids(&negative), Err(UserError::IdOutOfRange(-1)));
    }

    #[test]
    fn explicit_ids_win_over_names() {
        let user = User {
            uid: Some(1000),
            name: "root:audio".into(),
            ..User::default()
        };
        assert_eq!(ids(&user), Ok((1000, 1001, vec![1001, 10, 63])));
        let user = User {
            uid: Some(1000),
            gid: Some(5),
            strict_groups: true,
            ..User::default()
        };
        assert_eq!(ids(&user), Ok((1000, 5, vec![5])));
        let user = User {
            name: "app".into(),
            supplemental_groups: vec![7, 63, 7],
            ..User::default()
        };
        assert_eq!(ids(&user), Ok((1000, 1001, vec![1001, 7, 63, 10])));
    }

    #[test]
    fn homes_come_from_passwd_only() {
        let home = |user: &User| resolve(user, PASSWD, GROUP).map(|i: Identity| i.home);
        assert_eq!(home(&named("app")), Ok(Some(b"/home/app".to_vec())));
        assert_eq!(home(&named("nohome")), Ok(None));
        assert_eq!(home(&named("77")), Ok(None));
        assert_eq!(
            resolve(&named(""), b"", b"").map(|i| (i.uid, i.home)),
            Ok((0, None))
        );
    }
}
