// SPDX-License-Identifier: Apache-2.0
//! The serial port: a 16550 without input, whose output goes to a bounded log. Runs on vCPU threads.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// How much of the guest's output is kept. Later output is dropped.
pub const LOG_BYTES: usize = 1 << 20;
/// How many of the last bytes are remembered, to find the kernel's panic message in them.
const TAIL_BYTES: usize = 4096;
/// Output is written line by line. A line longer than this is written in pieces.
const LINE_BYTES: usize = 256;
const PANIC_MARK: &str = "Kernel panic - not syncing";

/// The log behind the serial port.
#[derive(Debug)]
pub struct ConsoleLog<W> {
    out: W,
    /// How many more bytes the log may take.
    room: usize,
    line: Vec<u8>,
    tail: VecDeque<u8>,
}

impl<W: Write> ConsoleLog<W> {
    #[must_use]
    pub fn new(out: W, limit: usize) -> Self {
        Self {
            out,
            room: limit,
            line: Vec::with_capacity(LINE_BYTES),
            tail: VecDeque::new(),
        }
    }

    fn write_line(&mut self) {
        let keep = self.line.len().min(self.room);
        // A full disk must not stop the guest, so bytes that cannot be written are dropped.
        if let Some(bytes) = self.line.get(..keep) {
            let _ = self.out.write_all(bytes);
        }
        self.room = self.room.saturating_sub(keep);
        for &byte in &self.line {
            if self.tail.len() >= TAIL_BYTES {
                self.tail.pop_front();
            }
            self.tail.push_back(byte);
        }
        self.line.clear();
    }

    /// Writes the unfinished line, too.
    pub fn finish(&mut self) {
        self.write_line();
        let _ = self.out.flush();
    }

    /// The line in which the kernel reported a panic, if it did.
    #[must_use]
    pub fn panic_line(&self) -> Option<String> {
        let bytes: Vec<u8> = self.tail.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let line = text.lines().find(|line| line.contains(PANIC_MARK))?;
        Some(bulkhead_text::printable(line))
    }
}

impl<W: Write> Write for ConsoleLog<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.line.push(byte);
            if byte == b'\n' || self.line.len() >= LINE_BYTES {
                self.write_line();
            }
        }
        Ok(bytes.len())
    }

    /// Does nothing: the serial port flushes after every byte, but the log is written line by line.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The interrupt of the serial port.
#[derive(Debug)]
pub struct SerialLine(pub EventFd);

impl Trigger for SerialLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The port and its log.
#[allow(missing_debug_implementations)]
pub struct SerialPort(Serial<SerialLine, NoEvents, ConsoleLog<File>>);

impl SerialPort {
    #[must_use]
    pub fn new(line: EventFd, log: File) -> Self {
        let log = ConsoleLog::new(log, LOG_BYTES);
        Self(Serial::new(SerialLine(line), log))
    }

    /// Reads register `offset`, which is less than 8, for the guest.
    pub fn read(&mut self, offset: u8) -> u8 {
        self.0.read(offset)
    }

    pub fn write(&mut self, offset: u8, value: u8) {
        // Fails only if the interrupt cannot be raised. The next byte raises it again.
        let _ = self.0.write(offset, value);
    }

    /// Writes the rest to the log. Returns the panic line, if there is one.
    pub fn finish(&mut self) -> Option<String> {
        let log = self.0.writer_mut();
        log.finish();
        log.panic_line()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_bounded_and_the_tail_is_not_lost() {
        let mut log = ConsoleLog::new(Vec::new(), 1000);
        for _ in 0..1000 {
            log.write_all(b"0123456789\n").unwrap();
        }
        log.write_all(b"[ 1.0] Kernel panic - not syncing: no \x1b[1minit\nend")
            .unwrap();
        log.finish();
        assert_eq!(log.out.len(), 1000);
        assert!(log.tail.len() <= TAIL_BYTES);
        let line = log.panic_line().unwrap();
        assert_eq!(line, "[ 1.0] Kernel panic - not syncing: no [1minit");
    }

    #[test]
    fn a_line_without_end_is_written_in_pieces() {
        let mut log = ConsoleLog::new(Vec::new(), 1 << 20);
        log.write_all(&[b'x'; 300]).unwrap();
        assert_eq!(log.out.len(), LINE_BYTES);
        log.finish();
        assert_eq!(log.out.len(), 300);
        assert_eq!(log.panic_line(), None);
    }
}
