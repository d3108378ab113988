// SPDX-License-Identifier: Apache-2.0
//! A VM, because a real VMM holds one when it is taken over. Only the process that made it can use it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::facts::Facts;
use crate::sys;
use crate::world::{Held, World, call};

/// `_IO(KVMIO, 0x01)` and `_IO(KVMIO, 0x41)`
const KVM_CREATE_VM: u32 = 0xae01;
const KVM_CREATE_VCPU: u32 = 0xae41;

/// A VM with one vCPU.
#[derive(Debug)]
pub struct Machine {
    pub vm: OwnedFd,
    pub vcpu: OwnedFd,
}

impl Machine {
    pub fn new() -> io::Result<Self> {
        let held = Held::inherited();
        let world = World::real(held, Facts::default(), None, |_| {});
        let make = |fd: i32, request: u32| {
            let made = call!(world, ioctl, fd, request, 0).map_err(io::Error::from_raw_os_error)?;
            let made = i32::try_from(made).map_err(io::Error::other)?;
            Ok::<_, io::Error>(sys::owned(made))
        };
        let vm = make(held.kvm, KVM_CREATE_VM)?;
        let vcpu = make(vm.as_raw_fd(), KVM_CREATE_VCPU)?;
        Ok(Self { vm, vcpu })
    }
}
