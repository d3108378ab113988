// SPDX-License-Identifier: Apache-2.0
//! The users of VMs. Each VM runs as a user and a group that no other VM has, so that one which is taken over by its guest
//! can do nothing to another. Nothing on the host belongs to these users.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// All users of this node's VMs, and who of them is taken.
#[derive(Debug)]
pub struct Users {
    range: Range<u32>,
    taken: Mutex<BTreeSet<u32>>,
}

impl Users {
    pub fn new(range: Range<u32>) -> Self {
        Self {
            range,
            taken: Mutex::default(),
        }
    }

    /// Takes a user for a new VM, and its group. `None`: all are taken.
    pub fn take(&self) -> Option<u32> {
        let mut taken = self.taken();
        let free = self.range.clone().find(|user| !taken.contains(user))?;
        taken.insert(free);
        Some(free)
    }

    /// Notes the user of a VM that an earlier daemon started. It may be of another range.
    pub fn note(&self, user: u32) {
        self.taken().insert(user);
    }

    /// Takes back the user of a VM that has ended.
    pub fn give_back(&self, user: u32) {
        self.taken().remove(&user);
    }

    fn taken(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_user_is_taken_twice_and_one_that_comes_back_is_free() {
        let users = Users::new(10..13);
        users.note(11);
        users.note(70);
        assert_eq!([users.take(), users.take()], [Some(10), Some(12)]);
        assert_eq!(users.take(), None);
        users.give_back(11);
        users.give_back(70);
        assert_eq!([users.take(), users.take()], [Some(11), None]);
    }
}
