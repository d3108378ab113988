// SPDX-License-Identifier: Apache-2.0
//! Maps errors to gRPC codes. This is the only place that does.

use bulkhead_cdi::CdiError;
use bulkhead_image::FailureKind;
use bulkhead_network::{CniError, NetworkError};
use bulkhead_proto::agent::IMAGE_VOLUME;
use bulkhead_text::chain;
use tonic::{Code, Status};

use super::refusal::ParseError;
use crate::descriptors::ran_out;
use crate::logs::LogError;
use crate::pod::volumes::VolumeError;
use crate::pod::volumes::block::BlockError;
use crate::pod::volumes::disk::DiskError;
use crate::pod::{
    AgentError, BootError, CheckpointError, LaunchError, PodError, ShareError, TAKING_OVER,
};
use crate::scratch::ScratchError;
use crate::store::StoreError;

/// kubelet recognizes a failed image volume by this prefix of the error of `CreateContainer`.
const IMAGE_VOLUME_MOUNT_FAILED: &str = "ImageVolumeMountFailed";

impl From<PodError> for Status {
    fn from(error: PodError) -> Self {
        let words = chain(&error);
        let code = if ran_out(&error) {
            Code::ResourceExhausted
        } else {
            pod_code(&error)
        };
        if is_of_image_volume(&error) {
            return Self::new(code, format!("{IMAGE_VOLUME_MOUNT_FAILED}: {words}"));
        }
        Self::new(code, words)
    }
}

/// Lists every error, without a default, so that a new error cannot be added without choosing a code.
fn pod_code(error: &PodError) -> Code {
    match error {
        PodError::NotFound { .. } | PodError::NoImage(_) | PodError::Gone { .. } => Code::NotFound,
        PodError::Ambiguous { .. } | PodError::Program(_) | PodError::Artifact { .. } => {
            Code::InvalidArgument
        }
        PodError::Exists { .. } => Code::AlreadyExists,
        PodError::State { .. } | PodError::NotStarted { .. } => Code::FailedPrecondition,
        PodError::Image(error) => image_code(error.kind()),
        PodError::ImageVolume { source, .. } => pod_code(source),
        PodError::Log(error) => log_code(error),
        PodError::Agent { source, .. } | PodError::Guest { source, .. } => agent_code(source),
        PodError::Lost { .. } | PodError::Stream { .. } => Code::Unavailable,
        PodError::Store(error) => store_code(error),
        PodError::Disk(_) => Code::Internal,
        PodError::Boot(error) => boot_code(error),
        PodError::Checkpoint(error) => checkpoint_code(error),
        PodError::Volume(error) => volume_code(error),
        PodError::Unfit(_) | PodError::Descriptors(_) => Code::ResourceExhausted,
        PodError::Block(error) => block_code(error),
        PodError::Share(error) => share_code(error),
        PodError::Stuck { .. } => Code::DeadlineExceeded,
        PodError::Fault(_) => Code::Internal,
    }
}

fn is_of_image_volume(error: &PodError) -> bool {
    match error {
        PodError::ImageVolume { .. } => true,
        PodError::Agent {
            source: AgentError::Refused { message, .. },
            ..
        } => message.starts_with(IMAGE_VOLUME),
        _ => false,
    }
}

