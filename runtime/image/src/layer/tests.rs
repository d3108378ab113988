// SPDX-License-Identifier: Apache-2.0
//! Converts layers and examines the results with erofs-utils, an implementation that is not ours.

use std::path::Path;
use std::process::Command;

use tar::{Builder, EntryType, Header};

use super::*;

/// Collects entries whose fields the `tar` crate's helpers would correct.
struct Tar(Builder<Vec<u8>>);

impl Tar {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn header(kind: EntryType, path: &str, mode: u32) -> Header {
        let mut header = Header::new_gnu();
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(1000);
        header.set_gid(100_000);
        header.set_mtime(1);
        header.set_size(0);
        header
    }

    fn add(mut self, kind: EntryType, path: &str, mode: u32, data: &[u8]) -> Self {
        let mut header = Self::header(kind, path, mode);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn link(mut self, kind: EntryType, path: &str, target: &str) -> Self {
        let mut header = Self::header(kind, path, 0o777);
        header.set_link_name_literal(target).unwrap();
        header.set_cksum();
        self.0.append(&header, &[][..]).unwrap();
        self
    }

    fn device(mut self, kind: EntryType, path: &str, major: u32, minor: u32) -> Self {
        let mut header = Self::header(kind, path, 0o666);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        header.set_cksum();
        self.0.append(&header, &[][..]).unwrap();
        self
    }

    fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        self.0
            .append_pax_extensions(records.iter().copied())
            .unwrap();
        self
    }

    fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn convert_bytes(archive: &[u8], path: &Path) -> Result<(), LayerError> {
    let digest = Digest::of(archive);
    convert(archive, File::create(path).unwrap(), &digest, &digest)
}

/// Runs a program of erofs-utils. If it is missing, the test fails.
fn erofs_utils(program: &str, arguments: &[&str], image: &Path) -> String {
    let output = Command::new(program)
        .args(arguments)
        .arg(image)
        .output()
        .unwrap_or_else(|e| panic!("{program} (apt-get install erofs-utils): {e}"));
    assert!(output.status.success(), "{program}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn everything() -> Vec<u8> {
    let long_name = "n".repeat(255);
    let big: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
    let mut tar = Tar::new()
        .add(EntryType::Directory, "./", 0o755, b"")
        .add(EntryType::Directory, "dir/", 0o1777, b"")
        .add(EntryType::Regular, "dir/small", 0o4755, b"small")
        .add(EntryType::Regular, "dir/empty", 0o600, b"")
        .add(EntryType::Regular, "big", 0o644, &big)
        .add(EntryType::Regular, "holes", 0o644, &vec![0; 300_000])
        .add(EntryType::Regular, "/absolute/./name", 0o644, b"absolute")
        .link(EntryType::Link, "hard", "dir/small")
        .link(EntryType::Symlink, "soft", "../dir/small")
        .link(EntryType::Symlink, "long-soft", &"t/".repeat(50))
        .device(EntryType::Char, "null", 1, 3)
        .device(EntryType::Block, "disk", 259, 70_000)
        .device(EntryType::Fifo, "fifo", 0, 0)
        .add(EntryType::Regular, "dir/.wh.gone", 0o644, b"")
        .add(EntryType::Regular, "opaque/.wh..wh..opq", 0o644, b"")
        .pax(&[("path", long_name.as_bytes()), ("mtime", b"-1.5")])
        .add(EntryType::Regular, "short", 0o644, b"long")
        .pax(&[
            ("SCHILY.xattr.user.mine", b"value"),
            (
                "SCHILY.xattr.security.capability",
                &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0],
            ),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ])
        .add(EntryType::Regular, "attributes", 0o644, b"x");
    for index in 0..1000 {
        tar = tar.add(
            EntryType::Regular,
            &format!("many/file-with-a-number-{index}"),
            0o644,
            b"m",
        );
    }
    tar.finish()
}

#[test]
fn erofs_utils_find_no_fault_and_the_same_files() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("layer.erofs");
    convert_bytes(&everything(), &image).unwrap();
    let extracted = directory.path().join("out");
    let extract = format!("--extract={}", extracted.display());
    // mknod needs root, so fsck.erofs cannot extract devices. dump.erofs below and the end-to-end tests compare them.
    let output = Command::new("fsck.erofs")
        .arg(&extract)
        .arg(&image)
        .output()
        .expect("fsck.erofs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !text.contains("orrupt") && !text.contains("bogus"),
        "{text}"
    );
    erofs_utils("fsck.erofs", &[], &image);
    let read =
        |name: &str| std::fs::read(extracted.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(read("dir/small"), b"small");
    assert_eq!(read("hard"), b"small");
    assert_eq!(read("dir/empty"), b"");
    assert_eq!(read("holes"), vec![0; 300_000]);
    assert_eq!(read("absolute/name"), b"absolute");
    assert_eq!(read(&"n".repeat(255)), b"long");
    assert_eq!(read("many/file-with-a-number-999"), b"m");
    assert_eq!(read("big").len(), 400_000);
    assert_eq!(
        Digest::of(&read("big")),
        Digest::of(
            &(0..100_000u32)
                .flat_map(u32::to_le_bytes)
                .collect::<Vec<_>>()
        )
    );
    let target = std::fs::read_link(extracted.join("soft")).unwrap();
    assert_eq!(target, Path::new("../dir/small"));
    assert_eq!(
        std::fs::read_dir(extracted.join("many")).unwrap().count(),
        1000
    );
    // 200 KB of numbers and names. The zeroes of "holes" take no space.
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&image).unwrap());
    assert!(blocks * 512 < 4_900_000, "{blocks}");
}

