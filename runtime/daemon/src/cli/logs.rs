// SPDX-License-Identifier: Apache-2.0
//! `bulkhead logs`: reads the log file that the daemon writes in CRI's format, and follows it across a rotation.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_proto::cri;

use super::CliError;
use super::client::Client;

/// How often to look for new lines in a log that is followed.
const LOOK: Duration = Duration::from_millis(100);

/// Prints a container's log. With `follow`, goes on until the container ends.
pub async fn print(client: &mut Client, container: &str, follow: bool) -> Result<(), CliError> {
    let status = client.container(container).await?;
    if status.log_path.is_empty() {
        return Err(CliError::NoLog(status.id));
    }
    let mut log = LogReader::new(status.log_path.into());
    if follow {
        log.follow(client, &status.id).await?;
        return Ok(());
    }
    log.copy()
}

/// Reads a log file and remembers how far it was read.
#[derive(Debug)]
pub struct LogReader {
    path: PathBuf,
    file: Option<File>,
    /// The last line, if its end was not written yet.
    rest: Vec<u8>,
}

impl LogReader {
    /// Makes a reader for the file at `path`, which need not exist yet.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            file: None,
            rest: Vec::new(),
        }
    }

    /// Prints the log until the container has ended. Returns the container's last status.
    pub async fn follow(
        &mut self,
        client: &mut Client,
        id: &str,
    ) -> Result<cri::ContainerStatus, CliError> {
        loop {
            // Ask for the state before reading: when a container is shown as ended, its log is complete.
            let status = client.container(id).await?;
            self.copy()?;
            if status.state() == cri::ContainerState::ContainerExited {
                return Ok(status);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Prints what is new.
    pub fn copy(&mut self) -> Result<(), CliError> {
        let bytes = self.read_new().map_err(|source| CliError::File {
            operation: "read container log",
            path: self.path.clone(),
            source,
        })?;
        self.rest.extend_from_slice(&bytes);
        let (mut stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
        let used = print_lines(&self.rest, &mut stdout, &mut stderr).map_err(CliError::Output)?;
        self.rest.drain(..used);
        stdout.flush().map_err(CliError::Output)
    }

    /// Reads the rest of the open file. If the log was rotated, also reads the new file.
    fn read_new(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if let Some(file) = &mut self.file {
            file.read_to_end(&mut bytes)?;
        }
        if let Some(mut file) = open_new(&self.path, self.file.as_ref())? {
            file.read_to_end(&mut bytes)?;
            self.file = Some(file);
        }
        Ok(bytes)
    }
}

/// Opens the file at `path` unless it is the one that is open.
fn open_new(path: &Path, open: Option<&File>) -> io::Result<Option<File>> {
    let file = match File::open(path) {
        Ok(file) => file,
        // It does not exist yet, or the log is being rotated.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let identity = |file: &File| {
        file.metadata()
            .map(|metadata| (metadata.dev(), metadata.ino()))
    };
    match open {
        Some(open) if identity(open)? == identity(&file)? => Ok(None),
        _ => Ok(Some(file)),
    }
}

/// Prints the text of complete lines to standard output or standard error, where the container wrote them. Returns how
/// many bytes were used.
fn print_lines(
    bytes: &[u8],
    stdout: &mut impl Write,
    stderr: &mut impl Write,
) -> io::Result<usize> {
    let mut used = 0;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let Some(line_without_end) = line.strip_suffix(b"\n") else {
            break;
        };
        used += line.len();
        // TIME STREAM TAG TEXT
        let mut fields = line_without_end.splitn(4, |byte| *byte == b' ');
        let (Some(_), Some(stream), Some(tag)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let text = fields.next().unwrap_or_default();
        let out: &mut dyn Write = if stream == b"stderr" { stderr } else { stdout };
        out.write_all(text)?;
        if tag != b"P" {
            out.write_all(b"\n")?;
        }
    }
    Ok(used)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_told_apart_and_parts_are_joined() {
        let log = b"T stdout P one \nT stderr F oops\nT stdout F line\nnonsense\nT stdout F \nT stdout F unfin";
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let used = print_lines(log, &mut out, &mut err).unwrap();
        assert_eq!(out, b"one line\n\n");
        assert_eq!(err, b"oops\n");
        assert_eq!(&log[used..], b"T stdout F unfin");
    }

    #[test]
    fn a_rotated_file_is_read_to_its_end_and_then_the_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut reader = LogReader::new(path.clone());
        assert_eq!(reader.read_new().unwrap(), b"");
        std::fs::write(&path, "first\n").unwrap();
        assert_eq!(reader.read_new().unwrap(), b"first\n");
        let rotated = directory.path().join("log.1");
        std::fs::rename(&path, &rotated).unwrap();
        let mut old = File::options().append(true).open(&rotated).unwrap();
        old.write_all(b"last\n").unwrap();
        std::fs::write(&path, "new\n").unwrap();
        assert_eq!(reader.read_new().unwrap(), b"last\nnew\n");
        assert_eq!(reader.read_new().unwrap(), b"");
    }
}
