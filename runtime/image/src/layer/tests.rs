// SPDX-License-Identifier: Apache-2.0
//! Converts layers and examines the results with erofs-utils, an implementation that is not ours.

use std::os::unix::fs::FileExt;
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

fn wide() -> Arc<Limits> {
    Arc::new(limits::tests::wide())
}

fn promise(bytes: &[u8], archive: &[u8]) -> Promise {
    Promise {
        digest: Digest::of(bytes),
        bytes: bytes.len() as u64,
        content: Content::Layer {
            diff_id: Digest::of(archive),
        },
    }
}

fn convert_bytes(archive: &[u8], path: &Path) -> Result<(), LayerError> {
    let promise = promise(archive, archive);
    convert(archive, File::create(path).unwrap(), &promise, &wide())
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
fn holes_of_sparse_files_stay_holes_in_each_form_that_gnu_tar_writes() {
    const HOLE: u64 = 5 << 30;
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let content = |name: &str| std::fs::read(path(name)).unwrap();
    // More parts than the header of an entry has room for.
    let parts = File::create(path("parts")).unwrap();
    for index in 0..60u64 {
        let bytes = vec![b'a' + (index % 26) as u8; 5000];
        parts.write_all_at(&bytes, index * 40_000 + 700).unwrap();
    }
    parts.set_len(3_000_001).unwrap();
    let large = File::create(path("large")).unwrap();
    large.write_all_at(b"end", HOLE).unwrap();
    for form in [
        &["--format=gnu"][..],
        &["--format=posix", "--sparse-version=0.0"],
        &["--format=posix", "--sparse-version=0.1"],
        &["--format=posix", "--sparse-version=1.0"],
    ] {
        let packed = Command::new("tar")
            .args(["--create", "--sparse", "--file=-"])
            .args(form)
            .arg("--directory")
            .arg(directory.path())
            .args(["parts", "large"])
            .output()
            .unwrap();
        assert!(packed.status.success(), "{packed:?}");
        assert!(
            packed.stdout.len() < 1 << 20,
            "{form:?}: tar found the holes"
        );
        let image = path("layer.erofs");
        convert_bytes(&packed.stdout, &image).unwrap_or_else(|e| panic!("{form:?}: {e:?}"));
        let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&image).unwrap());
        assert!(blocks * 512 < 1 << 20, "{form:?}: {blocks}");
        let size = erofs_utils("dump.erofs", &["--path=/large"], &image);
        assert!(size.contains(&(HOLE + 3).to_string()), "{form:?}: {size}");
        let read = erofs_utils("dump.erofs", &["--path=/parts"], &image);
        assert!(read.contains("3000001"), "{form:?}: {read}");
        let found = regular_file(&image, 3_000_001);
        assert_eq!(found, content("parts"), "{form:?}");
    }
}

/// The content of the first file in `image`, which begins at the first block.
fn regular_file(image: &Path, bytes: usize) -> Vec<u8> {
    let mut content = vec![0; bytes];
    let file = File::open(image).unwrap();
    file.read_exact_at(&mut content, blocks::BLOCK_BYTES as u64)
        .unwrap();
    content
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

/// A download of which each byte comes by itself.
struct OneByOne<'a>(&'a [u8]);

impl Read for OneByOne<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(1);
        self.0.read(&mut buffer[..most])
    }
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
        let slow = OneByOne(bytes);
        convert(slow, file, &promise(bytes, &archive), &wide()).unwrap();
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
            "sparse without a map",
            Tar::new()
                .pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", b"9")])
                .add(EntryType::Regular, "s", 0, b"no map\n")
                .finish(),
            FailureKind::Invalid,
            "sparse map",
        ),
        (
            "sparse of a version to come",
            Tar::new()
                .pax(&[("GNU.sparse.major", b"2")])
                .add(EntryType::Regular, "s", 0, b"")
                .finish(),
            FailureKind::Invalid,
            "sparse map",
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
fn a_blob_of_an_artifact_is_unpacked_or_is_a_file_with_a_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer");
    let convert_as = |content: Content, bytes: &[u8]| {
        let promise = Promise {
            digest: Digest::of(bytes),
            bytes: bytes.len() as u64,
            content,
        };
        convert(bytes, File::create(&path).unwrap(), &promise, &wide())
    };
    let cat = |file: &str| {
        let unpacked = tempfile::tempdir_in(directory.path()).unwrap();
        let option = format!("--extract={}", unpacked.path().display());
        erofs_utils("fsck.erofs", &[&option, "--overwrite"], &path);
        std::fs::read_to_string(unpacked.path().join(file)).unwrap()
    };
    let archive = Tar::new().add(EntryType::Regular, "inside", 0o644, b"in the archive");
    let archive = archive.finish();
    let named = |name: &str| Some(name.to_owned());
    convert_as(Content::Archive { name: None }, &archive).unwrap();
    assert_eq!(cat("inside"), "in the archive");
    convert_as(Content::Archive { name: named("x") }, &archive).unwrap();
    assert_eq!(cat("inside"), "in the archive");
    convert_as(Content::Archive { name: named("a/b") }, b"no archive").unwrap();
    assert_eq!(cat("a/b"), "no archive");
    convert_as(Content::File { name: "x".into() }, b"hello").unwrap();
    assert_eq!(cat("x"), "hello");
    let error = convert_as(Content::Archive { name: None }, b"no archive").unwrap_err();
    assert!(matches!(error, LayerError::Tar(_)), "{error:?}");
}

