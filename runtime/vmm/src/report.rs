// SPDX-License-Identifier: Apache-2.0
//! The report of how a VM ended.
//!
//! The parent's wait status is not enough, because the daemon is not our parent. The VMM is started with an empty file
//! and writes it at the end, at once. So a reader sees either nothing (the VMM runs or was killed) or all of it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;

use bulkhead_jail::syscalls::Report;
use serde::{Deserialize, Serialize};

/// A longer detail is cut.
const DETAIL_BYTES: usize = 2048;
/// No more bytes of a report than this are read.
const REPORT_BYTES: u64 = 64 << 10;
/// The exit status after a forbidden system call.
const FORBIDDEN_CALL: u8 = bulkhead_jail::syscalls::FORBIDDEN_CALL;
/// The report of one is this, the sentence, and this.
const FORBIDDEN_CALL_REPORT: (&str, &str) =
    ("{\"reason\":\"forbidden_call\",\"detail\":\"", "\"}\n");

/// Why a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The control socket or a signal asked for it.
    StopRequested,
    /// The guest powered itself off.
    GuestShutdown,
    /// The guest reset itself, and its console shows no panic.
    GuestReset,
    /// The guest kernel panicked. The detail is the line that it printed.
    GuestPanic,
    TripleFault,
    /// All vCPUs have halted with interrupts off: the guest's kernel has halted, or has no way to power off.
    GuestHalted,
    /// The VM never ran. The detail says which step failed.
    SetupFailed,
    /// KVM or the VMM itself failed.
    VmmError,
    /// A thread made a system call that it may not make, see [`crate::syscalls`]: a fault of ours, or the guest has taken
    /// the VMM over. The detail names the call.
    ForbiddenCall,
}

impl ExitReason {
    /// The exit status of the process.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::StopRequested | Self::GuestShutdown | Self::GuestHalted => 0,
            Self::GuestReset | Self::GuestPanic | Self::TripleFault => 2,
            Self::SetupFailed | Self::VmmError => 1,
            Self::ForbiddenCall => FORBIDDEN_CALL,
        }
    }
}

/// How a guest ended, from the part of the VMM that noticed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub reason: ExitReason,
    pub detail: String,
}

impl Outcome {
    #[must_use]
    pub fn new(reason: ExitReason, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        Self { reason, detail }
    }
}

/// What is known about a VM that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReport {
    pub reason: ExitReason,
    /// A sentence for people; may be empty. Text of the guest in it is not trustworthy.
    pub detail: String,
    /// All VM exits if the host counts them, otherwise only those that reached the VMM.
    #[serde(default)]
    pub exits_total: u64,
    /// The VM exits that reached the VMM.
    #[serde(default)]
    pub exits_userspace: u64,
    #[serde(default)]
    pub uptime_us: u64,
}

impl ExitReport {
    /// A report with only a reason and a detail. A detail that is too long is cut.
    #[must_use]
    pub fn new(reason: ExitReason, detail: impl Into<String>) -> Self {
        let mut detail: String = detail.into();
        if detail.len() > DETAIL_BYTES {
            let end = (0..=DETAIL_BYTES)
                .rev()
                .find(|&i| detail.is_char_boundary(i));
            detail.truncate(end.unwrap_or(0));
        }
        Self {
            reason,
            detail,
            exits_total: 0,
            exits_userspace: 0,
            uptime_us: 0,
        }
    }

    /// Reads a report. `None` if its file is still empty.
    pub fn read(file: impl Read) -> io::Result<Option<Self>> {
        let mut text = String::new();
        file.take(REPORT_BYTES).read_to_string(&mut text)?;
        if text.is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_str(&text)?))
    }
}

/// The report file, still empty.
#[derive(Debug)]
pub struct ReportFile(File);

impl ReportFile {
    #[must_use]
    pub fn new(file: File) -> Self {
        Self(file)
    }

    /// How a forbidden system call is reported: as the JSON of an [`ExitReport`] around a sentence that needs no escapes.
    #[must_use]
    pub fn of_forbidden_call(&self) -> Report {
        let (before, after) = FORBIDDEN_CALL_REPORT;
        let fd = self.0.as_raw_fd();
        Report { fd, before, after }
    }

    /// Writes the report and ends the use of the file.
    pub fn write(mut self, report: &ExitReport) -> io::Result<()> {
        let mut text = serde_json::to_vec(report)?;
        text.push(b'\n');
        self.0.write_all(&text)?;
        self.0.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_no_report_yet() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report");
        let file = ReportFile::new(File::create(&path).unwrap());
        let read = || ExitReport::read(File::open(&path).unwrap()).unwrap();
        assert_eq!(read(), None);
        let report = ExitReport::new(ExitReason::GuestPanic, "é".repeat(2000));
        file.write(&report).unwrap();
        let read = read().unwrap();
        assert_eq!(read, report);
        assert_eq!(read.detail.len(), DETAIL_BYTES);
    }

    #[test]
    fn the_report_of_a_forbidden_call_can_be_read() {
        let (before, after) = FORBIDDEN_CALL_REPORT;
        let text = format!("{before}a thread made the system call 41 (socket){after}");
        let read = ExitReport::read(text.as_bytes()).unwrap().unwrap();
        assert_eq!(read.reason, ExitReason::ForbiddenCall);
        assert_eq!(read.detail, "a thread made the system call 41 (socket)");
    }
}
