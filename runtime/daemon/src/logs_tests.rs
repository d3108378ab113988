// SPDX-License-Identifier: Apache-2.0
//! Tests of [`super`]: lines, paths, rotation, and when bytes are acknowledged.

use super::*;

fn lines_of(chunks: &[(Stream, &[u8])]) -> (String, Lines) {
    let mut lines = Lines::new(0);
    let mut out = Vec::new();
    for (stream, chunk) in chunks {
        lines.push(*stream, chunk, "T", &mut out);
    }
    (String::from_utf8(out).unwrap(), lines)
}

#[test]
fn whole_lines_of_both_streams_are_whole_whatever_the_chunks() {
    let (out, lines) = lines_of(&[
        (Stream::Stdout, b"one\ntw"),
        (Stream::Stderr, b"err\n"),
        (Stream::Stdout, b"o\n\n"),
    ]);
    assert_eq!(
        out,
        "T stdout F one\nT stderr F err\nT stdout F two\nT stdout F \n"
    );
    assert_eq!(lines.stored(), 13);
    assert!(!lines.is_pending());
}

#[test]
fn a_long_line_is_cut_and_its_end_is_whole() {
    let long = vec![b'x'; LINE_BYTES * 2 + 5];
    let (out, _) = lines_of(&[(Stream::Stdout, &long), (Stream::Stdout, b"\n")]);
    let tags: Vec<_> = out
        .lines()
        .map(|line| (&line[9..10], line.len() - 11))
        .collect();
    assert_eq!(tags, [("P", LINE_BYTES), ("P", LINE_BYTES), ("F", 5)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_of_empty_lines_takes_much_memory_only_until_it_is_written() {
    let (mut out, mut lines) = (Vec::new(), Lines::new(0));
    let empty = vec![b'\n'; log_record::MAX_PAYLOAD_BYTES];
    lines.push(Stream::Stdout, &empty, "2016-10-06T00:17:09", &mut out);
    assert!(out.len() > 16 * empty.len());
    let (_reopen, mut requests) = mpsc::channel(1);
    store(&mut LogFile::new(None, 0), &mut out, 0, &mut requests).await;
    assert!(out.capacity() <= KEPT_BYTES, "{}", out.capacity());
}

#[test]
fn only_bytes_before_an_unfinished_line_are_acknowledged() {
    let (_, mut lines) = lines_of(&[(Stream::Stdout, b"a\nprompt"), (Stream::Stderr, b"later\n")]);
    assert_eq!(lines.acknowledge(), Some(2));
    assert_eq!(lines.acknowledge(), None);
    let mut out = Vec::new();
    lines.flush("T", &mut out);
    assert_eq!(out, b"T stdout P prompt\n");
    assert_eq!(lines.acknowledge(), Some(14));
}

#[test]
fn log_paths_stay_below_their_directory() {
    for (directory, path, expected) in [
        (
            "/var/log/pods/x",
            "c/0.log",
            Some("/var/log/pods/x/c/0.log"),
        ),
        ("/var/log/pods/x", "", None),
        ("", "c.log", None),
    ] {
        let expected = expected.map(PathBuf::from);
        assert_eq!(log_path(directory, path).unwrap(), expected, "{path}");
    }
    for (directory, path) in [
        ("/d", "../etc/passwd"),
        ("/d", "/etc/passwd"),
        ("d", "c.log"),
    ] {
        assert!(log_path(directory, path).is_err(), "{directory} {path}");
    }
}

#[test]
fn timestamps_are_rfc3339_with_nanoseconds() {
    for (seconds, nanos, expected) in [
        (0, 0, "1970-01-01T00:00:00.000000000Z"),
        (951_782_400, 1, "2000-02-29T00:00:00.000000001Z"),
        (1_475_713_029, 669_794_202, "2016-10-06T00:17:09.669794202Z"),
        (4_107_542_399, 0, "2100-02-28T23:59:59.000000000Z"),
        (4_107_542_400, 0, "2100-03-01T00:00:00.000000000Z"),
    ] {
        let time = UNIX_EPOCH + Duration::new(seconds, nanos);
        assert_eq!(timestamp(time), expected);
    }
}

/// A record as the agent sends it.
fn record(stream: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![stream];
    bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn payloads(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    let fields = text.lines().map(|line| line.split_once(' ').unwrap().1);
    fields.map(|line| format!("{line}\n")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn records_reach_the_file_are_acknowledged_and_follow_a_rotation() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("new/parent/0.log");
    let (mut agent, host) = tokio::io::duplex(1 << 16);
    let (reopen, mut requests) = mpsc::channel(1);
    let mut log = LogFile::new(Some(path.clone()), 0);
    log.open().unwrap();
    let following = tokio::spawn(async move { follow(host, 100, &mut log, &mut requests).await });
    agent.write_all(&record(1, b"one\n")).await.unwrap();
    assert_eq!(agent.read_u64().await.unwrap(), 104);
    let rotated = path.with_extension("1");
    std::fs::rename(&path, &rotated).unwrap();
    let (answer, answered) = oneshot::channel();
    reopen.send(answer).await.unwrap();
    answered.await.unwrap().unwrap();
    agent.write_all(&record(2, b"two")).await.unwrap();
    assert_eq!(
        agent.read_u64().await.unwrap(),
        107,
        "an unfinished line is stored after a while"
    );
    agent.write_all(&record(0, b"")).await.unwrap();
    assert_eq!(following.await.unwrap().unwrap(), Followed::End);
    assert_eq!(payloads(&rotated), "stdout F one\n");
    assert_eq!(payloads(&path), "stderr P two\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_cannot_be_written_is_not_acknowledged_until_it_can() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    std::fs::create_dir(&path).unwrap();
    let (mut agent, host) = tokio::io::duplex(1 << 16);
    let (_reopen, mut requests) = mpsc::channel(1);
    let mut log = LogFile::new(Some(path.clone()), 0);
    tokio::spawn(async move { follow(host, 0, &mut log, &mut requests).await });
    agent.write_all(&record(1, b"kept\n")).await.unwrap();
    let early = tokio::time::timeout(Duration::from_millis(300), agent.read_u64()).await;
    assert!(early.is_err(), "nothing is stored yet");
    std::fs::remove_dir(&path).unwrap();
    assert_eq!(agent.read_u64().await.unwrap(), 5);
    assert_eq!(payloads(&path), "stdout F kept\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_breaks_the_protocol_ends_the_stream() {
    for bad in [
        vec![9, 0, 0, 0, 1, 0],
        vec![1, 255, 0, 0, 0],
        vec![0, 0, 0, 0, 1],
    ] {
        let (mut agent, host) = tokio::io::duplex(1 << 16);
        let (_reopen, mut requests) = mpsc::channel(1);
        agent.write_all(&bad).await.unwrap();
        let mut log = LogFile::new(None, 0);
        let error = follow(host, 0, &mut log, &mut requests).await.unwrap_err();
        assert!(matches!(error, LogError::Record(_)), "{error:?}");
    }
}

/// Issue 13, point 8: a container that only writes must not fill the disk between two rotations.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_grows_too_fast_waits_and_can_be_rotated_meanwhile() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("0.log");
    let (mut agent, host) = tokio::io::duplex(1 << 16);
    let (reopen, mut requests) = mpsc::channel(1);
    // One line fits into the burst. Another one takes about three seconds more.
    let mut log = LogFile::new(Some(path.clone()), 300);
    tokio::spawn(async move { follow(host, 0, &mut log, &mut requests).await });
    for number in 1..=2 {
        let line = format!("{:1000}\n", "");
        agent.write_all(&record(1, line.as_bytes())).await.unwrap();
        let stored = tokio::time::timeout(Duration::from_secs(1), agent.read_u64()).await;
        assert_eq!(stored.is_ok(), number == 1, "the second has to wait");
        let (answer, answered) = oneshot::channel();
        reopen.send(answer).await.unwrap();
        answered.await.unwrap().unwrap();
    }
    assert_eq!(payloads(&path).lines().count(), 2);
}

/// Issue 13, point 13: a pipe without a reader would keep the daemon's thread for ever.
#[test]
fn a_link_or_a_pipe_in_place_of_a_log_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let (pipe, link) = (directory.path().join("pipe"), directory.path().join("link"));
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    std::os::unix::fs::symlink(directory.path().join("target"), &link).unwrap();
    for path in [pipe, link, "/dev/null".into()] {
        let error = LogFile::new(Some(path), 0).open().unwrap_err();
        assert!(matches!(error, LogError::Open { .. }), "{error}");
    }
    assert!(!directory.path().join("target").exists());
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_reads_no_acknowledgement_is_not_waited_for() {
    let (mut ours, _guest) = tokio::io::duplex(8);
    assert!(acknowledge(&mut ours, 1).await);
    assert!(!acknowledge(&mut ours, 2).await, "there is no more room");
}

#[tokio::test(flavor = "multi_thread")]
async fn records_without_a_line_are_slowed_down_too() {
    // A hundred are free at this rate, and the next one waits until an earlier one is paid for.
    let per_second = 100 * RECORD_COST_BYTES / BURST_SECONDS;
    let (ours, mut agent) = tokio::io::duplex(64);
    let (_requests, mut reopen) = mpsc::channel(1);
    let guest = tokio::spawn(async move {
        let (empty, end) = (
            [log_record::STDOUT, 0, 0, 0, 0],
            [log_record::END, 0, 0, 0, 0],
        );
        for _ in 0..105 {
            agent.write_all(&empty).await.unwrap();
        }
        agent.write_all(&end).await.unwrap();
    });
    let began = Instant::now();
    let mut log = LogFile::new(None, per_second);
    follow(ours, 0, &mut log, &mut reopen).await.unwrap();
    guest.await.unwrap();
    assert!(
        began.elapsed() >= Duration::from_millis(150),
        "{:?}",
        began.elapsed()
    );
}
