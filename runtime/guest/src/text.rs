// SPDX-License-Identifier: Apache-2.0
//! Makes text from a guest safe to show: printable, and not too long.

use bulkhead_text::{cut, printable};

/// The longest text that is shown.
const TEXT_BYTES: usize = 4096;

/// Removes control characters from a guest's text, and cuts it if it is too long.
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
