// SPDX-License-Identifier: Apache-2.0
//! A window that can be changed while its disk works.
//!
//! The disk's worker holds the lock of its device as long as a request takes, which is for ever if a volume hangs. So
//! the control socket must not need that lock. The window has a lock of its own, which nobody holds during I/O: a
//! request takes out the files that it needs and lets the lock go.

use std::sync::{Arc, Mutex, Weak};

use super::disk::DiskRange;
use super::window::{Window, WindowError};
use crate::devices::mmio::lock;
use crate::devices::ring::Interrupt;
use crate::extent::{Extent, SECTOR_BYTES};

/// A part of a request that belongs to one file.
#[derive(Debug)]
pub struct Part<F> {
    pub file: Arc<F>,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// Where in the buffers of the request.
    pub of_buffers: DiskRange,
}

#[derive(Debug)]
struct State<F> {
    window: Window<Arc<F>>,
    /// The driver to be told of changes, while there is one.
    driver: Option<Arc<Interrupt>>,
}

impl<F> State<F> {
    /// The capacity is the first field of the configuration space (virtio 1.2, 5.2.4).
    fn tell_capacity(&self) {
        if let Some(driver) = &self.driver {
            let sectors = self.window.len() / SECTOR_BYTES;
            driver.config_changed(&sectors.to_le_bytes());
        }
    }
}

/// The window of a disk and of all who change it.
#[derive(Debug)]
pub struct SharedWindow<F>(Arc<Mutex<State<F>>>);

impl<F> Clone for SharedWindow<F> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<F> Default for SharedWindow<F> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State {
            window: Window::default(),
            driver: None,
        })))
    }
}

impl<F> SharedWindow<F> {
    /// Sets the driver that is told of changes from now on.
    pub fn set_driver(&self, driver: Option<Arc<Interrupt>>) {
        lock(&self.0).driver = driver;
    }

    pub fn sectors(&self) -> u64 {
        lock(&self.0).window.len() / SECTOR_BYTES
    }

    /// Adds `bytes` of `file` at the end and tells the driver.
    pub fn append(&self, file: F, bytes: u64) -> Result<Extent, WindowError> {
        let mut state = lock(&self.0);
        let extent = state.window.append(Arc::new(file), bytes)?;
        state.tell_capacity();
        Ok(extent)
    }

    /// Takes out the extent at `first_sector`, if there is one, and tells the driver. A request that is being served
    /// may hold the file as well.
    pub fn remove(&self, first_sector: u64) -> Option<Arc<F>> {
        let mut state = lock(&self.0);
        let file = state.window.remove(first_sector)?;
        state.tell_capacity();
        Some(file)
    }

    /// The extent of the first file for which `is_right` holds.
    pub fn find(&self, is_right: impl Fn(&F) -> bool) -> Option<Extent> {
        lock(&self.0).window.find(|file| is_right(file))
    }

    /// All files. They are weak, so that one can be closed while the others are at work.
    pub fn files(&self) -> Vec<Weak<F>> {
        lock(&self.0).window.files().map(Arc::downgrade).collect()
    }

    /// The parts of a range, in order. One that no file backs is left out.
    pub fn parts(&self, range: DiskRange) -> Vec<Part<F>> {
        let state = lock(&self.0);
        let mut start = 0u64;
        let pieces = state.window.pieces(range.start, range.len);
        pieces
            .map(|piece| {
                let of_buffers = DiskRange {
                    start,
                    len: piece.len,
                };
                start = start.saturating_add(piece.len);
                Part {
                    file: Arc::clone(piece.file),
                    offset: piece.offset,
                    of_buffers,
                }
            })
            .collect()
    }
}
