// SPDX-License-Identifier: Apache-2.0
//! Errors of a pod's network.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_faults::Fault;

use crate::cni::CniError;

/// An error in a pod's network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The text is short because the source names the network and the plugin.
    #[error("CNI")]
    Cni(#[from] CniError),
    #[error("there is no valid CNI configuration")]
    NoneValid(#[source] CniError),
    #[error("annotation {annotation} is {value:?}, not a number of bits per second from 1k to 1P")]
    Bandwidth {
        annotation: &'static str,
        value: String,
    },
    #[error("{0:?} is not a subnet")]
    Subnet(String),
    #[error("network namespace {path}: {step}")]
    Namespace {
        path: PathBuf,
        step: &'static str,
        source: io::Error,
    },
    #[error("network device of the pod: {step}")]
    Device {
        step: &'static str,
        source: Box<dyn Error + Send + Sync>,
    },
    #[error("{step} {path}")]
    File {
        step: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// Makes the error for a step with a file.
pub fn file_error(step: &'static str, path: &Path) -> impl Fn(io::Error) -> NetworkError + use<> {
    let path = path.to_owned();
    move |source| NetworkError::File {
        step,
        path: path.clone(),
        source,
    }
}

/// Makes the error for a step with an interface.
pub fn device_error<E: Into<Box<dyn Error + Send + Sync>>>(
    step: &'static str,
) -> impl Fn(E) -> NetworkError {
    move |source| NetworkError::Device {
        step,
        source: source.into(),
    }
}