#[test]
fn attributes_are_kept_as_dump_erofs_shows_them() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("layer.erofs");
    convert_bytes(&everything(), &image).unwrap();
    for (path, expected) in [
        // dump.erofs does not show set-uid, set-gid and sticky bits.
        (
            "/dir/small",
            vec!["Uid: 1000", "Gid: 100000", "Access: 0755", "Links: 2"],
        ),
        ("/dir", vec!["Access: 0777", "Links: 2"]),
        ("/absolute", vec!["Access: 0755", "Uid: 0"]),
        ("/attributes", vec!["Xattr size: "]),
        ("/null", vec!["char dev"]),
        ("/disk", vec!["block dev"]),
        ("/fifo", vec!["fifo"]),
        ("/dir/gone", vec!["char dev"]),
    ] {
        let shown = erofs_utils("dump.erofs", &[&format!("--path={path}")], &image);
        let shown = shown.split_whitespace().collect::<Vec<_>>().join(" ");
        for word in expected {
            let word = word.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(shown.contains(&word), "{path}: no {word:?} in {shown}");
        }
    }
    let listed = erofs_utils("dump.erofs", &["--ls", "--path=/"], &image);
    assert!(!listed.contains(".wh."), "{listed}");
}

#[test]
fn the_same_layer_gives_the_same_bytes_however_it_is_compressed() {
    let directory = tempfile::tempdir().unwrap();
    let archive = everything();
    let plain = directory.path().join("plain");
    convert_bytes(&archive, &plain).unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    io::Write::write_all(&mut gzip, &archive).unwrap();
    let packed = [
        gzip.finish().unwrap(),
        zstd::encode_all(&archive[..], 3).unwrap(),
    ];
    for (index, bytes) in packed.iter().enumerate() {
        let path = directory.path().join(index.to_string());
        let file = File::create(&path).unwrap();
        convert(&bytes[..], file, &Digest::of(bytes), &Digest::of(&archive)).unwrap();
        assert!(
            std::fs::read(&path).unwrap() == std::fs::read(&plain).unwrap(),
            "{index}"
        );
    }
}

