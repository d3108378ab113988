// SPDX-License-Identifier: Apache-2.0
//! Maps errors to gRPC codes; nothing else does. There are no catch-all arms, so a new error forces a decision.

use std::io::ErrorKind;

use bulkhead_text::chain;
use tonic::{Code, Status};

use crate::cgroup::CgroupError;
use crate::clock::ClockError;
use crate::container::{CheckpointError, ContainerError};
use crate::disk::copy::CopyError;
use crate::hotplug::HotplugError;
use crate::sandbox::{LimitError, SandboxError};
use crate::volumes::VolumeError;
use crate::volumes::declared::DeclaredError;
use crate::volumes::mounts::MountError;

impl From<ContainerError> for Status {
    fn from(error: ContainerError) -> Self {
        let code = match &error {
            ContainerError::Invalid(_) | ContainerError::Seccomp(_) | ContainerError::Exec(_) => {
                Code::InvalidArgument
            }
            ContainerError::NotFound(_) => Code::NotFound,
            ContainerError::Exists(_) => Code::AlreadyExists,
            ContainerError::TooMany(_) => Code::ResourceExhausted,
            ContainerError::State(_) | ContainerError::Cgroup(CgroupError::InUse { .. }) => {
                Code::FailedPrecondition
            }
            ContainerError::Cgroup(CgroupError::BadName(_) | CgroupError::Set { .. }) => {
                Code::InvalidArgument
            }
            ContainerError::Checkpoint(error) => checkpoint_code(error),
            ContainerError::Mount(error) => mount_code(error),
            ContainerError::Declared(error) => declared_code(error),
            ContainerError::Layers(_)
            | ContainerError::Block(_)
            | ContainerError::Overlay(_)
            | ContainerError::Cgroup(_)
            | ContainerError::System { .. } => Code::Internal,
        };
        Self::new(code, chain(&error))
    }
}

fn checkpoint_code(error: &CheckpointError) -> Code {
    match error {
        CheckpointError::Frozen
        | CheckpointError::NotFrozen
        | CheckpointError::NotRunning(_)
        | CheckpointError::NotListed(_)
        | CheckpointError::Busy => Code::FailedPrecondition,
        CheckpointError::NotFound(_) => Code::NotFound,
        CheckpointError::Lease(_) | CheckpointError::Twice(_) => Code::InvalidArgument,
        CheckpointError::NotStill { .. } => Code::Aborted,
        CheckpointError::Cgroup { .. } => Code::Internal,
    }
}

fn mount_code(error: &MountError) -> Code {
    match error {
        MountError::TooMany(_) => Code::ResourceExhausted,
        MountError::Target(_) => Code::InvalidArgument,
        MountError::Source { .. }
        | MountError::Shared { .. }
        | MountError::InImage { .. }
        | MountError::SubPath { .. } => Code::FailedPrecondition,
        MountError::Layers { .. } | MountError::Image { .. } => Code::Internal,
        MountError::Volume { source, .. } => volume_code(source),
    }
}

fn declared_code(error: &DeclaredError) -> Code {
    match error {
        DeclaredError::TooMany(_) => Code::ResourceExhausted,
        error if error.is_full() => Code::ResourceExhausted,
        DeclaredError::Target(error) => mount_code(error),
        DeclaredError::Find { .. } => Code::FailedPrecondition,
        DeclaredError::Copy {
            source: CopyError::TooLate,
            ..
        } => Code::Aborted,
        DeclaredError::Copy {
            source: CopyError::TooMany,
            ..
        } => Code::ResourceExhausted,
        DeclaredError::Make { .. } | DeclaredError::Copy { .. } => Code::Internal,
    }
}

fn volume_code(error: &VolumeError) -> Code {
    match error {
        VolumeError::Name(_) | VolumeError::Missing(_) | VolumeError::Extent(_) => {
            Code::InvalidArgument
        }
        VolumeError::TooMany => Code::ResourceExhausted,
        VolumeError::NotFound(_) => Code::NotFound,
        VolumeError::OtherKind(_) => Code::FailedPrecondition,
        VolumeError::System { source, .. } if source.kind() == ErrorKind::StorageFull => {
            Code::ResourceExhausted
        }
        VolumeError::System { .. } => Code::Internal,
    }
}

impl From<VolumeError> for Status {
    fn from(error: VolumeError) -> Self {
        Self::new(volume_code(&error), chain(&error))
    }
}

impl From<LimitError> for Status {
    fn from(error: LimitError) -> Self {
        let code = match &error {
            LimitError::Cgroup(CgroupError::InUse { .. }) => Code::FailedPrecondition,
            LimitError::Cgroup(_) => Code::Internal,
            LimitError::PageSize(_) => Code::InvalidArgument,
            LimitError::Hugepages { .. } => Code::ResourceExhausted,
        };
        Self::new(code, chain(&error))
    }
}

impl From<HotplugError> for Status {
    fn from(error: HotplugError) -> Self {
        let code = match &error {
            HotplugError::Ranges => Code::InvalidArgument,
            HotplugError::Full { .. } => Code::ResourceExhausted,
            HotplugError::Unable(_) => Code::Unimplemented,
            HotplugError::Add { .. } | HotplugError::Online { .. } | HotplugError::Gate(_) => {
                Code::Internal
            }
        };
        Self::new(code, chain(&error))
    }
}

impl From<SandboxError> for Status {
    fn from(error: SandboxError) -> Self {
        let code = match &error {
            SandboxError::AnotherSandbox | SandboxError::NotConfigured => Code::FailedPrecondition,
            SandboxError::Fixed(_)
            | SandboxError::Entropy(_)
            | SandboxError::BadSysctl(_)
            | SandboxError::Sysctl { .. } => Code::InvalidArgument,
            SandboxError::Step { .. } | SandboxError::Clock(_) | SandboxError::Network(_) => {
                Code::Internal
            }
        };
        Self::new(code, chain(&error))
    }
}

impl From<ClockError> for Status {
    fn from(error: ClockError) -> Self {
        Self::new(Code::Internal, chain(&error))
    }
}
