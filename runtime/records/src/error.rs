// SPDX-License-Identifier: Apache-2.0
//! What can go wrong with records. Errors of redb end here.

use std::io;
use std::path::{Path, PathBuf};

use bulkhead_faults::Fault;

/// An error about a file of records.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    #[error("{operation} {path}")]
    File {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path} is in use: stop the other daemon first")]
    InUse { path: PathBuf },
    #[error("{path} is damaged ({why})")]
    Damaged { path: PathBuf, why: String },
    #[error("{operation} {path}")]
    Database {
        operation: &'static str,
        path: PathBuf,
        source: Box<redb::Error>,
    },
    #[error("encode the record {key}")]
    Encode {
        key: String,
        source: serde_json::Error,
    },
    #[error("the record {key} is damaged")]
    Decode {
        key: String,
        source: serde_json::Error,
    },
    #[error(transparent)]
    Fault(#[from] Fault),
}

impl RecordsError {
    /// The I/O error behind it, if there is one.
    pub fn io(&self) -> Option<&io::Error> {
        match self {
            Self::File { source, .. } => Some(source),
            Self::Database { source, .. } => match source.as_ref() {
                redb::Error::Io(source) => Some(source),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether the disk is full.
    pub fn is_full(&self) -> bool {
        self.io().is_some_and(|error| {
            matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            )
        })
    }

    /// Whether the database must be opened again before it can be used: whatever failed, unless it is about one record.
    pub(crate) fn is_of_database(&self) -> bool {
        !matches!(self, Self::Encode { .. } | Self::Decode { .. })
    }

    /// An error of redb about the file `path`.
    pub(crate) fn of(operation: &'static str, path: &Path, error: impl Into<redb::Error>) -> Self {
        let path = path.to_owned();
        match error.into() {
            redb::Error::DatabaseAlreadyOpen => Self::InUse { path },
            redb::Error::Corrupted(why) => Self::Damaged { path, why },
            // So redb reports a file that is not one of its own, or that is too short.
            redb::Error::Io(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
                ) =>
            {
                let why = format!("it is not a database: {error}");
                Self::Damaged { path, why }
            }
            error => Self::Database {
                operation,
                path,
                source: Box::new(error),
            },
        }
    }

    pub(crate) fn file(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            operation,
            path: path.clone(),
            source,
        }
    }
}
