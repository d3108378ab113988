// SPDX-License-Identifier: Apache-2.0
//! Container logs: writes the agent's records as CRI log lines to a file.
//!
//! One task for each container runs [`follow`]. It acknowledges bytes to the agent only after they are in the file. So
//! on a full disk the container has to wait, but nothing is lost, and a restarted daemon gets what the old one had not
//! stored. A line that stays unfinished for [`IDLE`] is written as a partial line.
//!
//! ```text
//! 2016-10-06T00:17:09.669794202Z stdout F a whole line
//! 2016-10-06T00:17:09.669794203Z stderr P the first part of a line
//! ```

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bulkhead_faults::{self as faults, Fault, Step};
use bulkhead_guest::pace::Pace;
use bulkhead_proto::agent::log_record;
use bulkhead_text::chain;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{mpsc, oneshot};

use crate::modes;

/// The longest line that is written in one piece. Other runtimes use the same limit.
const LINE_BYTES: usize = 16 << 10;
/// How much is read ahead. Payloads that are longer are not copied through this buffer.
const READ_BYTES: usize = 8 << 10;
/// How much memory for finished lines a container keeps when it has written them. A record of line feeds alone makes a
/// megabyte of them.
const KEPT_BYTES: usize = LINE_BYTES;
/// How long an unfinished line waits for its end.
const IDLE: Duration = Duration::from_millis(500);
/// How long the agent may take to read an acknowledgement. Thousands of them fit on the way, so only one that reads none
/// takes so long. Requests to open the file again wait meanwhile.
const ACKNOWLEDGE_LIMIT: Duration = Duration::from_secs(10);
/// The pause between attempts to write to a file after an error.
const RETRY: Duration = Duration::from_secs(1);
/// What a record costs at least, in bytes of the log's rate. It may be empty, and takes work all the same.
const RECORD_COST_BYTES: u64 = 512;
/// A log may grow at once as much as in so many seconds.
const BURST_SECONDS: u64 = 4;

/// An error about a container's log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("log path {0:?} is not below the pod's log directory")]
    Path(String),
    #[error("open container log {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("write container log {path}")]
    Write { path: PathBuf, source: io::Error },
    #[error("log stream of the guest")]
    Stream(#[source] io::Error),
    #[error("the guest sent a log record with {0}")]
    Record(String),
    #[error(
        "{0} requests to reopen the container log wait already; try again when they are answered"
    )]
    Busy(usize),
    #[error("the container log is complete, so it is not opened again")]
    Complete,
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// Joins the pod's log directory and the container's path in it. `None` if no log was asked for.
pub fn log_path(directory: &str, path: &str) -> Result<Option<PathBuf>, LogError> {
    if directory.is_empty() || path.is_empty() {
        return Ok(None);
    }
    let relative = Path::new(path);
    let inside = |part| matches!(part, Component::Normal(_) | Component::CurDir);
    if !relative.components().all(inside) || !Path::new(directory).is_absolute() {
        return Err(LogError::Path(path.to_owned()));
    }
    Ok(Some(Path::new(directory).join(relative)))
}

/// How a stream of records ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Followed {
    /// The log is complete: the container will write no more.
    End,
    /// The connection broke, and there may be more.
    Broken,
}

/// A request to open the log file again. It is answered with the result.
pub type Reopen = oneshot::Sender<Result<(), LogError>>;

/// The file side of one container's log.
#[derive(Debug)]
pub struct LogFile {
    /// `None` if no log was asked for. Then the output is acknowledged and discarded, so that the container does not
    /// wait.
    path: Option<PathBuf>,
    file: Option<File>,
    pace: Pace,
}

impl LogFile {
    /// `bytes_per_second` is how fast the log may grow for long. Zero: as fast as it likes.
    pub fn new(path: Option<PathBuf>, bytes_per_second: u64) -> Self {
        let burst = bytes_per_second.saturating_mul(BURST_SECONDS);
        Self {
            path,
            file: None,
            pace: Pace::new(bytes_per_second, burst),
        }
    }

    /// Opens the file by its name. After a rotation that makes a new file.
    pub fn open(&mut self) -> Result<(), LogError> {
        let Some(path) = &self.path else {
            return Ok(());
        };
        let failed = |source| LogError::Open {
            path: path.clone(),
            source,
        };
        if let Some(parent) = path.parent() {
            modes::directory_for_all(parent).map_err(failed)?;
        }
        let opened = || modes::log_file(path).map_err(failed);
        self.file = Some(faults::within(Step::OpenLog, opened)?);
        Ok(())
    }