#[test]
fn a_wrong_digest_is_told_before_the_damage_it_did() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer");
    let archive = everything();
    let right = Digest::of(&archive);
    let wrong = Digest::of(b"other");
    let try_with = |bytes: &[u8], digest: &Digest, diff_id: &Digest| {
        let promise = Promise {
            digest: digest.clone(),
            bytes: bytes.len() as u64,
            content: Content::Layer {
                diff_id: diff_id.clone(),
            },
        };
        let converted = convert(bytes, File::create(&path).unwrap(), &promise, &wide());
        let verified = verify(bytes, &promise, &wide()).unwrap_err();
        let error = converted.unwrap_err();
        assert_eq!(verified.to_string(), error.to_string());
        error
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

/// A layer of 2 GiB of zeroes, which is 2 MB of gzip or 200 KB of zstd.
fn bomb() -> Vec<u8> {
    let mut header = Tar::header(EntryType::Regular, "zeroes", 0o644);
    header.set_size(2 << 30);
    header.set_cksum();
    let mut packed = zstd::Encoder::new(Vec::new(), 1).unwrap();
    io::Write::write_all(&mut packed, header.as_bytes()).unwrap();
    io::copy(&mut io::repeat(0).take(2 << 30), &mut packed).unwrap();
    packed.finish().unwrap()
}

#[test]
fn a_layer_that_unpacks_to_too_much_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer");
    let packed = bomb();
    let promise = promise(&packed, b"never computed");
    let converted = convert(&packed[..], File::create(&path).unwrap(), &promise, &wide());
    let verified = verify(&packed[..], &promise, &wide());
    for error in [converted.unwrap_err(), verified.unwrap_err()] {
        let is_ratio = matches!(error, LayerError::Excess(Excess::Ratio { .. }));
        assert!(is_ratio, "{error:?}");
        assert_eq!(error.kind(), FailureKind::Invalid);
    }
}

/// A reader that says at its first read that the pull is given up, and counts what is read afterwards.
struct GivingUp<R> {
    inner: R,
    limits: Arc<Limits>,
    reads: usize,
}

impl<R: Read> Read for &mut GivingUp<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.limits.give_up();
        self.reads += 1;
        self.inner.read(buffer)
    }
}

#[test]
fn a_conversion_ends_when_its_pull_is_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer");
    // Each read of 64 KiB is worth more than 500 MiB.
    let packed = bomb();
    let limits = wide();
    let mut reader = GivingUp {
        inner: &packed[..],
        limits: Arc::clone(&limits),
        reads: 0,
    };
    let file = File::create(&path).unwrap();
    let error = convert(&mut reader, file, &promise(&packed, b""), &limits).unwrap_err();
    assert!(
        matches!(error, LayerError::Excess(Excess::GivenUp)),
        "{error:?}"
    );
    assert_eq!(reader.reads, 1);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
}

#[test]
fn a_full_disk_is_told_as_such() {
    let archive = everything();
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let small = Tar::new().finish();
    // The second is so small that nothing is written before the end.
    for archive in [archive, small] {
        let promise = promise(&archive, &archive);
        let error = convert(&archive[..], full(), &promise, &wide()).unwrap_err();
        assert_eq!(error.kind(), FailureKind::NoSpace, "{error:?}");
    }
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

/// Issue 13, point 6: 400,000 names of one file in one directory, which has 2,000 blocks.
#[test]
fn a_layer_of_hard_links_is_converted_within_the_memory_that_it_is_charged() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("layer.erofs");
    let mut archive = Tar::new().add(EntryType::Regular, "d/file", 0o644, b"x");
    for number in 0..400_000 {
        archive = archive.link(EntryType::Link, &format!("d/{number:06}"), "d/file");
    }
    convert_bytes(&archive.finish(), &image).unwrap();
    let shown = erofs_utils("dump.erofs", &["--path=/d/399999"], &image);
    let shown = shown.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(shown.contains("Links: 400001"), "{shown}");
}
