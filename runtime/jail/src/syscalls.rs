// SPDX-License-Identifier: Apache-2.0
//! Lists of the system calls that a thread may make, by seccomp. Any other call ends the process, with a line in its
//! log, and in its exit report if it has one, that names the call.
//!
//! A list is data, so that tests can compare it with what threads really call.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use syscalls::x86_64::Sysno;

use crate::sys;

/// The exit status of a process that made a call which it may not make.
pub const FORBIDDEN_CALL: u8 = 159;
/// Space for the sentence that says so.
const TEXT_BYTES: usize = 256;

/// One entry of a list: a system call, and what its argument must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    pub call: Sysno,
    pub when: When,
    /// Why a run of all tests may not use it. Any other rule that such a run does not use is one too many.
    pub seldom: Option<&'static str>,
}

/// A condition for one argument; the first is number 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Always,
    /// The argument's lower 32 bits are one of these.
    OneOf(u8, &'static [u32]),
    /// None of these bits is set.
    Without(u8, u64),
}

impl Rule {
    /// Allows a call with all arguments.
    #[must_use]
    pub const fn any(call: Sysno) -> Self {
        Self::with(call, When::Always)
    }

    /// Allows a call if an argument is one of these.
    #[must_use]
    pub const fn one_of(call: Sysno, argument: u8, values: &'static [u32]) -> Self {
        Self::with(call, When::OneOf(argument, values))
    }

    /// Allows a call if an argument has none of these bits.
    #[must_use]
    pub const fn without(call: Sysno, argument: u8, bits: u64) -> Self {
        Self::with(call, When::Without(argument, bits))
    }

    const fn with(call: Sysno, when: When) -> Self {
        let seldom = None;
        Self { call, when, seldom }
    }

    /// The same rule with the reason why a run of all tests may not use it.
    #[must_use]
    pub const fn seldom(self, why: &'static str) -> Self {
        let seldom = Some(why);
        Self { seldom, ..self }
    }
}

/// What one kind of thread may call, apart from `exit_group`. A call stands in it once, or with
/// several lists of values.
#[derive(Clone, Copy, Debug)]
pub struct List {
    /// The kind of thread. Threads have this name, with a number if there are several.
    pub name: &'static str,
    /// In groups, of which several lists may have the same one.
    pub rules: &'static [&'static [Rule]],
}

impl List {
    /// The rules of all groups.
    pub fn all(&self) -> impl Iterator<Item = &'static Rule> {
        self.rules.iter().copied().flatten()
    }
}

/// Why a list could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum SyscallsError {
    #[error("build the filter of system calls for {list}")]
    Build {
        list: &'static str,
        source: seccompiler::BackendError,
    },
    #[error("filter system calls of {list}")]
    Apply {
        list: &'static str,
        source: seccompiler::Error,
    },
    #[error("name a thread {list}")]
    Name {
        list: &'static str,
        source: io::Error,
    },
    #[error("prepare for forbidden system calls")]
    Prepare(#[source] io::Error),
}

/// Where a forbidden call is reported, apart from standard error: a file, and what stands before and after the sentence.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    pub fd: i32,
    pub before: &'static str,
    pub after: &'static str,
}

static REPORT: OnceLock<Report> = OnceLock::new();
/// The list of the main thread, which threads without one of their own have.
static OF_MAIN: OnceLock<&'static str> = OnceLock::new();

thread_local! {
    /// The list of this thread. `const`, because a signal handler reads it.
    static LIST: Cell<&'static str> = const { Cell::new("") };
}

/// Prepares the process for calls that are forbidden. Call it once, before the first list is applied.
pub fn prepare(report: Option<Report>) -> Result<(), SyscallsError> {
    if let Some(report) = report {
        // A second call would change nothing.
        let _ = REPORT.set(report);
    }
    sys::on_refused_call(tell_and_end).map_err(SyscallsError::Prepare)
}

/// Applies a list to the calling thread, and to those that it starts. `number` is added to the thread's name.
pub fn apply(list: &List, number: Option<u8>) -> Result<(), SyscallsError> {
    let programs = programs(list)?;
    name(list, number)?;
    for program in programs {
        let applied = seccompiler::apply_filter(&program);
        applied.map_err(|source| SyscallsError::Apply {
            list: list.name,
            source,
        })?;
    }
    Ok(())
}

