// SPDX-License-Identifier: Apache-2.0
//! Errors of CNI, and how a plugin reports its own (the CNI specification 1.1.0, "Error").

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_text::one_line;
use serde_json::Value;

use super::process::Ended;

/// How much of a plugin's output is shown in an error.
const SAID_BYTES: usize = 500;
/// "Try again later" (CNI 1.1.0, "Error").
const TRY_AGAIN: u64 = 11;

/// An error in CNI's configuration or from a plugin.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    #[error("read {path}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} is not a CNI configuration: {why}")]
    Configuration { path: PathBuf, why: String },
    #[error("plugin {plugin} is in none of the plugin directories")]
    Missing { plugin: String },
    #[error("no version that network {network} allows is supported by all its plugins")]
    Versions { network: String },
    #[error("run plugin {plugin}")]
    Run {
        plugin: String,
        source: std::io::Error,
    },
    #[error("plugin {plugin} did not finish {command} in {limit:?} and was killed")]
    Late {
        plugin: String,
        command: &'static str,
        limit: Duration,
    },
    #[error("plugin {plugin} failed {command}: {said}")]
    Failed {
        plugin: String,
        command: &'static str,
        /// The plugin's error code, if it sent one.
        code: Option<u64>,
        said: String,
    },
    #[error("plugin {plugin} answered {command} with {why}")]
    Answer {
        plugin: String,
        command: &'static str,
        why: String,
    },
}

impl CniError {
    /// Whether the plugin asks to try again later.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Failed { code: Some(code), .. } if *code == TRY_AGAIN)
    }
}

/// Reads a failed plugin's error code and message. It should write them as JSON to standard output (CNI 1.1.0,
/// "Error"), but some write only to standard error.
pub fn failure(ended: &Ended) -> (Option<u64>, String) {
    let error: Option<Value> = serde_json::from_slice(&ended.output).ok();
    let field = |key: &str| error.as_ref().and_then(|error| error.get(key));
    let word = |key: &str| {
        excerpt(
            field(key)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .as_bytes(),
        )
    };
    let code = field("code").and_then(Value::as_u64);
    let coded = code.map(|code| format!("code {code}")).unwrap_or_default();
    let unread = if error.is_none() {
        excerpt(&ended.output)
    } else {
        String::new()
    };
    let told = [
        coded,
        word("msg"),
        word("details"),
        unread,
        excerpt(&ended.complaint),
    ];
    let told: Vec<_> = told.into_iter().filter(|text| !text.is_empty()).collect();
    if told.is_empty() {
        return (code, ended.status.to_string());
    }
    (code, told.join(": "))
}

/// The beginning of some output, on one line.
pub fn excerpt(bytes: &[u8]) -> String {
    let end = bytes.len().min(SAID_BYTES);
    let text = String::from_utf8_lossy(bytes.get(..end).unwrap_or_default());
    one_line(&text).trim().to_owned()
}
