// SPDX-License-Identifier: Apache-2.0
//! The serial port: a 16550 without input, whose output goes to a bounded log. Runs on vCPU threads.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
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

/// The registers of the port. It has no input, so nothing else is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialRegisters {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
}

impl From<&SerialState> for SerialRegisters {
    fn from(state: &SerialState) -> Self {
        Self {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
        }
    }
}

impl From<&SerialRegisters> for SerialState {
    fn from(registers: &SerialRegisters) -> Self {
        let [baud_divisor_low, baud_divisor_high] = registers.divisor;
        Self {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            in_buffer: Vec::new(),
        }
    }
}

impl Default for SerialRegisters {
    /// As after a reset.
    fn default() -> Self {
        Self::from(&SerialState::default())
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

    /// Its registers between two accesses.
    pub fn save(&self) -> SerialRegisters {
        SerialRegisters::from(&self.0.state())
    }

    /// Sets the registers of a port that has not been used, and interrupts the guest, which may have waited for that.
    pub fn restore(&mut self, registers: &SerialRegisters) -> io::Result<()> {
        let line = self.0.interrupt_evt().0.try_clone()?;
        let log = ConsoleLog::new(self.0.writer().out.try_clone()?, LOG_BYTES);
        let state = SerialState::from(registers);
        let serial = Serial::from_state(&state, SerialLine(line), NoEvents, log);
        self.0 = serial.map_err(|e| io::Error::other(e.to_string()))?;
        self.0.interrupt_evt().trigger()
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
    fn a_port_goes_on_with_the_registers_of_another() {
        let port = || {
            let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            SerialPort::new(line, tempfile::tempfile().unwrap())
        };
        let (mut first, mut second) = (port(), port());
        assert_eq!(first.save(), SerialRegisters::default());
        // Divisor, line control, interrupts, modem control, scratch.
        for (register, value) in [
            (3, 0x83),
            (0, 1),
            (1, 2),
            (3, 0x1b),
            (1, 0xf),
            (4, 0xb),
            (7, 0x5a),
        ] {
            first.write(register, value);
        }
        second.restore(&first.save()).unwrap();
        assert_eq!(second.save(), first.save());
        for register in 1..8 {
            assert_eq!(second.read(register), first.read(register), "{register}");
        }
        assert!(
            second.0.interrupt_evt().0.read().is_ok(),
            "the guest may wait for it"
        );
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
