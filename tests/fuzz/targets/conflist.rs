// SPDX-License-Identifier: Apache-2.0
//! The configuration of a network (conflist).
//!
//! What is accepted runs programs by their names only, and is kept as it is by the store.
#![no_main]

use bulkhead_network::fuzzing::{Conflist, subnets};

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(conflist) = Conflist::parse(text) {
        let stored = serde_json::to_string(&conflist).expect("a record");
        let read: Conflist = serde_json::from_str(&stored).expect("what was stored");
        assert_eq!(read, conflist);
        let json: serde_json::Value = serde_json::from_str(&stored).expect("JSON");
        for plugin in json["plugins"].as_array().expect("plugins") {
            let program = plugin["program"].as_str().expect("a program");
            assert!(
                !program.contains('/') && !matches!(program, "" | "." | ".."),
                "{program}"
            );
        }
        let name = &conflist.name;
        assert!(!name.contains('/') && !name.starts_with('.'), "{name}");
    }
    let _ = subnets(&[text.to_owned()]);
});
