// SPDX-License-Identifier: Apache-2.0
//! What a VMM holds of the host. Its parent opens everything and passes it as descriptors with these numbers; the VMM opens
//! nothing by name.

use std::fs::File;
use std::io;

use bulkhead_jail::descriptors;

/// A descriptor that the VMM is started with. The number of each is its place here, from 3 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inherited {
    /// An empty file, open for writing: the [`crate::report::ExitReport`] goes there.
    ExitReport,
    /// `/dev/kvm`.
    Kvm,
    /// An uncompressed ELF kernel (`vmlinux`), open for reading. Only if the VM boots.
    Kernel,
    /// Open for reading. Only if the VM boots.
    Initramfs,
    /// An empty file, open for writing: the guest's serial output goes there, but only its first MiB.
    Console,
    /// A listening socket for requests, see [`crate::control`].
    Control,
    /// A listening socket. A host program connects and sends `CONNECT <port>\n` to reach a port of the guest.
    Vsock,
    /// A connected socket: the host's end of the connection that the guest makes when it is ready. Only if the VM
    /// boots.
    Ready,
    /// The network device, opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR. Only if the configuration has a network.
    Tap,
    /// A file or block device, open for both. Only if the configuration has a scratch disk.
    Scratch,
    /// The kernel's modules, an EROFS file open for reading: the first extent of the image disk. Only if the configuration
    /// has modules.
    Modules,
    /// The memory of a template, a memfd: open for both in the template, for reading in a fork. Or that of a checkpoint, a
    /// regular file open for reading, to which nobody writes any more as long as VMs run that map it.
    Memory,
    /// The state of a template or checkpoint, a file: open for writing in the template, otherwise for reading.
    State,
}

impl Inherited {
    /// The number behind the last one.
    pub const END: u32 = Self::State as u32 + 4;

    /// The number of the descriptor.
    #[must_use]
    pub fn number(self) -> i32 {
        self as i32 + 3
    }

    /// What messages call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ExitReport => "exit report",
            Self::Kvm => "/dev/kvm",
            Self::Kernel => "kernel",
            Self::Initramfs => "initramfs",
            Self::Console => "console log",
            Self::Control => "control socket",
            Self::Vsock => "vsock socket",
            Self::Ready => "ready connection",
            Self::Tap => "TAP",
            Self::Scratch => "scratch disk",
            Self::Modules => "kernel modules",
            Self::Memory => "saved memory",
            Self::State => "saved state",
        }
    }

    /// Takes the descriptor over. Call it once for each, before the process opens anything.
    pub fn take(self) -> io::Result<File> {
        descriptors::inherited(self.number())
    }
}
