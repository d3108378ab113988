// SPDX-License-Identifier: Apache-2.0
//! What docs/kubernetes.md tells people to write: tests do the same, word for word.

const PAGE: &str = include_str!("../../docs/kubernetes.md");
/// The image of the page's pod. Tests have another in its place, because they reach no registry outside.
pub const IMAGE: &str = "docker.io/library/busybox:stable";

/// Finds the code block of the page after the first mention of a file.
pub fn block(file: &str) -> String {
    let after = PAGE.split_once(&format!("`{file}`"));
    let (_, after) = after.unwrap_or_else(|| panic!("docs/kubernetes.md names no {file}"));
    let (_, fence) = after.split_once("\n```").expect("a block");
    let (_, text) = fence.split_once('\n').expect("its text");
    let (text, _) = text.split_once("\n```").expect("its end");
    format!("{text}\n")
}