/// Applies a list to all threads of the process.
pub fn apply_to_all_threads(list: &List) -> Result<(), SyscallsError> {
    let programs = programs(list)?;
    name(list, None)?;
    for program in programs {
        let applied = seccompiler::apply_filter_all_threads(&program);
        applied.map_err(|source| SyscallsError::Apply {
            list: list.name,
            source,
        })?;
    }
    Ok(())
}

/// Gives the calling thread the name of its list. From then on it makes only calls of the list, and those that apply it.
pub fn name(list: &List, number: Option<u8>) -> Result<(), SyscallsError> {
    LIST.set(list.name);
    if rustix::thread::gettid() == rustix::process::getpid() {
        // A second list of the main thread can only be shorter.
        let _ = OF_MAIN.set(list.name);
    }
    let name = number.map_or_else(
        || list.name.to_owned(),
        |number| format!("{}{number}", list.name),
    );
    let name = std::ffi::CString::new(name).map_err(io::Error::from);
    let named = name.and_then(|name| Ok(rustix::thread::set_name(&name)?));
    named.map_err(|source| SyscallsError::Name {
        list: list.name,
        source,
    })
}

/// The filters of a list. The C library must take `clone3` for a call that the kernel lacks, because a filter cannot see
/// its arguments; then it makes `clone`.
fn programs(list: &List) -> Result<[BpfProgram; 2], SyscallsError> {
    let build = |rules, mismatch, on_match| {
        let filter = SeccompFilter::new(rules, mismatch, on_match, TargetArch::x86_64);
        filter.and_then(BpfProgram::try_from)
    };
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let clone3 = BTreeMap::from([(number(Sysno::clone3), Vec::new())]);
    let both = || {
        let mut allowed: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for rule in list.all() {
            let of_call = allowed.entry(number(rule.call)).or_default();
            of_call.extend(conditions(rule.when)?);
        }
        allowed.insert(number(Sysno::clone3), Vec::new());
        // How the process ends after a forbidden call.
        allowed.insert(number(Sysno::exit_group), Vec::new());
        Ok([
            build(clone3, SeccompAction::Allow, missing)?,
            build(allowed, SeccompAction::Trap, SeccompAction::Allow)?,
        ])
    };
    both().map_err(|source| SyscallsError::Build {
        list: list.name,
        source,
    })
}

fn number(call: Sysno) -> i64 {
    i64::from(call.id())
}

/// The rules of a call, of which one must hold. None: the call is allowed.
fn conditions(when: When) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let rule = |argument, length, operator, value| {
        let condition = SeccompCondition::new(argument, length, operator, value)?;
        SeccompRule::new(vec![condition])
    };
    match when {
        When::Always => Ok(Vec::new()),
        When::OneOf(argument, values) => {
            let length = || SeccompCmpArgLen::Dword;
            let rules = values.iter();
            rules
                .map(|&value| rule(argument, length(), SeccompCmpOp::Eq, value.into()))
                .collect()
        }
        When::Without(argument, bits) => {
            let none = SeccompCmpOp::MaskedEq(bits);
            Ok(vec![rule(argument, SeccompCmpArgLen::Qword, none, 0)?])
        }
    }
}

/// Runs in the thread that made a forbidden call, as a signal handler. Nothing here allocates or locks.
extern "C" fn tell_and_end(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    let number = sys::refused_call(info);
    let name = usize::try_from(number).ok().and_then(Sysno::new);
    let mut text = Text::default();
    text.add("a thread of the kind ");
    match LIST.get() {
        "" => text.add(OF_MAIN.get().unwrap_or(&"unknown")),
        own => text.add(own),
    }
    text.add(" made the system call ");
    text.add_number(number.unsigned_abs());
    text.add(" (");
    text.add(name.map_or("unknown", |name| name.name()));
    text.add("), which it may not make");
    sys::write_raw(libc::STDERR_FILENO, b"bulkhead-vmm: ");
    sys::write_raw(libc::STDERR_FILENO, text.bytes());
    sys::write_raw(libc::STDERR_FILENO, b"\n");
    if let Some(report) = REPORT.get() {
        for part in [
            report.before.as_bytes(),
            text.bytes(),
            report.after.as_bytes(),
        ] {
            sys::write_raw(report.fd, part);
        }
    }
    sys::exit_now(FORBIDDEN_CALL.into());
}

