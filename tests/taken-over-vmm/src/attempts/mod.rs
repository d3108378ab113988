// SPDX-License-Identifier: Apache-2.0
//! The table of all attempts. It grows with every idea.

mod calls;
mod descriptors;
mod devices;
mod files;
mod ipc;
mod kernel;
mod limits;
mod mounts;
mod namespaces;
mod privileges;
mod processes;
mod programs;
mod sockets;

use crate::attempt::Attempt;

/// Attempts by what they are at.
pub const GROUPS: &[(&str, &[Attempt])] = &[
    ("files of the host", files::ALL),
    ("mounts", mounts::ALL),
    ("namespaces", namespaces::ALL),
    ("other processes", processes::ALL),
    ("programs and code", programs::ALL),
    ("privileges", privileges::ALL),
    ("sockets", sockets::ALL),
    ("IPC and keys", ipc::ALL),
    ("the kernel", kernel::ALL),
    ("limits", limits::ALL),
    ("files that it holds", descriptors::ALL),
    ("KVM and TAP", devices::ALL),
];

/// Attempts that do no harm outside of a jail, and work there for root.
pub const OUTSIDE: &[&str] = &[
    "read `/etc/passwd`",
    "read the daemon's memory by `/proc`",
    "look at the daemon's socket",
    "connect to the daemon's socket",
    "connect to an abstract socket",
    "connect to a service on the loopback",
    "signal the daemon",
    "attach to another VMM (`ptrace`)",
    "read another VMM's memory",
    "get a descriptor of another VMM (`pidfd_getfd`)",
    "attach the host's shared memory (System V)",
    "open the host's message queue (POSIX)",
    "read root's key",
    "create a mount namespace",
];

pub fn all() -> impl Iterator<Item = (&'static str, &'static Attempt)> {
    let groups = GROUPS.iter();
    groups.flat_map(|(group, attempts)| attempts.iter().map(|attempt| (*group, attempt)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::attempt::Answer;
    use crate::world::World;

    #[test]
    fn there_are_many_and_each_has_a_name_and_a_reason_if_it_may_work() {
        let names: BTreeSet<_> = all().map(|(_, attempt)| attempt.name).collect();
        assert_eq!(names.len(), all().count());
        assert!(names.len() >= 300, "{}", names.len());
        for (_, attempt) in all() {
            let may_work = attempt.may.contains(&Answer::Works);
            assert_eq!(may_work, !attempt.harmless.is_empty(), "{}", attempt.name);
            assert!(!attempt.may.is_empty(), "{}", attempt.name);
        }
        for name in OUTSIDE {
            assert!(names.contains(name), "{name}");
        }
    }

    #[test]
    fn each_makes_system_calls_and_none_in_a_rehearsal() {
        for (_, attempt) in all() {
            let world = World::rehearsal();
            let _ = (attempt.run)(&world);
            assert!(!world.rehearsed().is_empty(), "{}", attempt.name);
        }
    }
}
