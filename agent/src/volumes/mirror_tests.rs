// SPDX-License-Identifier: Apache-2.0
//! Tests of [`super`] and of the stream around it.

use bulkhead_proto::agent::{MirrorAnswer, MirrorRecord};
use tokio::io::DuplexStream;

use super::*;
use crate::streams::messages;
use crate::volumes::mirror_stream::serve;

fn owner(mode: u32) -> Option<Ownership> {
    Some(Ownership {
        mode,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
    })
}

fn entry(path: &str, mode: u32, kind: Kind) -> Record {
    Record::Entry(MirrorEntry {
        path: path.into(),
        ownership: owner(mode),
        kind: Some(kind),
    })
}

/// A state as kubelet makes it: files in a directory of its own, and links to them.
fn state(name: &str, files: &[(&str, &str)]) -> Vec<Record> {
    let mut records = vec![
        entry("", 0o755, Kind::Directory(true)),
        entry(name, 0o755, Kind::Directory(true)),
        entry(CURRENT, 0o777, Kind::Link(name.to_owned().into())),
    ];
    for (file, content) in files {
        let link = format!("{CURRENT}/{file}");
        records.push(entry(&format!("{name}/{file}"), 0o640, Kind::File(true)));
        records.push(Record::Data(content.to_string().into()));
        records.push(entry(file, 0o777, Kind::Link(link.into())));
    }
    records.push(Record::Commit(true));
    records
}

fn mirror() -> (tempfile::TempDir, Mirror) {
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path().canonicalize().unwrap();
    prepare(&home, false).unwrap();
    let mirror = Mirror::new(home, false, Arc::default());
    (directory, mirror)
}

fn take_all(mirror: &mut Mirror, records: Vec<Record>) -> io::Result<()> {
    records
        .into_iter()
        .try_for_each(|record| mirror.take(record))
}

fn read(mirror: &Mirror, path: &str) -> String {
    fs::read_to_string(content(&mirror.home).join(path)).unwrap()
}

#[test]
fn a_state_replaces_the_last_one_and_leaves_nothing_of_it() {
    let (_directory, mut mirror) = mirror();
    take_all(&mut mirror, state("..1", &[("a", "one"), ("b", "two")])).unwrap();
    assert_eq!(
        (read(&mirror, "a"), read(&mirror, "b")),
        ("one".into(), "two".into())
    );
    let mode = fs::metadata(content(&mirror.home).join("a"))
        .unwrap()
        .mode();
    assert_eq!(mode & 0o7777, 0o640);
    // A program that has a file of the old state open can still read it.
    let mut old = File::open(content(&mirror.home).join("a")).unwrap();
    take_all(&mut mirror, state("..2", &[("a", "new"), ("c", "")])).unwrap();
    assert_eq!(
        (read(&mirror, "a"), read(&mirror, "c")),
        ("new".into(), String::new())
    );
    let mut text = String::new();
    old.read_to_string(&mut text).unwrap();
    assert_eq!(text, "one");
    let left = names(&content(&mirror.home)).unwrap();
    assert_eq!(left, ["..2", "..data", "a", "c"]);
    assert_eq!(names(&mirror.home).unwrap(), ["content"]);
}

#[test]
fn a_state_of_the_same_name_with_other_content_is_taken_and_equals_are_left_alone() {
    let (_directory, mut mirror) = mirror();
    take_all(&mut mirror, state("..1", &[("a", "one"), ("b", "b")])).unwrap();
    let inode = |mirror: &Mirror, path: &str| {
        let path = content(&mirror.home).join(path);
        path.symlink_metadata().unwrap().ino()
    };
    let before = inode(&mirror, "..1");
    take_all(&mut mirror, state("..1", &[("a", "one"), ("b", "b")])).unwrap();
    assert_eq!(inode(&mirror, "..1"), before);
    take_all(&mut mirror, state("..1", &[("a", "two"), ("b", "b")])).unwrap();
    assert_eq!(read(&mirror, "a"), "two");
}

