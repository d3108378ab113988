// SPDX-License-Identifier: Apache-2.0
//! What registries say beside manifests: challenges (`WWW-Authenticate`), pauses (`Retry-After`), and errors.
#![no_main]

use std::time::{Duration, SystemTime};

use bulkhead_fuzz::input::Input;
use bulkhead_image::fuzzing::{Challenge, error_message, pause};
use reqwest::header::HeaderValue;

const MOST_MESSAGE_BYTES: usize = 2000;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    match input.below(3) {
        0 => {
            let Ok(text) = std::str::from_utf8(input.rest()) else {
                return;
            };
            let headers: Vec<&str> = text.lines().collect();
            if let Some(Challenge::Bearer { realm, .. }) = Challenge::parse(&headers) {
                assert!(
                    headers.iter().any(|header| header.contains(&realm)),
                    "{realm:?}"
                );
            }
        }
        1 => {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_953_600);
            if let Ok(value) = HeaderValue::from_bytes(input.rest()) {
                let _ = pause(&value, now);
            }
        }
        _ => {
            let message = error_message(input.rest());
            assert!(message.len() <= MOST_MESSAGE_BYTES, "{message}");
            assert!(!message.chars().any(char::is_control), "{message:?}");
        }
    }
});
