// SPDX-License-Identifier: Apache-2.0
//! Makes untrusted text safe to show, such as that of a guest, a registry or a plugin.
//!
//! Control characters must be removed because they can move the cursor of a terminal and forge lines of a log.

/// Removes control characters, except line feeds and tabs.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control() || matches!(c, '\n' | '\t'))
        .collect()
}

/// Replaces each control character by a space, so that the text stays on one line.
#[must_use]
pub fn one_line(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}

/// The beginning of a text, at most `most_bytes` long. It never ends in the middle of a character.
#[must_use]
pub fn cut(text: &str, most_bytes: usize) -> &str {
    let end = text.floor_char_boundary(most_bytes);
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_left_out_and_lines_stay() {
        assert_eq!(printable("\x1b[2Jone\r\n\ttwo\x07é"), "[2Jone\n\ttwoé");
    }

    #[test]
    fn a_line_stays_one_line() {
        assert_eq!(one_line("one\ntwo\x1b[0m"), "one two [0m");
    }

    #[test]
    fn a_cut_text_ends_with_a_whole_character() {
        assert_eq!(cut("éé", 3), "é");
        assert_eq!(cut("éé", 4), "éé");
        assert_eq!(cut("éé", 100), "éé");
        assert_eq!(cut("éé", 0), "");
    }
}
