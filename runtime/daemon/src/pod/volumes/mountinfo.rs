// SPDX-License-Identifier: Apache-2.0
//! The mounts of a process, from /proc/PID/mountinfo (proc_pid_mountinfo(5)). Pure, except for [`Mounts::read`] and
//! [`Mounts::of`].

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// What the kernel appends to the root of a mount whose source was deleted.
const DELETED: &str = "//deleted";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// The device number of the file system, as "major:minor".
    pub device: String,
    /// The path in the file system that is mounted.
    pub root: PathBuf,
    pub at: PathBuf,
    pub kind: String,
    /// The options of the file system, not those of the mount.
    pub options: String,
    /// Whether the mount or its file system is read-only.
    pub readonly: bool,
}

/// Where below a place something can be written.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Writability {
    /// Whether the place itself is read-only.
    pub readonly: bool,
    /// The mounts below that differ in this from what is around them, by relative path; parents come first.
    pub parts: Vec<(PathBuf, bool)>,
}

/// All mounts of this process's namespace, in the kernel's order.
#[derive(Debug)]
pub struct Mounts(Vec<Mounted>);

impl Mounts {
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read("/proc/self/mountinfo")?))
    }

    /// The mounts in the namespace of another process.
    pub fn of(pid: i32) -> io::Result<Self> {
        Ok(Self::parse(&std::fs::read(format!(
            "/proc/{pid}/mountinfo"
        ))?))
    }

    /// Parses the file. Lines with errors are left out.
    pub fn parse(text: &[u8]) -> Self {
        let lines = text.split(|byte| *byte == b'\n');
        Self(lines.filter_map(parse_line).collect())
    }

    /// The mount at exactly `path`. If there are several, it is the last one, which covers the others.
    pub fn at(&self, path: &Path) -> Option<&Mounted> {
        self.0.iter().rev().find(|mounted| mounted.at == path)
    }

    /// The device of the file system that `path` (without links) is on, and the path within that file system.
    pub fn locate(&self, path: &Path) -> Option<(&str, PathBuf)> {
        let above = path.ancestors();
        let mounted = above.into_iter().find_map(|ancestor| self.at(ancestor))?;
        let below = path.strip_prefix(&mounted.at).ok()?;
        Some((&mounted.device, join(&mounted.root, below)))
    }

    /// Where at and below the mount at `root` something can be written. `None` if nothing is mounted there.
    pub fn writability(&self, root: &Path) -> Option<Writability> {
        let mut seen: BTreeMap<&Path, bool> = BTreeMap::new();
        for mounted in self.0.iter().filter(|one| one.at.starts_with(root)) {
            // What was mounted below before is now covered.
            seen.retain(|at, _| !at.starts_with(&mounted.at));
            seen.insert(&mounted.at, mounted.readonly);
        }
        let readonly = *seen.get(root)?;
        let mut parts = Vec::new();
        for (at, is) in &seen {
            let mut above = at.ancestors().skip(1);
            let around = above.find_map(|above| seen.get(above));
            if let (Some(around), Ok(path)) = (around, at.strip_prefix(root))
                && around != is
            {
                parts.push((path.to_owned(), *is));
            }
        }
        Some(Writability { readonly, parts })
    }
}

impl Mounted {
    /// Whether the mount's source was deleted.
    pub fn is_deleted(&self) -> bool {
        self.root.to_string_lossy().ends_with(DELETED)
    }

    /// The value of an option in bytes, such as `size` of a tmpfs or `pagesize` of a hugetlbfs.
    pub fn size_bytes(&self, option: &str) -> Option<u64> {
        let mut options = self
            .options
            .split(',')
            .filter_map(|one| one.split_once('='));
        let (_, size) = options.find(|(name, _)| *name == option)?;
        let (number, unit) = match size.char_indices().find(|(_, c)| !c.is_ascii_digit()) {
            Some((end, unit)) => (size.get(..end)?, Some(unit)),
            None => (size, None),
        };
        let shift = match unit {
            None => 0,
            Some('k' | 'K') => 10,
            Some('m' | 'M') => 20,
            Some('g' | 'G') => 30,
            Some(_) => return None,
        };
        number.parse::<u64>().ok()?.checked_mul(1 << shift)
    }
}

/// Joins two paths. If `below` is empty, the result has no slash at the end.
pub fn join(root: &Path, below: &Path) -> PathBuf {
    if below.as_os_str().is_empty() {
        root.to_owned()
    } else {
        root.join(below)
    }
}

/// Parses a line such as `36 35 98:0 /root /at opts [tags...] - type source options`.
fn parse_line(line: &[u8]) -> Option<Mounted> {
    let mut fields = line.split(|byte| *byte == b' ');
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
    let device = text(fields.nth(2)?)?;
    let root = unescape(fields.next()?);
    let at = unescape(fields.next()?);
    let mount_options = fields.next()?;
    fields.find(|field| *field == b"-")?;
    let kind = text(fields.next()?)?;
    let options = text(fields.nth(1)?)?;
    let is_readonly = |options: &[u8]| options.split(|byte| *byte == b',').any(|one| one == b"ro");
    let readonly = is_readonly(mount_options) || is_readonly(options.as_bytes());
    Some(Mounted {
        device,
        root,
        at,
        kind,
        options,
        readonly,
    })
}

