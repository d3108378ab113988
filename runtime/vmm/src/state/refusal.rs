// SPDX-License-Identifier: Apache-2.0
//! Why a state is not taken: what differs, and what to do.

use std::io;

use super::cpuid::Difference;

/// Why a state is refused. Nothing was changed then.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("read the state of a VM")]
    Read(#[source] io::Error),
    #[error("this is no state of a VM: it does not begin as one. Name the right file")]
    NotAState,
    #[error(
        "the state has format {found}, this VMM reads format {here} only: restore it with the version of Bulkhead that \
         wrote it"
    )]
    Format { found: u32, here: u32 },
    #[error("the state has more than {most} bytes, which no VM needs: make a new one")]
    TooLarge { most: usize },
    #[error(
        "the state is not complete, or something was added: it says {said} bytes and has {found}. Copy it again, or make \
         a new one"
    )]
    Length { said: u64, found: u64 },
    #[error("the state is damaged: its checksum is wrong. Copy it again, or make a new one")]
    Damaged,
    #[error(
        "the state's checksum is right, but it is not what this VMM writes: make a new one, and trust its origin no more"
    )]
    Foreign(#[source] Option<postcard::Error>),
    #[error("the state is of VMM {found}, this is {here}: restore it with {found}")]
    Vmm { found: String, here: String },
    #[error("the state is of guest kernel {found}, here it is {here}: restore it with that kernel")]
    Kernel { found: String, here: String },
    #[error(
        "the guest ran on {found}, this host has {here}: restore it on a host of the first kind"
    )]
    Cpu { found: String, here: String },
    #[error(
        "the guest's CPU is not what this host offers ({0}): restore it on a host with the same CPU, microcode and kernel"
    )]
    Features(Difference),
    #[error(
        "the state has {found} vCPUs, of which the guest has started {least}, and this VM has {here}: restore it into a VM of \
         {least} to {found}"
    )]
    Vcpus {
        found: usize,
        least: usize,
        here: usize,
    },
}