    /// Appends all of `lines` or nothing, as far as the file system allows that.
    fn append(&mut self, lines: &[u8]) -> Result<(), LogError> {
        let Some(path) = self.path.clone() else {
            return Ok(());
        };
        if self.file.is_none() {
            self.open()?;
        }
        let Some(file) = self.file.as_mut() else {
            return Ok(());
        };
        let before = file.metadata().map(|metadata| metadata.len());
        file.write_all(lines).map_err(|source| {
            // Remove what was written, because readers cannot parse an incomplete line.
            if let Ok(length) = before {
                let _ = file.set_len(length);
            }
            LogError::Write { path, source }
        })
    }
}

/// Copies records from `stream` to `log` until the stream ends. `offset` is the number of payload bytes before the
/// first record, as the agent has sent it.
pub async fn follow(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    offset: u64,
    log: &mut LogFile,
    reopen: &mut mpsc::Receiver<Reopen>,
) -> Result<Followed, LogError> {
    let (reader, mut writer) = tokio::io::split(stream);
    let (records, mut incoming) = mpsc::channel(4);
    // Reading is a separate task, because the read of a record must not be cancelled in the middle.
    let reading = tokio::spawn(read_records(
        BufReader::with_capacity(READ_BYTES, reader),
        records,
    ));
    let _stop = AbortOnDrop(reading.abort_handle());
    let mut lines = Lines::new(offset);
    let mut out = Vec::new();
    loop {
        let idle = tokio::time::sleep(IDLE);
        let mut cost = 0;
        tokio::select! {
            record = incoming.recv() => match record {
                Some(Ok(Record::Payload { stream, bytes })) => {
                    cost = RECORD_COST_BYTES;
                    lines.push(stream, &bytes, &timestamp(SystemTime::now()), &mut out);
                }
                Some(Ok(Record::End)) => {
                    lines.flush(&timestamp(SystemTime::now()), &mut out);
                    store(log, &mut out, 0, reopen).await;
                    acknowledge(&mut writer, lines.stored()).await;
                    return Ok(Followed::End);
                }
                Some(Err(error)) => return Err(error),
                None => return Ok(Followed::Broken),
            },
            Some(answer) = reopen.recv() => {
                let _ = answer.send(log.open());
                continue;
            }
            () = idle, if lines.is_pending() => {
                lines.flush(&timestamp(SystemTime::now()), &mut out);
            }
        }
        store(log, &mut out, cost, reopen).await;
        if let Some(stored) = lines.acknowledge()
            && !acknowledge(&mut writer, stored).await
        {
            return Ok(Followed::Broken);
        }
    }
}

/// Tells the agent how many bytes are stored. Returns whether it takes that.
async fn acknowledge(writer: &mut (impl AsyncWrite + Unpin), stored: u64) -> bool {
    let told = tokio::time::timeout(ACKNOWLEDGE_LIMIT, writer.write_u64(stored)).await;
    told.is_ok_and(|told| told.is_ok())
}

/// Writes `out`, and tries again until that succeeds. Meanwhile nothing is acknowledged. Only the first error is
/// logged. A log that grows too fast, or costs too much, waits here, and its container with it.
async fn store(
    log: &mut LogFile,
    out: &mut Vec<u8>,
    cost: u64,
    reopen: &mut mpsc::Receiver<Reopen>,
) {
    let (mut said, bytes) = (false, (out.len() as u64).max(cost));
    while !out.is_empty() {
        let written = tokio::task::block_in_place(|| log.append(out));
        match written {
            Ok(()) => {
                out.clear();
                out.shrink_to(KEPT_BYTES);
            }
            Err(error) => {
                if !said {
                    tracing::warn!("{}; the container waits and nothing is lost", chain(&error));
                    said = true;
                }
                wait(RETRY, log, reopen).await;
            }
        }
    }
    let until = Instant::now() + log.pace.take(bytes);
    while let Some(left) = until
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
    {
        wait(left, log, reopen).await;
    }
}

