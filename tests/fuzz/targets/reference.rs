// SPDX-License-Identifier: Apache-2.0
//! Image references.
//!
//! What is accepted has one canonical text, which is a reference to the same image. Its parts can be parts of a URL.
#![no_main]

use bulkhead_image::Reference;

libfuzzer_sys::fuzz_target!(|text: &str| {
    let reference: Reference = match text.parse() {
        Ok(reference) => reference,
        Err(error) => {
            let said = error.to_string();
            assert!(said.len() <= 8000 && !said.contains('\n'), "{said}");
            return;
        }
    };
    let canonical = reference.to_string();
    assert_eq!(
        canonical.parse::<Reference>().as_ref(),
        Ok(&reference),
        "{canonical}"
    );
    for name in reference.repository.split('/') {
        assert!(!matches!(name, "" | "." | ".."), "{canonical}");
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "/_.-:@[]".contains(c);
    assert!(canonical.chars().all(plain), "{canonical}");
});