/// The status for an error of the image store or of a pull.
pub fn image_status(kind: FailureKind, error: &(dyn std::error::Error + 'static)) -> Status {
    if ran_out(error) {
        return Status::new(Code::ResourceExhausted, chain(error));
    }
    Status::new(image_code(kind), chain(error))
}

impl From<ParseError> for Status {
    fn from(error: ParseError) -> Self {
        Status::new(parse_code(&error), chain(&error))
    }
}

fn parse_code(error: &ParseError) -> Code {
    match error {
        ParseError::NotYet { .. } => Code::Unimplemented,
        ParseError::Cdi(CdiError::Unresolvable { .. }) => Code::NotFound,
        ParseError::Cdi(CdiError::Conflict { .. }) => Code::FailedPrecondition,
        ParseError::CdiEdit { source, .. } => parse_code(source),
        ParseError::Missing(_)
        | ParseError::Wrong { .. }
        | ParseError::NotIsolated { .. }
        | ParseError::Handler(_)
        | ParseError::CdiName(_)
        | ParseError::Profile { .. } => Code::InvalidArgument,
    }
}

fn block_code(error: &BlockError) -> Code {
    match error {
        BlockError::Open { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Code::NotFound
        }
        BlockError::Open { .. } | BlockError::Empty { .. } => Code::FailedPrecondition,
        BlockError::Kind { .. } => Code::InvalidArgument,
        BlockError::Number { .. } => Code::FailedPrecondition,
        BlockError::Character { .. } => Code::Unimplemented,
    }
}

fn share_code(error: &ShareError) -> Code {
    match error {
        ShareError::Kind { .. } | ShareError::Contradiction { .. } => Code::InvalidArgument,
        ShareError::Source { .. } | ShareError::NotPropagated { .. } | ShareError::Ended => {
            Code::FailedPrecondition
        }
        ShareError::TooMany(_) => Code::ResourceExhausted,
        ShareError::Server { .. } | ShareError::Join(_) | ShareError::Fault(_) => Code::Internal,
    }
}

fn checkpoint_code(error: &CheckpointError) -> Code {
    match error {
        CheckpointError::Directory { .. } | CheckpointError::Containers(_) => Code::InvalidArgument,
        CheckpointError::Refused { .. }
        | CheckpointError::NoneWarmed
        | CheckpointError::NoLabel(_)
        | CheckpointError::Unknown { .. }
        | CheckpointError::Unlike(_) => Code::FailedPrecondition,
        CheckpointError::File { source, .. } if is_full(source) => Code::ResourceExhausted,
        CheckpointError::Full { .. } => Code::ResourceExhausted,
        CheckpointError::Scratch(ScratchError::Copy { source, .. }) if is_full(source) => {
            Code::ResourceExhausted
        }
        CheckpointError::Late => Code::DeadlineExceeded,
        CheckpointError::File { .. }
        | CheckpointError::Scratch(_)
        | CheckpointError::Save(_)
        | CheckpointError::Panicked => Code::Internal,
    }
}

fn boot_code(error: &BootError) -> Code {
    match error {
        BootError::Unready(_) | BootError::Unbounded(_) => Code::FailedPrecondition,
        BootError::Unfit(_) | BootError::NoUser => Code::ResourceExhausted,
        BootError::Store(error) => store_code(error),
        BootError::Configure(error) => agent_code(error),
        BootError::Fork(error) => boot_code(error),
        BootError::BringBack(error) => pod_code(error),
        BootError::Network(error) => network_code(error),
        BootError::Scope(_) | BootError::NoTurn(_) => Code::Unavailable,
        BootError::Abandoned => Code::Cancelled,
        BootError::Launch { source, .. } => match **source {
            LaunchError::Timeout { .. } => Code::DeadlineExceeded,
            LaunchError::Open { ref source, .. } if is_full(source) => Code::ResourceExhausted,
            LaunchError::Ended {
                stage: TAKING_OVER, ..
            } => Code::FailedPrecondition,
            LaunchError::Ended { .. } | LaunchError::Ready(_) => Code::Unavailable,
            LaunchError::Open { .. }
            | LaunchError::Spawn { .. }
            | LaunchError::Descriptors(_)
            | LaunchError::Configure(_)
            | LaunchError::Adopt { .. }
            | LaunchError::Cores(_)
            | LaunchError::Template(_)
            | LaunchError::Saved(_)
            | LaunchError::Fault(_) => Code::Internal,
        },
        BootError::Directory { source, .. } if is_full(source) => Code::ResourceExhausted,
        BootError::Scratch(ScratchError::Copy { source, .. }) if is_full(source) => {
            Code::ResourceExhausted
        }
        BootError::Directory { .. }
        | BootError::Scratch(_)
        | BootError::Panicked
        | BootError::State(_)
        | BootError::Tap(_)
        | BootError::Unkillable { .. }
        | BootError::NoTemplate
        | BootError::Fault(_) => Code::Internal,
    }
}

pub fn network_code(error: &NetworkError) -> Code {
    match error {
        NetworkError::Cni(error) if error.is_passing() => Code::Unavailable,
        NetworkError::Cni(CniError::Late { .. }) => Code::DeadlineExceeded,
        NetworkError::Bandwidth { .. } | NetworkError::Subnet(_) => Code::InvalidArgument,
        NetworkError::NoneValid(_) => Code::FailedPrecondition,
        NetworkError::File { source, .. } if is_full(source) => Code::ResourceExhausted,
        NetworkError::Cni(_)
        | NetworkError::Namespace { .. }
        | NetworkError::Device { .. }
        | NetworkError::File { .. }
        | NetworkError::Fault(_) => Code::Internal,
    }
}

fn store_code(error: &StoreError) -> Code {
    match error.is_full() {
        true => Code::ResourceExhausted,
        false => Code::Internal,
    }
}

fn is_full(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::StorageFull
}

fn volume_code(error: &VolumeError) -> Code {
    match error {
        VolumeError::NotSupported { .. } => Code::Unimplemented,
        VolumeError::Look { .. } | VolumeError::Gone { .. } => Code::FailedPrecondition,
        VolumeError::Disk(error) => disk_code(error),
        VolumeError::Make { source, .. } => agent_code(source),
        VolumeError::Mirror { .. } => Code::FailedPrecondition,
    }
}

fn disk_code(error: &DiskError) -> Code {
    match error {
        DiskError::Make(ScratchError::Copy { source, .. }) if is_full(source) => {
            Code::ResourceExhausted
        }
        DiskError::InUse { .. } | DiskError::Other { .. } => Code::FailedPrecondition,
        DiskError::Make(_) | DiskError::File { .. } | DiskError::Fault(_) => Code::Internal,
    }
}

fn agent_code(error: &AgentError) -> Code {
    match error {
        AgentError::Refused { code, .. } => *code,
        AgentError::Timeout { .. } => Code::DeadlineExceeded,
        AgentError::Lost { .. } => Code::Unavailable,
        AgentError::Untrusted { .. } | AgentError::Fault(_) => Code::Internal,
    }
}

fn log_code(error: &LogError) -> Code {
    match error {
        LogError::Path(_) => Code::InvalidArgument,
        LogError::Busy(_) => Code::ResourceExhausted,
        LogError::Complete => Code::FailedPrecondition,
        LogError::Open { .. }
        | LogError::Write { .. }
        | LogError::Stream(_)
        | LogError::Record(_)
        | LogError::Fault(_) => Code::Internal,
    }
}

fn image_code(kind: FailureKind) -> Code {
    match kind {
        FailureKind::NotFound => Code::NotFound,
        FailureKind::Invalid => Code::InvalidArgument,
        FailureKind::Unauthenticated => Code::Unauthenticated,
        FailureKind::Denied => Code::PermissionDenied,
        FailureKind::Unavailable => Code::Unavailable,
        FailureKind::Corrupt => Code::DataLoss,
        FailureKind::NoSpace => Code::ResourceExhausted,
        FailureKind::Internal => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::life::state::IllegalMove;

    #[test]
    fn errors_have_the_codes_that_kubelet_knows_and_say_their_causes_once() {
        let state = PodError::State {
            id: "abc".into(),
            source: IllegalMove {
                subject: "container",
                state: "exited",
                event: "exec",
            },
        };
        let status = Status::from(state);
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(
            status.message(),
            "abc: container is exited: exec is not possible"
        );
        let refused = PodError::Agent {
            id: "abc".into(),
            source: AgentError::Refused {
                code: Code::FailedPrecondition,
                message: "x: not found".into(),
            },
        };
        assert_eq!(
            Status::from(refused).message(),
            "container abc: x: not found"
        );
        assert_eq!(
            Status::from(PodError::NoImage("i".into())).code(),
            Code::NotFound
        );
    }

    #[test]
    fn a_limit_of_open_files_that_was_reached_is_no_internal_error() {
        let path = "/p".into();
        let source = std::io::Error::from(rustix::io::Errno::MFILE);
        let status = Status::from(PodError::Boot(BootError::Directory { path, source }));
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().contains("Too many open files"), "{status}");
    }

    #[test]
    fn image_volumes_that_fail_are_named_as_kubelet_looks_for_them() {
        let missing = PodError::ImageVolume {
            image: "i".into(),
            source: Box::new(PodError::NoImage("i".into())),
        };
        let status = Status::from(missing);
        assert_eq!(status.code(), Code::NotFound);
        assert_eq!(
            status.message(),
            "ImageVolumeMountFailed: image volume i: image i is not here: pull it first"
        );
        for (message, expected) in [
            (
                "image volume at /x: \"y\" in it: not found",
                "ImageVolumeMountFailed: container abc: image volume at /x: \"y\" in it: not found",
            ),
            (
                "mount at /image volume: no",
                "container abc: mount at /image volume: no",
            ),
        ] {
            let refused = PodError::Agent {
                id: "abc".into(),
                source: AgentError::Refused {
                    code: Code::FailedPrecondition,
                    message: message.into(),
                },
            };
            assert_eq!(Status::from(refused).message(), expected);
        }
    }
}