#[test]
fn nothing_shows_before_the_commit_nor_after_a_restart() {
    let (_directory, mut mirror) = mirror();
    let mut records = state("..1", &[("a", "half")]);
    records.pop();
    take_all(&mut mirror, records).unwrap();
    assert!(names(&content(&mirror.home)).unwrap().is_empty());
    mirror.take(Record::Restart(true)).unwrap();
    take_all(&mut mirror, state("..2", &[("b", "whole")])).unwrap();
    assert_eq!(
        names(&content(&mirror.home)).unwrap(),
        ["..2", "..data", "b"]
    );
}

#[test]
fn paths_that_are_not_plain_and_links_as_parents_are_refused() {
    let (_directory, mut mirror) = mirror();
    for path in ["../x", "/x", "a/../../x", "."] {
        let refused = mirror.take(entry(path, 0o644, Kind::File(true)));
        assert!(refused.is_err(), "{path}");
    }
    mirror
        .take(entry("out", 0o777, Kind::Link("/tmp".into())))
        .unwrap();
    assert!(
        mirror
            .take(entry("out/x", 0o644, Kind::File(true)))
            .is_err()
    );
    assert!(mirror.take(Record::Data("x".into())).is_err());
}

#[test]
fn a_newer_stream_silences_the_older() {
    let (_directory, mut mirror) = mirror();
    let (home, streams) = (mirror.home.clone(), Arc::clone(&mirror.streams));
    let mut newer = Mirror::new(home, false, streams);
    take_all(&mut newer, state("..2", &[("a", "new")])).unwrap();
    assert!(take_all(&mut mirror, state("..1", &[("a", "old")])).is_err());
    assert_eq!(read(&newer, "a"), "new");
}

#[test]
fn a_single_file_is_written_in_place() {
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path().canonicalize().unwrap();
    prepare(&home, true).unwrap();
    let mut mirror = Mirror::new(home.clone(), true, Arc::default());
    let inode = content(&home).symlink_metadata().unwrap().ino();
    for text in ["127.0.0.1 localhost\n", "short\n"] {
        let records = vec![
            entry("", 0o644, Kind::File(true)),
            Record::Data(text.into()),
            Record::Commit(true),
        ];
        take_all(&mut mirror, records).unwrap();
        assert_eq!(fs::read_to_string(content(&home)).unwrap(), text);
    }
    assert_eq!(content(&home).symlink_metadata().unwrap().ino(), inode);
    assert!(
        mirror
            .take(entry("below", 0o644, Kind::File(true)))
            .is_err()
    );
}

async fn send(host: &mut DuplexStream, records: Vec<Record>) -> MirrorAnswer {
    for record in records {
        let record = Some(record);
        messages::write(host, &MirrorRecord { record })
            .await
            .unwrap();
    }
    messages::read(host, 4096).await.unwrap()
}

#[tokio::test]
async fn each_commit_is_answered_and_an_error_ends_only_its_state() {
    let (_directory, mirror) = mirror();
    let home = mirror.home.clone();
    let (mut host, agent) = tokio::io::duplex(1 << 10);
    tokio::spawn(async move {
        let _ = serve(mirror, agent).await;
    });
    let big = "x".repeat(70_000);
    let first = send(&mut host, state("..1", &[("a", big.as_str())])).await;
    assert_eq!(first.error, "");
    let mut bad = state("..2", &[("b", "b")]);
    bad.insert(0, Record::Data("nowhere".into()));
    let second = send(&mut host, bad).await;
    assert!(second.error.contains("data without a file"), "{second:?}");
    let third = send(&mut host, state("..3", &[("c", "c")])).await;
    assert_eq!(third.error, "");
    assert_eq!(names(&content(&home)).unwrap(), ["..3", "..data", "c"]);
}
