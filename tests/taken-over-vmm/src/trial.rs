// SPDX-License-Identifier: Apache-2.0
//! Runs one attempt in a child of its own, with a list of system calls or without, and sees how it ends.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use ::syscalls::x86_64::Sysno;
use bulkhead_jail::namespaces::{self, Side};
use bulkhead_jail::syscalls::{self, List};
use bulkhead_vmm::report::ExitReport;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use crate::attempt::{Answer, Attempt};
use crate::facts::Facts;
use crate::machine::Machine;
use crate::sys;
use crate::world::{CALL_OF_32_BITS, Held, World};

/// How long an attempt may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a child takes from its last words to its end.
const LAST_STEPS: Duration = Duration::from_secs(2);
/// All processes, for kill(2) and wait4(2).
const EVERYBODY: i32 = -1;
/// First byte of a line from the child: its answer, or the name of a call that its list does not have. The report of a
/// forbidden call begins with a brace.
const ANSWER: u8 = b'A';
const REFUSAL: u8 = b'R';
const REPORT: u8 = b'{';
/// What the report says before the name of the call.
const BEFORE_NAME: &str = " (";

/// How an attempt ended.
#[derive(Debug, Serialize)]
pub struct Outcome {
    pub attempt: &'static str,
    /// The kind of thread whose list it had.
    pub list: Option<&'static str>,
    /// What is right without a list.
    pub may: Vec<String>,
    pub harmless: bool,
    /// Its answer, if it came to one.
    pub answer: Option<String>,
    /// The call that the list does not have, as this program reads the list.
    pub refusal: Option<String>,
    /// The call for which the filter ended it, as the report says.
    pub ended_by: Option<String>,
    pub exit_code: Option<i32>,
}

/// Tries one attempt. Call it in the first process of a PID namespace: all its descendants are killed afterwards.
pub fn of(
    attempt: &'static Attempt,
    held: Held,
    facts: &Facts,
    list: Option<&'static List>,
) -> io::Result<Outcome> {
    let (ours, theirs) = rustix::pipe::pipe()?;
    let child = match namespaces::fork().map_err(io::Error::other)? {
        Side::Parent { child } => child,
        Side::Child => {
            drop(ours);
            make(attempt, held, facts.clone(), list, theirs.as_raw_fd())
        }
    };
    drop(theirs);
    let said = read(&ours)?;
    let status = end(child);
    let line = |kind| {
        let lines = said.split(|&byte| byte == b'\n');
        let mut of_kind = lines.filter(move |line| line.first() == Some(&kind));
        let text = of_kind.next().map(String::from_utf8_lossy);
        text.map(std::borrow::Cow::into_owned)
    };
    let report = line(REPORT).and_then(|line| ExitReport::read(line.as_bytes()).ok().flatten());
    let answer = line(ANSWER).map(|line| line[1..].to_owned());
    let signal = status.filter(|&status| libc::WIFSIGNALED(status));
    let signal = signal.map(|status| libc::WTERMSIG(status));
    let ended_by = match report {
        Some(report) => name_of_call(&report.detail),
        // No handler runs for it.
        None => (signal == Some(libc::SIGSYS)).then(|| CALL_OF_32_BITS.to_owned()),
    };
    Ok(Outcome {
        attempt: attempt.name,
        list: list.map(|list| list.name),
        may: attempt.may.iter().map(ToString::to_string).collect(),
        harmless: !attempt.harmless.is_empty(),
        ended_by: ended_by.filter(|_| answer.is_none()),
        answer: answer.or_else(|| {
            // That one comes from here, because the attempt hung.
            let signal = signal.filter(|&signal| signal != libc::SIGKILL)?;
            Some(Answer::Signal(signal).to_string())
        }),
        refusal: line(REFUSAL).map(|line| line[1..].to_owned()),
        exit_code: status
            .filter(|&status| libc::WIFEXITED(status))
            .map(|status| libc::WEXITSTATUS(status)),
    })
}

