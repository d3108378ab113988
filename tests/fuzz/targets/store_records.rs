// SPDX-License-Identifier: Apache-2.0
//! Records of the state store, which a damaged disk or another version may have written.
//!
//! What is read is written and read again as the same.
#![no_main]

use bulkhead::fuzzing::{ContainerRecord, PodRecord};
use bulkhead_fuzz::input::Input;
use serde::Serialize;
use serde::de::DeserializeOwned;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    match input.below(2) {
        0 => {
            if let Some(record) = round_trip::<PodRecord>(input.rest()) {
                assert!(record.network().is_some() || record.held_addresses().is_empty());
            }
        }
        _ => {
            if let Some(record) = round_trip::<ContainerRecord>(input.rest()) {
                let resources = &record.spec.resources;
                let _ = (resources.cpu_limit_millis(), resources.cpu_request_millis());
            }
        }
    }
});

fn round_trip<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    let record: T = serde_json::from_slice(bytes).ok()?;
    let first = serde_json::to_value(&record).expect("a record that can be written");
    let again: T = serde_json::from_value(first.clone()).expect("a record that can be read");
    assert_eq!(serde_json::to_value(&again).expect("once more"), first);
    Some(record)
}
