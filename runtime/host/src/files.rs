// SPDX-License-Identifier: Apache-2.0
//! The files of one VM: sockets, logs, exit report. Also tells from them why a VM has ended.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bulkhead_text::printable;
use bulkhead_vmm::report::ExitReport;

/// How many lines of a guest's console an error shows.
const CONSOLE_LINES: usize = 20;
/// Only the end of the console's log is read for them.
const CONSOLE_BYTES: u64 = 16 << 10;

/// The files of one VM, all in one directory.
#[derive(Clone, Debug)]
pub struct Files(PathBuf);

impl Files {
    pub fn new(directory: PathBuf) -> Self {
        Self(directory)
    }

    pub fn directory(&self) -> &Path {
        &self.0
    }

    /// The name of the directory: the first digits of the pod's id.
    pub fn name(&self) -> String {
        let name = self.0.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    // The names are short, because the path of a unix socket has at most 107 bytes.
    pub fn vsock(&self) -> PathBuf {
        self.0.join("vsock")
    }

    /// The socket at which the guest's connections to port `port` of the host arrive.
    pub fn vsock_port(&self, port: u32) -> PathBuf {
        self.0.join(format!("vsock_{port}"))
    }

    pub fn control(&self) -> PathBuf {
        self.0.join("control")
    }

    pub fn console(&self) -> PathBuf {
        self.0.join("console.log")
    }

    pub fn exit_report(&self) -> PathBuf {
        self.0.join("exit.json")
    }

    /// The VMM's output.
    pub fn vmm_log(&self) -> PathBuf {
        self.0.join("vmm.log")
    }

    /// The file server's output.
    pub fn share_log(&self) -> PathBuf {
        self.0.join("share.log")
    }

    fn report(&self) -> io::Result<Option<ExitReport>> {
        match open_regular(&self.exit_report(), OpenOptions::new().read(true)) {
            Ok(file) => ExitReport::read(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Why the VM ended, in one sentence.
    pub fn obituary(&self) -> String {
        match self.report() {
            Ok(Some(report)) => {
                let reason = format!("{:?}", report.reason);
                if report.detail.is_empty() {
                    format!("the VM ended: {reason}")
                } else {
                    format!("the VM ended: {reason}: {}", printable(&report.detail))
                }
            }
            Ok(None) => match last_lines(&self.vmm_log(), 3) {
                said if said.is_empty() => "the VMM was killed: it left no exit report".to_owned(),
                said => format!("the VMM ended without a report and said: {said}"),
            },
            Err(e) => format!("the VM ended, its report cannot be read: {e}"),
        }
    }

    /// The last lines of the guest's console.
    pub fn console_tail(&self) -> String {
        last_lines(&self.console(), CONSOLE_LINES)
    }
}

/// Opens a file in a VM's directory. The VMM may put there what it likes if its guest has taken it over, so a link is
/// not followed, and a pipe or device is neither waited for nor used.
pub fn open_regular(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = options.custom_flags(flags).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is not a regular file")),
    }
}

/// The last `count` lines of a file that are not blank; empty if it cannot be read.
pub fn last_lines(path: &Path, count: usize) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let mut bytes = Vec::new();
    if let Ok(mut file) = open_regular(path, OpenOptions::new().read(true)) {
        let length = file.metadata().map_or(0, |metadata| metadata.len());
        let start = length.saturating_sub(CONSOLE_BYTES);
        if file.seek(SeekFrom::Start(start)).is_ok() {
            // An error is ignored: what could be read is shown.
            let _ = file.take(CONSOLE_BYTES).read_to_end(&mut bytes);
        }
    }
    let text = printable(&String::from_utf8_lossy(&bytes));
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let first = lines.len().saturating_sub(count);
    lines.get(first..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_vmm_puts_in_place_of_a_file_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let files = Files::new(directory.path().to_owned());
        let target = directory.path().join("target");
        std::fs::write(&target, "secret").unwrap();
        std::os::unix::fs::symlink(&target, files.console()).unwrap();
        assert_eq!(files.console_tail(), "");
        for path in [files.exit_report(), files.vmm_log()] {
            let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
            rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0)
                .unwrap();
        }
        // Without a writer, opening a FIFO would wait for ever.
        assert!(files.obituary().contains("cannot be read"));
        let mut append = OpenOptions::new();
        append.append(true).create(true);
        open_regular(&files.console(), &mut append).unwrap_err();
        open_regular(&files.vmm_log(), &mut append).unwrap_err();
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "secret");
    }

    #[test]
    fn the_console_tail_is_the_last_lines_without_control_characters() {
        let directory = tempfile::tempdir().unwrap();
        let files = Files::new(directory.path().to_owned());
        assert_eq!(files.console_tail(), "");
        let text: String = (0..100)
            .map(|n| format!("line {n}\r\n\x1b[0m\r\n"))
            .collect();
        std::fs::write(files.console(), text).unwrap();
        let tail = files.console_tail();
        assert!(tail.ends_with("line 99\n[0m"), "{tail}");
        assert_eq!(tail.lines().count(), CONSOLE_LINES);
        assert!(!tail.contains('\x1b'));
    }

    #[test]
    fn a_vmm_without_a_report_was_killed() {
        let directory = tempfile::tempdir().unwrap();
        let files = Files::new(directory.path().to_owned());
        assert!(files.obituary().contains("killed"));
    }
}
