// SPDX-License-Identifier: Apache-2.0
//! A timer that fires once a second while it is switched on.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

/// The timer.
#[derive(Debug)]
pub struct Alarm {
    timer: File,
    runs: bool,
}

impl Alarm {
    /// The timer is off at first.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self {
            timer: File::from(timer),
            runs: false,
        })
    }

    /// Readable when a second has passed.
    pub fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Consumes the timer's event.
    pub fn heard(&mut self) {
        let _ = self.timer.read(&mut [0; 8]);
    }

    pub fn run(&mut self, run: bool) {
        if run == self.runs {
            return;
        }
        let every = Timespec {
            tv_sec: run.into(),
            tv_nsec: 0,
        };
        let spec = Itimerspec {
            it_interval: every,
            it_value: every,
        };
        let flags = TimerfdTimerFlags::empty();
        if rustix::time::timerfd_settime(&self.timer, flags, &spec).is_ok() {
            self.runs = run;
        }
    }
}