#[test]
fn what_is_not_what_it_should_be_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer");
    let file = |name| {
        Tar::new()
            .add(EntryType::Regular, name, 0o644, b"x")
            .finish()
    };
    let huge_record = {
        let mut header = Tar::header(EntryType::XHeader, "x", 0);
        header.set_size(1 << 30);
        header.set_cksum();
        header.as_bytes().to_vec()
    };
    let mut broken = file("x");
    broken[0] ^= 1;
    let half = everything()[..100_000].to_vec();
    for (case, archive, kind, word) in [
        (
            "dot dot",
            file("../etc/passwd"),
            FailureKind::Invalid,
            "\"..\"",
        ),
        (
            "dot dot inside",
            file("a/../../etc"),
            FailureKind::Invalid,
            "\"..\"",
        ),
        (
            "huge record",
            huge_record,
            FailureKind::Invalid,
            "1073741824",
        ),
        ("bad checksum", broken, FailureKind::Corrupt, "checksum"),
        ("cut", half, FailureKind::Corrupt, "ends in the middle"),
        ("no archive", vec![7; 600], FailureKind::Corrupt, "checksum"),
        (
            "sparse",
            Tar::new()
                .pax(&[("GNU.sparse.major", b"1")])
                .add(EntryType::Regular, "s", 0, b"")
                .finish(),
            FailureKind::Invalid,
            "sparse",
        ),
        (
            "hard link to nowhere",
            Tar::new().link(EntryType::Link, "a", "../b").finish(),
            FailureKind::Invalid,
            "\"..\"",
        ),
    ] {
        let error = convert_bytes(&archive, &path).expect_err(case);
        let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        let chain = format!("{text}{:?}", std::error::Error::source(&error).unwrap());
        assert_eq!(error.kind(), kind, "{case}: {chain}");
        assert!(
            chain.contains(word) || chain.contains("DotDot"),
            "{case}: {chain}"
        );
    }
}

#[test]
fn a_wrong_digest_is_told_before_the_damage_it_did() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer");
    let archive = everything();
    let right = Digest::of(&archive);
    let wrong = Digest::of(b"other");
    let try_with = |bytes: &[u8], digest, diff_id| {
        convert(bytes, File::create(&path).unwrap(), digest, diff_id).unwrap_err()
    };
    let mut damaged = archive.clone();
    damaged[0] ^= 0xff;
    assert!(matches!(
        try_with(&damaged, &right, &right),
        LayerError::Digest { .. }
    ));
    assert!(matches!(
        try_with(&archive, &wrong, &right),
        LayerError::Digest { .. }
    ));
    assert!(matches!(
        try_with(&archive, &right, &wrong),
        LayerError::DiffId { .. }
    ));
}

#[test]
fn a_layer_that_unpacks_to_too_much_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let zeros = vec![0; 1 << 20];
    let file = Tar::new().add(EntryType::Regular, "zeros", 0o644, &zeros);
    let mut after_the_end = Tar::new().finish();
    after_the_end.extend(&zeros);
    for (case, archive) in [
        ("in a file", file.finish()),
        ("behind the end mark", after_the_end),
    ] {
        let packed = zstd::encode_all(&archive[..], 3).unwrap();
        let unpacked = |limit_bytes| {
            let file = File::create(directory.path().join("layer")).unwrap();
            unpack(&mut &packed[..], &mut BlockWriter::new(file), limit_bytes)
        };
        let length = archive.len() as u64;
        assert_eq!(unpacked(length).unwrap(), Digest::of(&archive), "{case}");
        let error = unpacked(length - 1).unwrap_err();
        assert!(matches!(error, LayerError::Bomb), "{case}: {error:?}");
        assert_eq!(error.kind(), FailureKind::Invalid);
    }
}

#[test]
fn a_full_disk_is_told_as_such() {
    let archive = everything();
    let digest = Digest::of(&archive);
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let error = convert(&archive[..], full(), &digest, &digest).unwrap_err();
    assert_eq!(error.kind(), FailureKind::NoSpace, "{error:?}");
    // So small that nothing is written before the end.
    let archive = Tar::new().finish();
    let digest = Digest::of(&archive);
    let error = convert(&archive[..], full(), &digest, &digest).unwrap_err();
    assert_eq!(error.kind(), FailureKind::NoSpace, "{error:?}");
}

#[test]
fn links_and_directories_have_no_data_whatever_their_size_says() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("layer.erofs");
    let mut tar = Tar::new().add(EntryType::Regular, "file", 0o644, b"x");
    for (kind, path) in [(EntryType::Link, "hard"), (EntryType::Directory, "dir")] {
        let mut header = Tar::header(kind, path, 0o755);
        header.set_size(512);
        if kind == EntryType::Link {
            header.set_link_name_literal("file").unwrap();
        }
        header.set_cksum();
        tar.0.append(&header, &[][..]).unwrap();
    }
    tar = tar.add(EntryType::Regular, "after", 0o644, b"y");
    convert_bytes(&tar.finish(), &image).unwrap();
    let listed = erofs_utils("dump.erofs", &["--ls", "--path=/"], &image);
    for name in ["hard", "dir", "after"] {
        assert!(listed.contains(name), "{name}: {listed}");
    }
}
