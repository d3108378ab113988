// SPDX-License-Identifier: Apache-2.0
//! `bulkhead exec`: CRI's ExecSync.

use std::io::Write;

use bulkhead_proto::cri;

use super::client::{Client, failed};
use super::{CliError, exit_code};

/// Runs `command` in a container, prints its output when it has ended, and returns its exit code.
pub async fn exec(
    client: &mut Client,
    container: String,
    command: Vec<String>,
    timeout_seconds: i64,
) -> Result<u8, CliError> {
    let what = format!("exec in {container}");
    let request = cri::ExecSyncRequest {
        container_id: container,
        cmd: command,
        timeout: timeout_seconds,
    };
    let answer = client
        .runtime
        .exec_sync(request)
        .await
        .map_err(failed(what))?
        .into_inner();
    let written = std::io::stdout().write_all(&answer.stdout);
    written
        .and_then(|()| std::io::stdout().flush())
        .and_then(|()| std::io::stderr().write_all(&answer.stderr))
        .map_err(CliError::Output)?;
    Ok(exit_code(answer.exit_code))
}
