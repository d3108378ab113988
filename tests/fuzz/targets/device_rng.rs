// SPDX-License-Identifier: Apache-2.0
//! The random source: chains of any form.
#![no_main]

use bulkhead_fuzz::chains::drive;
use bulkhead_fuzz::input::Input;
use bulkhead_vmm::devices::rng::Rng;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut rng = Rng::new(std::io::repeat(7), Default::default());
    drive(&mut rng, 0, &mut Input::new(bytes), |_, _, _| ());
});
