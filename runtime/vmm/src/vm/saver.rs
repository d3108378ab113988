// SPDX-License-Identifier: Apache-2.0
//! Takes the state of a VM: what the main thread needs for that, from before the vCPUs had threads. Every VM has it, for
//! checkpoints; a template is saved with it.

use std::fs::File;
use std::io::{self, Write};

use kvm_ioctls::{VcpuFd, VmFd};

use super::SetupError;
use super::machine::Machine;
use super::resources::Saved;
use crate::bus::DeviceStates;
use crate::config::KernelSum;
use crate::memory::Laid;
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
    #[error("write the file of the VM's state")]
    Write(#[from] io::Error),
}

/// What the state of a VM is taken with.
#[allow(missing_debug_implementations)]
pub struct Saver {
    /// The sum of the guest's kernel and the file for the state, in a template.
    pub template: Option<(KernelSum, File)>,
    pub memory_bytes: u64,
    /// In a fork, and in a restored VM that maps its checkpoint.
    pub laid: Laid,
    host: Host,
    /// The vCPUs' threads have others.
    vcpus: Vec<VcpuFd>,
}

impl Saver {
    /// Call it before the machine's vCPUs go to their threads.
    pub fn new(
        machine: &Machine,
        template: Option<Saved>,
        memory_bytes: u64,
        laid: Laid,
    ) -> Result<Self, SetupError> {
        let vcpus = machine.vcpus.iter();
        let vcpus = vcpus.map(|vcpu| sys::another_vcpu(&machine.vm, vcpu));
        Ok(Self {
            template: template.map(|files| (files.kernel_sum, files.state)),
            memory_bytes,
            laid,
            host: machine.host().clone(),
            vcpus: vcpus.collect::<Result<_, _>>().map_err(SetupError::Saver)?,
        })
    }

    /// Writes the state of a VM whose vCPUs are parked and whose devices are frozen. The guest's kernel has the sum `kernel`.
    pub fn save(
        &self,
        vm: &VmFd,
        kernel: KernelSum,
        devices: DeviceStates,
        mut file: &File,
    ) -> Result<(), SaveError> {
        let state = State::capture(&self.host, kernel, vm, &self.vcpus, devices)?;
        Ok(file.write_all(&state.write()?)?)
    }
}
