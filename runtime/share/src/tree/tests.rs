// SPDX-License-Identifier: Apache-2.0
//! The rules of shares, tested on temporary directories.

use std::ffi::CString;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::GetxattrReply;

use super::*;

/// A tree with shares `p1` and `p2`.
pub fn tree() -> (tempfile::TempDir, Tree) {
    let directory = tempfile::tempdir().unwrap();
    let names = ["p1", "p2"];
    for name in names {
        std::fs::create_dir(directory.path().join(name)).unwrap();
    }
    let tree = Tree::of_directories(directory.path(), &names).unwrap();
    (directory, tree)
}

fn me() -> Context {
    Context {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        pid: 1,
    }
}

fn code<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

fn find(tree: &Tree, path: &str) -> u64 {
    let names = path.split('/').map(|name| CString::new(name).unwrap());
    names.fold(ROOT_ID, |node, name| {
        tree.lookup(&me(), node, &name).unwrap().inode
    })
}

#[test]
fn a_share_is_found_by_its_name_and_nothing_else_is_there() {
    let (directory, tree) = tree();
    std::fs::create_dir(directory.path().join("p3")).unwrap();
    assert_eq!(find(&tree, "p1") >> NUMBER_SHIFT, 1);
    for (name, error) in [
        (c"p3", libc::ENOENT),
        (c"p4", libc::ENOENT),
        (c"other", libc::ENOENT),
        (c"..", libc::EINVAL),
        (c".", libc::EINVAL),
        (c"p1/x", libc::EINVAL),
    ] {
        let found = tree.lookup(&me(), ROOT_ID, name);
        assert_eq!(code(found), Some(error), "{name:?}");
    }
    let made = tree.mkdir(&me(), ROOT_ID, c"p9", 0o755, 0);
    assert_eq!(code(made), Some(libc::EACCES));
    assert_eq!(code(tree.unlink(&me(), ROOT_ID, c"p1")), Some(libc::EACCES));
}

#[test]
fn no_link_and_no_name_leads_out_of_a_share() {
    let (directory, tree) = tree();
    let share = directory.path().join("p1");
    std::fs::write(directory.path().join("p2/secret"), "x").unwrap();
    symlink("../p2/secret", share.join("up")).unwrap();
    symlink("/etc/passwd", share.join("absolute")).unwrap();
    let root = find(&tree, "p1");
    assert_eq!(code(tree.lookup(&me(), root, c"..")), Some(libc::EINVAL));
    for name in ["up", "absolute"] {
        let node = find(&tree, &format!("p1/{name}"));
        let target = tree.readlink(&me(), node).unwrap();
        assert!(!target.is_empty(), "the guest follows it, in its own tree");
        // The flags 0 are O_RDONLY; the node is the link itself.
        assert!(tree.open(&me(), node, 0, 0).is_err(), "{name}");
        let below = tree.lookup(&me(), node, c"x");
        assert_eq!(code(below), Some(libc::ENOTDIR), "{name}");
    }
    let (one, two) = (find(&tree, "p1"), find(&tree, "p2"));
    let moved = tree.rename(&me(), two, c"secret", one, c"stolen", 0);
    assert_eq!(code(moved), Some(libc::EXDEV));
    let secret = find(&tree, "p2/secret");
    let linked = tree.link(&me(), secret, one, c"stolen");
    assert_eq!(code(linked), Some(libc::EXDEV));
}

#[test]
fn sockets_and_pipes_are_made_and_devices_are_not() {
    let (directory, tree) = tree();
    let root = find(&tree, "p1");
    let make = |name: &std::ffi::CStr, kind| tree.mknod(&me(), root, name, kind | 0o644, 0x103, 0);
    make(c"socket", libc::S_IFSOCK).unwrap();
    make(c"pipe", libc::S_IFIFO).unwrap();
    assert_eq!(code(make(c"null", libc::S_IFCHR)), Some(libc::EPERM));
    assert_eq!(code(make(c"disk", libc::S_IFBLK)), Some(libc::EPERM));
    let kind = |name: &str| {
        let path = directory.path().join("p1").join(name);
        path.symlink_metadata().map(|found| found.file_type())
    };
    assert!(kind("socket").unwrap().is_socket());
    assert!(kind("pipe").unwrap().is_fifo());
    assert!(kind("null").is_err());
    let pipe = find(&tree, "p1/pipe");
    let opened = tree.open(&me(), pipe, 0, 0);
    assert_eq!(
        code(opened),
        Some(libc::EBADF),
        "the guest's kernel has its own end"
    );
}

#[test]
fn modes_are_the_guests_to_set() {
    let (directory, tree) = tree();
    let root = find(&tree, "p1");
    rustix::process::umask(rustix::fs::Mode::empty());
    tree.mkdir(&me(), root, c"d", 0o1777, 0).unwrap();
    let args = CreateIn {
        flags: (libc::O_RDWR | libc::O_DIRECT).cast_unsigned(),
        mode: libc::S_IFREG | 0o666,
        umask: 0,
        fuse_flags: 0,
    };
    let (entry, handle, ..) = tree.create(&me(), root, c"f", args).unwrap();
    assert_eq!(entry.inode >> NUMBER_SHIFT, 1);
    assert!(handle.is_some());
    let mode = |name: &str| {
        let path = directory.path().join("p1").join(name);
        std::fs::metadata(path).unwrap().mode() & 0o7777
    };
    assert_eq!((mode("d"), mode("f")), (0o1777, 0o666));
}

#[test]
fn only_users_attributes_are_seen_and_a_huge_buffer_is_not_made() {
    let (_directory, tree) = tree();
    let root = find(&tree, "p1");
    tree.setxattr(&me(), root, c"user.key", b"value", 0)
        .unwrap();
    let set = tree.setxattr(&me(), root, c"security.capability", b"x", 0);
    assert_eq!(code(set), Some(libc::EOPNOTSUPP));
    let GetxattrReply::Value(value) = tree.getxattr(&me(), root, c"user.key", u32::MAX).unwrap()
    else {
        panic!("a value");
    };
    assert_eq!(value, b"value");
    tree.removexattr(&me(), root, c"user.key").unwrap();
    let missing = tree.getxattr(&me(), root, c"user.key", 100);
    assert_eq!(code(missing), Some(libc::ENODATA));
}

#[test]
fn a_share_that_is_gone_is_forgotten_and_its_nodes_with_it() {
    let (directory, tree) = tree();
    let root = find(&tree, "p1");
    std::fs::remove_dir(directory.path().join("p1")).unwrap();
    tree.sweep();
    assert_eq!(code(tree.getattr(&me(), root, None)), Some(libc::ESTALE));
    assert!(tree.getattr(&me(), find(&tree, "p2"), None).is_ok());
}

#[test]
fn shares_that_follow_the_hosts_mounts_are_asked_each_time() {
    let timeout = |propagation| {
        let config = config(Path::new("/s"), propagation).unwrap();
        (config.entry_timeout, config.attr_timeout)
    };
    let zero = Duration::ZERO;
    assert_eq!(timeout(Propagation::Slave), (zero, zero));
    assert_eq!(
        timeout(Propagation::Private),
        (PRIVATE_TIMEOUT, PRIVATE_TIMEOUT)
    );
}
