// SPDX-License-Identifier: Apache-2.0
//! Text of a guest's, for people: printable and not long.

use bulkhead_text::{cut, printable};

/// The longest text that is passed on.
const TEXT_BYTES: usize = 4096;

/// Guest text that may be shown.
pub fn bounded(text: &str) -> String {
    cut(&printable(text), TEXT_BYTES).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_text_is_cut_at_a_character_and_cleaned() {
        let text = bounded(&"é\x07".repeat(5000));
        assert_eq!(text.len(), TEXT_BYTES);
        assert!(!text.contains('\x07'));
    }
}