/// Waits, but not longer than until a request to open the log again, which it fulfils.
async fn wait(time: Duration, log: &mut LogFile, reopen: &mut mpsc::Receiver<Reopen>) {
    tokio::select! {
        Some(answer) = reopen.recv() => { let _ = answer.send(log.open()); }
        () = tokio::time::sleep(time) => {}
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Stdout,
    Stderr,
}

enum Record {
    Payload { stream: Stream, bytes: Vec<u8> },
    End,
}

async fn read_records(
    mut reader: impl AsyncReadExt + Unpin,
    records: mpsc::Sender<Result<Record, LogError>>,
) {
    loop {
        let record = match read_record(&mut reader).await {
            Ok(record) => record,
            Err(LogError::Stream(e)) if e.kind() == io::ErrorKind::UnexpectedEof => return,
            Err(error) => {
                let _ = records.send(Err(error)).await;
                return;
            }
        };
        let last = matches!(record, Record::End);
        if records.send(Ok(record)).await.is_err() || last {
            return;
        }
    }
}

async fn read_record(reader: &mut (impl AsyncReadExt + Unpin)) -> Result<Record, LogError> {
    let kind = reader.read_u8().await.map_err(LogError::Stream)?;
    let length = reader.read_u32().await.map_err(LogError::Stream)?;
    let stream = match kind {
        log_record::END if length == 0 => return Ok(Record::End),
        log_record::STDOUT => Stream::Stdout,
        log_record::STDERR => Stream::Stderr,
        _ => return Err(LogError::Record(format!("stream {kind}"))),
    };
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > log_record::MAX_PAYLOAD_BYTES {
        return Err(LogError::Record(format!("{length} bytes")));
    }
    let mut bytes = vec![0; length];
    reader
        .read_exact(&mut bytes)
        .await
        .map_err(LogError::Stream)?;
    Ok(Record::Payload { stream, bytes })
}

/// Splits two byte streams into CRI lines, and counts which bytes are in lines already.
#[derive(Debug)]
struct Lines {
    received: u64,
    acknowledged: u64,
    stdout: Pending,
    stderr: Pending,
}

/// An unfinished line, and the position of its first byte among the payload bytes of both streams.
#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    since: u64,
}

impl Lines {
    fn new(offset: u64) -> Self {
        Self {
            received: offset,
            acknowledged: offset,
            stdout: Pending::default(),
            stderr: Pending::default(),
        }
    }

    /// Adds bytes of one stream. Appends to `out` the lines that are complete, and parts of lines that are too long.
    fn push(&mut self, stream: Stream, mut payload: &[u8], time: &str, out: &mut Vec<u8>) {
        let pending = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        while !payload.is_empty() {
            if pending.bytes.is_empty() {
                pending.since = self.received;
            }
            let room = LINE_BYTES - pending.bytes.len();
            let part = payload.get(..room.min(payload.len())).unwrap_or(payload);
            let end = part.iter().position(|byte| *byte == b'\n');
            let (text, taken) = match end {
                Some(end) => (part.get(..end).unwrap_or(part), end + 1),
                None => (part, part.len()),
            };
            pending.bytes.extend_from_slice(text);
            self.received = self.received.saturating_add(taken as u64);
            payload = payload.get(taken..).unwrap_or_default();
            if end.is_some() {
                pending.write(stream, "F", time, out);
            } else if pending.bytes.len() >= LINE_BYTES {
                pending.write(stream, "P", time, out);
            }
        }
    }

    /// Writes unfinished lines as partial lines.
    fn flush(&mut self, time: &str, out: &mut Vec<u8>) {
        for (stream, pending) in [
            (Stream::Stdout, &mut self.stdout),
            (Stream::Stderr, &mut self.stderr),
        ] {
            if !pending.bytes.is_empty() {
                pending.write(stream, "P", time, out);
            }
        }
    }

    fn is_pending(&self) -> bool {
        !self.stdout.bytes.is_empty() || !self.stderr.bytes.is_empty()
    }

    /// How many payload bytes, counted from the start, are in lines.
    fn stored(&self) -> u64 {
        [&self.stdout, &self.stderr]
            .iter()
            .filter(|pending| !pending.bytes.is_empty())
            .map(|pending| pending.since)
            .fold(self.received, u64::min)
    }

    /// The number to acknowledge to the agent, if it has changed.
    fn acknowledge(&mut self) -> Option<u64> {
        let stored = self.stored();
        let news = stored > self.acknowledged;
        self.acknowledged = stored;
        news.then_some(stored)
    }
}

impl Pending {
    fn write(&mut self, stream: Stream, tag: &str, time: &str, out: &mut Vec<u8>) {
        let name = match stream {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        };
        for part in [time, " ", name, " ", tag, " "] {
            out.extend_from_slice(part.as_bytes());
        }
        out.append(&mut self.bytes);
        out.push(b'\n');
    }
}

/// A time in RFC 3339 format with nanoseconds, in UTC.
pub fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    let mut text = String::with_capacity(32);
    let _ = write!(
        text,
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_nanos()
    );
    text
}

/// Converts days since 1970-01-01 to year, month and day. It calculates in eras of 400 years whose years begin in
/// March, so that a leap day is the last day of a year.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
#[path = "logs_tests.rs"]
mod tests;
