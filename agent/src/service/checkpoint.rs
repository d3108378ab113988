// SPDX-License-Identifier: Apache-2.0
//! `RestoreSandbox`: the sandbox's part and the containers' part, in an order in which a failure can be repaired.

use bulkhead_proto::agent::RestoreSandboxRequest;
use tonic::Status;

use crate::container::Containers;
use crate::sandbox::Sandbox;

/// Checks all of the request before it changes anything. Then the pod becomes another one, and only when it is that one,
/// its containers get their new ids, by which they can be started.
pub async fn restore(
    sandbox: &Sandbox,
    containers: &Containers,
    request: RestoreSandboxRequest,
) -> Result<(), Status> {
    let configuration = request
        .configuration
        .ok_or_else(|| Status::invalid_argument("no configuration is given"))?;
    let Some(mut restore) = containers.begin_restore(request.containers).await? else {
        // A repetition: the sandbox takes the new time and entropy, and refuses another identity.
        return Ok(sandbox.configure(configuration).await?);
    };
    sandbox.check_restore(&configuration).await?;
    restore.end_lease();
    sandbox.restore(configuration, restore.pids()).await?;
    Ok(restore.finish().await?)
}