fn name_of_call(detail: &str) -> Option<String> {
    let (_, rest) = detail.split_once(BEFORE_NAME)?;
    Some(rest.split_once(')')?.0.to_owned())
}

/// Makes the attempt and ends. What it says goes to the descriptor of the exit report, where also the handler of a
/// forbidden call writes.
fn make(
    attempt: &Attempt,
    mut held: Held,
    facts: Facts,
    list: Option<&'static List>,
    pipe: i32,
) -> ! {
    let report = Held::inherited().report;
    let moved = sys::call(number(Sysno::dup2), [word(pipe), word(report), 0, 0, 0, 0]);
    let machine = attempt.has_vm.then(Machine::new).and_then(Result::ok);
    if let Some(machine) = &machine {
        held.vm = machine.vm.as_raw_fd();
        held.vcpu = machine.vcpu.as_raw_fd();
    }
    let world = World::real(held, facts, list, |call| say(REFUSAL, call));
    let confined = moved.map_err(|e| e.to_string()).and_then(|_| match list {
        Some(list) => syscalls::apply(list, None).map_err(|e| bulkhead_text::chain(&e)),
        None => Ok(()),
    });
    match confined {
        Ok(()) => say(ANSWER, &Answer::from((attempt.run)(&world)).to_string()),
        Err(e) => say(ANSWER, &format!("not confined: {e}")),
    }
    loop {
        // With a list that does not have it, the handler ends the process.
        let _ = sys::call(number(Sysno::exit_group), [0; 6]);
    }
}

fn number(call: Sysno) -> usize {
    usize::try_from(call.id()).unwrap_or(usize::MAX)
}

fn word(number: i32) -> usize {
    (number as isize).cast_unsigned()
}

fn say(kind: u8, text: &str) {
    let line = [&[kind], text.as_bytes(), b"\n"].concat();
    let report = word(Held::inherited().report);
    let write = [report, line.as_ptr() as usize, line.len(), 0, 0, 0];
    let _ = sys::call(number(Sysno::write), write);
}

/// Reads what the child says, up to its answer or the report.
fn read(from: &impl std::os::fd::AsFd) -> io::Result<Vec<u8>> {
    let until = Instant::now() + PATIENCE;
    let mut said = Vec::new();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(from, PollFlags::IN)];
        if poll(&mut fds, Some(&left))? == 0 {
            return Ok(said);
        }
        let mut bytes = [0; 4096];
        let count = rustix::io::read(from, &mut bytes)?;
        said.extend_from_slice(bytes.get(..count).unwrap_or_default());
        let mut lines = said.split_inclusive(|&byte| byte == b'\n');
        let is_last =
            |line: &[u8]| line.ends_with(b"\n") && matches!(line.first(), Some(&ANSWER | &REPORT));
        if count == 0 || lines.any(is_last) {
            return Ok(said);
        }
    }
}

/// Waits for the child, then kills what still runs. Returns the child's wait status, if it ended.
fn end(child: i32) -> Option<i32> {
    let until = Instant::now() + LAST_STEPS;
    let mut status = None;
    while status.is_none() && Instant::now() < until {
        status = wait(child, libc::WNOHANG);
        if status.is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    // Only here: elsewhere this would end the host's processes.
    if std::process::id() == 1 {
        let _ = sys::call(
            number(Sysno::kill),
            [word(EVERYBODY), word(libc::SIGKILL), 0, 0, 0, 0],
        );
        while wait(EVERYBODY, 0).is_some() {}
    }
    status
}

fn wait(whom: i32, options: i32) -> Option<i32> {
    let mut status = 0i32;
    let to = (&raw mut status) as usize;
    let arguments = [word(whom), to, word(options), 0, 0, 0];
    let reaped = sys::call(number(Sysno::wait4), arguments);
    reaped.ok().filter(|&pid| pid != 0).map(|_| status)
}