/// The kernel writes space, tab, line feed, backslash and '#' as three octal digits after a backslash.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, octal(tail)) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

fn octal(digits: &[u8]) -> Option<u8> {
    let digits = digits.get(..3)?;
    digits.iter().try_fold(0u8, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 8)?;
        value.checked_mul(8)?.checked_add(digit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
30 22 0:50 / /k/pods/u/volumes/kubernetes.io~empty-dir/mem rw shared:7 master:2 - tmpfs tmpfs rw,size=1024k\n\
31 22 8:1 /k/pods/u/volumes/kubernetes.io~empty-dir/d/a\\040b /k/sub/0 rw - ext4 /dev/sda1 rw\n\
32 22 8:1 /gone//deleted /k/sub/1 rw - ext4 /dev/sda1 rw\n\
nonsense\n\
33 22 8:17 /inner /mnt rw - ext4 /dev/sdb1 rw\n";

    #[test]
    fn mounts_are_found_by_their_place() {
        let mounts = Mounts::parse(TEXT);
        let memory = mounts
            .at(Path::new("/k/pods/u/volumes/kubernetes.io~empty-dir/mem"))
            .unwrap();
        assert_eq!(
            (memory.kind.as_str(), memory.size_bytes("size")),
            ("tmpfs", Some(1 << 20))
        );
        assert_eq!(memory.size_bytes("pagesize"), None);
        let bind = mounts.at(Path::new("/k/sub/0")).unwrap();
        assert!(bind.root.ends_with("d/a b"), "{bind:?}");
        assert!(mounts.at(Path::new("/k/sub/1")).unwrap().is_deleted());
        assert_eq!(mounts.at(Path::new("/k")), None);
    }

    #[test]
    fn a_path_is_located_in_its_file_system() {
        let mounts = Mounts::parse(TEXT);
        for (path, device, inside) in [
            ("/k/x", "8:1", "/k/x"),
            ("/mnt", "8:17", "/inner"),
            ("/mnt/a", "8:17", "/inner/a"),
        ] {
            let found = mounts.locate(Path::new(path)).unwrap();
            assert_eq!(found, (device, inside.into()), "{path}");
        }
    }

    #[test]
    fn what_can_be_written_below_a_mount_is_what_nothing_covers() {
        let table = |lines: &[(&str, &str, &str)]| {
            let line = |(at, mount, fs): &(&str, &str, &str)| {
                format!("1 2 0:1 / {at} {mount},noexec - tmpfs t {fs}\n")
            };
            Mounts::parse(lines.iter().map(line).collect::<String>().as_bytes())
        };
        let of = |lines: &[(&str, &str, &str)]| table(lines).writability(Path::new("/s/p1"));
        let found = of(&[
            ("/", "ro", "rw"),
            ("/s/p1", "ro", "rw"),
            ("/s/p1/a", "rw", "rw"),
            ("/s/p1/a/same", "rw", "rw"),
            ("/s/p1/a/b", "rw", "ro"),
            ("/s/p1/a/b/c/d", "rw", "rw"),
            ("/s/p1/same", "ro", "rw"),
            ("/s/p1/covered/x", "rw", "rw"),
            ("/s/p1/covered", "ro", "rw"),
            ("/s/p10", "rw", "rw"),
        ]);
        let parts = [("a", false), ("a/b", true), ("a/b/c/d", false)];
        let expected = Writability {
            readonly: true,
            parts: parts.map(|(path, is)| (path.into(), is)).to_vec(),
        };
        assert_eq!(found, Some(expected));
        assert_eq!(of(&[("/s", "rw", "rw"), ("/s/p10", "rw", "rw")]), None);
        let again = of(&[("/s/p1", "ro", "rw"), ("/s/p1", "rw", "rw")]);
        assert_eq!(again, Some(Writability::default()), "the last one counts");
    }

    #[test]
    fn sizes_have_units_and_nonsense_has_none() {
        let of = |options: &str| {
            let mut mounted = Mounts::parse(TEXT).0.remove(0);
            mounted.options = options.into();
            mounted.size_bytes("size")
        };
        assert_eq!(of("rw,size=7"), Some(7));
        assert_eq!(of("rw,size=2m,nr_inodes=1"), Some(2 << 20));
        assert_eq!(of("rw"), None);
        assert_eq!(of("size=x"), None);
        assert_eq!(of("size=99999999999999999999k"), None);
        assert_eq!(of("size=18446744073709551615k"), None);
    }

    #[test]
    fn escapes_are_octal_and_a_lone_backslash_is_itself() {
        assert_eq!(unescape(b"a\\040b\\134c"), Path::new("a b\\c"));
        assert_eq!(unescape(b"a\\9\\04"), Path::new("a\\9\\04"));
        assert_eq!(unescape(b"\\777"), Path::new("\\777"));
    }
}