/// A text of limited length without a heap.
struct Text {
    bytes: [u8; TEXT_BYTES],
    length: usize,
}

impl Default for Text {
    fn default() -> Self {
        let bytes = [0; TEXT_BYTES];
        Self { bytes, length: 0 }
    }
}

impl Text {
    fn add(&mut self, text: &str) {
        for (place, byte) in self.bytes.iter_mut().skip(self.length).zip(text.bytes()) {
            *place = byte;
            self.length = self.length.saturating_add(1);
        }
    }

    fn add_number(&mut self, number: u32) {
        let mut power = 1_000_000_000;
        while power > 1 && number < power {
            power /= 10;
        }
        while power > 0 {
            let digit = u8::try_from(number / power % 10).unwrap_or(0);
            let digit = [b'0'.saturating_add(digit)];
            self.add(std::str::from_utf8(&digit).unwrap_or("?"));
            power /= 10;
        }
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    const LIST: List = List {
        name: "tried",
        rules: &[
            &[
                Rule::any(Sysno::write),
                Rule::any(Sysno::futex),
                Rule::one_of(Sysno::socket, 0, &[1]),
                Rule::any(Sysno::close),
            ],
            &[
                // A debug build looks whether what it closes is open.
                Rule::any(Sysno::fcntl),
                Rule::without(Sysno::mmap, 2, 4),
            ],
        ],
    };

    #[test]
    fn numbers_and_texts_are_written_as_they_are_and_cut_at_the_end() {
        for number in [0, 7, 10, 59, 435, u32::MAX] {
            let mut text = Text::default();
            text.add_number(number);
            assert_eq!(text.bytes(), number.to_string().as_bytes());
        }
        let mut text = Text::default();
        text.add(&"x".repeat(1000));
        assert_eq!(text.bytes().len(), TEXT_BYTES);
    }

    /// What a process says and how it ends that applies the list and then does what `attempt` names. The process is this
    /// test program with one test, because a forbidden call ends all of a process.
    fn after(attempt: &str) -> (Option<i32>, String) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "--nocapture", "syscalls::tests::attempts"]);
        command.env("ATTEMPT", attempt).stdout(Stdio::null());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    }

    /// Not a test of its own: [`after`] runs it with an environment.
    #[test]
    fn attempts() {
        let Ok(attempt) = std::env::var("ATTEMPT") else {
            return;
        };
        rustix::thread::set_no_new_privs(true).unwrap();
        prepare(Some(Report {
            fd: 2,
            before: "<",
            after: ">",
        }))
        .unwrap();
        apply(&super::tests::LIST, None).unwrap();
        let family = |family| rustix::net::socket(family, rustix::net::SocketType::STREAM, None);
        match attempt.as_str() {
            "nothing" => {}
            "unix" => drop(family(rustix::net::AddressFamily::UNIX).unwrap()),
            "inet" => drop(family(rustix::net::AddressFamily::INET)),
            "uname" => drop(rustix::system::uname()),
            other => panic!("{other}"),
        }
        sys::exit_now(0);
    }

    #[test]
    fn what_the_list_does_not_have_ends_the_process_with_its_name() {
        assert_eq!(after("nothing"), (Some(0), String::new()));
        assert_eq!(after("unix"), (Some(0), String::new()));
        for (attempt, call) in [("inet", "41 (socket)"), ("uname", "63 (uname)")] {
            let (code, said) = after(attempt);
            let sentence = format!(
                "a thread of the kind tried made the system call {call}, which it may not make"
            );
            assert_eq!(code, Some(FORBIDDEN_CALL.into()), "{said}");
            assert_eq!(said, format!("bulkhead-vmm: {sentence}\n<{sentence}>"));
        }
    }
}
