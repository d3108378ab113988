// SPDX-License-Identifier: Apache-2.0
//! The memory for names and attributes of layers that are being converted.
//!
//! Every layer gets a little for itself, which is enough for nearly all. What a larger one needs beyond that comes from
//! a pool for the whole node. So the daemon's memory is bounded, however many images with how many files are pulled, and
//! layers of usual size never wait for hostile ones or fail because of them.

use std::sync::{Arc, Mutex, PoisonError};

/// What each layer may take without the pool: about 80,000 files.
const OWN_BYTES: usize = 16 << 20;
/// What all layers together may take beyond that.
const POOL_BYTES: usize = 512 << 20;
/// How much is taken from the pool at a time.
const STEP_BYTES: usize = 4 << 20;

/// The pool.
#[derive(Debug)]
pub struct Memory {
    left_bytes: Mutex<usize>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            left_bytes: Mutex::new(POOL_BYTES),
        }
    }
}

impl Memory {
    fn take(&self, bytes: usize) -> bool {
        let mut left = self
            .left_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        match left.checked_sub(bytes) {
            Some(rest) => {
                *left = rest;
                true
            }
            None => false,
        }
    }

    fn give_back(&self, bytes: usize) {
        *self
            .left_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner) += bytes;
    }
}

/// What one layer takes. It is given back when this is dropped.
#[derive(Debug)]
pub struct Share {
    memory: Arc<Memory>,
    used_bytes: usize,
    pooled_bytes: usize,
}

impl Share {
    pub fn new(memory: &Arc<Memory>) -> Self {
        Self {
            memory: Arc::clone(memory),
            used_bytes: 0,
            pooled_bytes: 0,
        }
    }

    pub fn used_bytes(&self) -> usize {
        self.used_bytes
    }

    /// Takes more. Returns false if the pool is used up by other layers.
    pub fn take(&mut self, bytes: usize) -> bool {
        self.used_bytes = self.used_bytes.saturating_add(bytes);
        while self.used_bytes > self.pooled_bytes + OWN_BYTES {
            if !self.memory.take(STEP_BYTES) {
                return false;
            }
            self.pooled_bytes += STEP_BYTES;
        }
        true
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.memory.give_back(self.pooled_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_layers_share_a_pool_and_small_ones_do_not_need_it() {
        let memory = Arc::new(Memory::default());
        let mut large = Share::new(&memory);
        assert!(large.take(OWN_BYTES + POOL_BYTES));
        assert!(!large.take(1));
        let mut small = Share::new(&memory);
        assert!(small.take(OWN_BYTES));
        assert!(!small.take(1));
        drop(large);
        assert!(small.take(1));
        assert!(Share::new(&memory).take(POOL_BYTES));
    }

    #[test]
    fn a_number_that_overflows_is_refused() {
        let memory = Arc::new(Memory::default());
        let mut share = Share::new(&memory);
        assert!(!share.take(usize::MAX));
        assert!(!share.take(usize::MAX));
        drop(share);
        assert_eq!(*memory.left_bytes.lock().unwrap(), POOL_BYTES);
    }
}
