// SPDX-License-Identifier: Apache-2.0
//! Freezes and thaws a cgroup with all below it. Frozen processes can still be killed.

use std::fs;
use std::io;

use super::{Cgroup, CgroupError, write_existing};

const FREEZE: &str = "cgroup.freeze";

impl Cgroup {
    /// Begins to freeze. [`Self::is_frozen`] tells when all processes have stopped.
    pub fn freeze(&self) -> Result<(), CgroupError> {
        self.write(FREEZE, "1")
    }

    pub fn thaw(&self) -> Result<(), CgroupError> {
        self.write(FREEZE, "0")
    }

    /// Whether no process runs any more. Also true if there is none.
    pub fn is_frozen(&self) -> Result<bool, CgroupError> {
        let events = fs::read_to_string(self.path.join("cgroup.events"));
        let events = events.map_err(|source| self.failed(source))?;
        Ok(events.lines().any(|line| line == "frozen 1"))
    }

    fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        write_existing(&self.path.join(file), value).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> CgroupError {
        CgroupError::Freeze {
            path: self.path.clone(),
            source,
        }
    }
}
