// SPDX-License-Identifier: Apache-2.0
//! System call filters: the default profile, profiles of users, and the compiler for both.
//!
//! The agent compiles each filter once, when the container is created. The container's process only loads it.

mod bpf;
mod default;
#[cfg(test)]
mod machine;
mod profile;
mod syscalls;

use std::collections::BTreeMap;

use bulkhead_proto::agent::Seccomp;
use bulkhead_proto::agent::seccomp::Kind;

#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("parse the seccomp profile")]
    Parse(#[source] serde_json::Error),
    #[error("seccomp profile: {0} is not supported")]
    Unsupported(String),
    #[error("seccomp profile: the filter has {0} instructions, at most 4096 are possible")]
    TooLong(usize),
    #[error("seccomp profile is larger than 1 MiB")]
    TooLarge,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Allow,
    Errno(u16),
    KillProcess,
    KillThread,
    Trap,
    Trace(u16),
    Log,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    /// The argument, masked with this value, equals the condition's value.
    MaskedEqual(u64),
}

/// A test of one argument of a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Condition {
    pub argument: u8,
    pub comparison: Comparison,
    pub value: u64,
}

/// The action when all conditions hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub conditions: Vec<Condition>,
    pub action: Action,
}

/// The rules for each system call. The first one whose conditions hold decides. A rule without conditions comes last,
/// and otherwise the default action applies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    pub default: Action,
    pub rules: BTreeMap<u32, Vec<Rule>>,
}

impl Filter {
    pub fn new(default: Action) -> Self {
        Self {
            default,
            rules: BTreeMap::new(),
        }
    }

    /// Adds a rule for the call `name`. Skips a name that this architecture does not have.
    pub fn add(&mut self, name: &str, rule: Rule) {
        if let Some(number) = syscalls::number(name) {
            self.rules.entry(number).or_default().push(rule);
        }
    }
}

/// A compiled filter, one number per instruction. Empty if there is no filter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Program {
    pub instructions: Vec<u64>,
    pub flags: u32,
}

/// Compiles the filter that a container requests.
pub fn program(wanted: Option<&Seccomp>, capabilities: &[String]) -> Result<Program, SeccompError> {
    let kind = wanted.map_or(Kind::RuntimeDefault, Seccomp::kind);
    let (filter, flags) = match kind {
        Kind::Unconfined => return Ok(Program::default()),
        Kind::RuntimeDefault => (default::filter(capabilities), 0),
        Kind::Profile => {
            let release = rustix::system::uname();
            let release = release.release().to_string_lossy();
            let place = profile::Place {
                capabilities,
                kernel: profile::version(&release).unwrap_or_default(),
            };
            profile::parse(wanted.map_or(&[], |w| &w.profile_json), &place)?
        }
    };
    Ok(Program {
        instructions: bpf::compile(&filter)?,
        flags,
    })
}

/// Converts the instructions of a [`Program`] to the format of the system call.
pub fn decode(instructions: &[u64]) -> Vec<libc::sock_filter> {
    instructions
        .iter()
        .map(|word| {
            let [c0, c1, jt, jf, k0, k1, k2, k3] = word.to_le_bytes();
            libc::sock_filter {
                code: u16::from_le_bytes([c0, c1]),
                jt,
                jf,
                k: u32::from_le_bytes([k0, k1, k2, k3]),
            }
        })
        .collect()
}
