// SPDX-License-Identifier: Apache-2.0
//! The Container Device Interface (CDI): files in which vendors say what a container needs to use a device.
//!
//! A container names devices (`vendor.com/class=device`), and a file of that kind says which device nodes, mounts,
//! variables and hooks each of them stands for. Here files are found, read and checked, as the specification 1.1.0
//! says. What of it a pod can have is for others to decide.
//!
//! The entrance is [`Directories::find`]. All of it blocks, because it reads files; nothing is kept between calls, so a
//! change of a file counts from the next container on.

mod directories;
mod edits;
mod name;
mod specification;

pub use directories::{CdiError, Directories, Found, Part, Skipped};
pub use edits::{DeviceNode, Edits, Hook, HookKind, Mount, NetDevice, NodeKind};
pub use name::{DeviceName, NameError};
pub use specification::SpecificationError;
