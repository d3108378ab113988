// SPDX-License-Identifier: Apache-2.0
//! The balloon: lists of pages that the guest gives back, whether it has them or not.
#![no_main]

use std::sync::Arc;

use bulkhead_fuzz::chains::drive;
use bulkhead_fuzz::input::Input;
use bulkhead_vmm::devices::balloon::Balloon;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let counters = Arc::default();
    let mut balloon = Balloon::new(Arc::clone(&counters));
    drive(
        &mut balloon,
        0,
        &mut Input::new(bytes),
        |balloon, _, input| {
            balloon.set_target(input.u32());
        },
    );
    let said = counters.snapshot();
    assert!(said.inflated_bytes.is_multiple_of(4096), "only whole pages");
    assert!(said.reported_bytes.is_multiple_of(4096), "only whole pages");
});
