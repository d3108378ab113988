// SPDX-License-Identifier: Apache-2.0
//! Records on disk: a file with tables of records, each as JSON under a key.
//!
//! The file is a redb database. Every change is one transaction, which is on the disk when the call returns. Three
//! things are added to redb:
//!
//! - After a failed write, redb refuses all further work. So [`Records`] opens the file again.
//! - What frees space must work on a full disk. So each file has a [`reserve`] beside it.
//! - redb trusts its file, and may panic if that is damaged. So [`check()`] reads all of it before it is used. Run it in
//!   a process of its own.
//!
//! For other files that are made once, a record of their [`Sum`] tells later whether they are as they were.

#![forbid(unsafe_code)]

mod check;
mod error;
mod file;
mod reserve;
mod store;
mod sum;

pub use check::{Found, check};
pub use error::RecordsError;
pub use file::{Place, Table};
pub use store::{Change, Records, Room, Rows};
pub use sum::{Intact, Stamp, Sum};
