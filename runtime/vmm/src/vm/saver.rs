// SPDX-License-Identifier: Apache-2.0
//! Saves a template: what the main thread needs for that, from before the vCPUs had threads.

use std::fs::File;
use std::io::{self, Write};

use kvm_ioctls::{VcpuFd, VmFd};

use super::SetupError;
use super::machine::Machine;
use super::resources::Template;
use crate::bus::DeviceStates;
use crate::config::KernelSum;
use crate::state::refusal::Refusal;
use crate::state::{Host, State, TransferError};
use crate::sys;

/// Which step failed.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error("take the state of the VM")]
    Transfer(#[from] TransferError),
    #[error("write the state of the VM down")]
    Format(#[from] Refusal),
    #[error("write the template's state")]
    Write(#[from] io::Error),
}

/// What a template is saved with.
#[allow(missing_debug_implementations)]
pub struct Saver {
    host: Host,
    kernel: KernelSum,
    state: File,
    /// The vCPUs' threads have others.
    vcpus: Vec<VcpuFd>,
}

impl Saver {
    /// Call it before the machine's vCPUs go to their threads.
    pub fn new(machine: &Machine, template: Template) -> Result<Self, SetupError> {
        let vcpus = machine.vcpus.iter();
        let vcpus = vcpus.map(|vcpu| sys::another_vcpu(&machine.vm, vcpu));
        Ok(Self {
            host: machine.host()?,
            kernel: template.kernel_sum,
            state: template.state,
            vcpus: vcpus
                .collect::<Result<_, _>>()
                .map_err(SetupError::Template)?,
        })
    }

    /// Writes the state of a VM whose vCPUs are parked and whose devices are frozen.
    pub fn save(&self, vm: &VmFd, devices: DeviceStates) -> Result<(), SaveError> {
        let state = State::capture(&self.host, self.kernel, vm, &self.vcpus, devices)?;
        let mut file = &self.state;
        Ok(file.write_all(&state.write()?)?)
    }
}
