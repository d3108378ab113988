// SPDX-License-Identifier: Apache-2.0
//! The two protocols of Bulkhead as Rust types: CRI v1, which kubelet speaks to the daemon, and the
//! agent's, which the daemon speaks to a guest. Generated at build time from `proto/*.proto`, with the numbers and
//! words that are no messages; nothing else lives here.

/// CRI v1 (`runtime.v1`): `RuntimeService` and `ImageService`.
#[allow(missing_debug_implementations, clippy::all)]
pub mod cri {
    tonic::include_proto!("runtime.v1");
}

/// The guest agent's protocol, and what both sides of it have to agree on beside the messages.
#[allow(missing_debug_implementations, clippy::all)]
pub mod agent {
    tonic::include_proto!("bulkhead.agent.v1");

    /// vsock port of the guest on which the agent serves gRPC.
    pub const CONTROL_PORT: u32 = 1024;
    /// vsock port of the guest on which the agent takes byte streams.
    pub const STREAM_PORT: u32 = 1025;
    /// vsock port of the host to which the agent reports that it is ready.
    pub const READY_PORT: u32 = 1024;

    /// What a guest's kernel and agent take, whatever the size of the VM: 34 MiB, and most of the 70 MiB that the kernel keeps
    /// free for itself (docs/measurements.md).
    pub const GUEST_FIXED_BYTES: u64 = 96 << 20;
    /// One part in so many of a VM's memory is the kernel's own. Measured: 2 %, of which 64 bytes a page are `struct page`.
    pub const GUEST_PARTS: u64 = 40;

    /// The beginning of the agent's error when a volume that is an image cannot be mounted.
    pub const IMAGE_VOLUME: &str = "image volume";

    /// The reason in the status of a container whose program could not be executed.
    pub const START_ERROR: &str = "StartError";

    /// The guest's disks, as Linux names them in the order in which the VMM has them.
    pub mod disk {
        /// Read-only: image layers.
        pub const IMAGE: &str = "vda";
        /// The parameter of the guest's kernel that says how many sectors the kernel's modules take, as an EROFS file system at
        /// the beginning of the image disk.
        pub const MODULES_PARAMETER: &str = "bulkhead.modules_sectors";
        /// What containers write; new for each guest.
        pub const SCRATCH: &str = "vdb";
        /// Block devices of the host, and file systems that outlive the guest.
        pub const VOLUMES: &str = "vdc";
    }

    /// The records of `LogStream`; agent.proto says what each carries.
    pub mod log_record {
        pub const END: u8 = 0;
        pub const STDOUT: u8 = 1;
        pub const STDERR: u8 = 2;
        /// Kind and length.
        pub const HEADER_BYTES: usize = 5;
        /// The longest payload.
        pub const MAX_PAYLOAD_BYTES: usize = 32 << 10;
    }

    /// The records of `ExecStream` and `AttachStream`; agent.proto says what each carries.
    pub mod record {
        /// From the host: input; length 0 is its end. From the agent: how many bytes of input it has passed on or dropped.
        pub const INPUT: u8 = 0;
        pub const STDOUT: u8 = 1;
        pub const STDERR: u8 = 2;
        pub const END: u8 = 3;
        pub const WINDOW_SIZE: u8 = 4;
        /// Kind and length.
        pub const HEADER_BYTES: usize = 5;
        /// The longest payload; with the header it fills a vsock packet.
        pub const MAX_PAYLOAD_BYTES: usize = (64 << 10) - HEADER_BYTES;
        /// The flow-control window: how much input the host may send beyond what the agent has reported.
        pub const INPUT_WINDOW_BYTES: usize = 256 << 10;
    }
}
