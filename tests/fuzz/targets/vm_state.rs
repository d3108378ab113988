// SPDX-License-Identifier: Apache-2.0
//! States of VMs, which a damaged disk or a stranger may have written: as they are, or with a header that is right.
//!
//! What is read is written again as the same bytes. Whether it can go on here is an answer, whatever it contains.
#![no_main]

use bulkhead_fuzz::input::Input;
use bulkhead_vmm::state::State;
use bulkhead_vmm::state::fuzzing::{host, seal};

const KERNEL: [u8; 32] = [0; 32];

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let bytes = match input.below(2) {
        0 => input.rest().to_vec(),
        _ => seal(input.rest()),
    };
    let Ok(state) = State::read(bytes.as_slice()) else {
        return;
    };
    assert_eq!(state.write().expect("a state that can be written"), bytes);
    let host = host().expect("a host");
    for vcpus in 0..3 {
        if let Err(refusal) = state.check(&host, KERNEL, vcpus) {
            assert!(refusal.to_string().len() < 1000, "{refusal}");
        }
    }
});
