// SPDX-License-Identifier: Apache-2.0
//! `bulkhead templates`: prints what VMs are forked from, how VMs of this daemon began, how many are ready for pods to
//! come, and how many pods began as warmed ones.

use bulkhead_proto::cri;

use super::CliError;
use super::client::{Client, failed};
use super::list::{headings, table};
use crate::pod::templates::Status;
use crate::pod::{spares, warmed};

const MIB: u64 = 1 << 20;

/// Asks the daemon for its templates. `None` if it is of an earlier version.
pub async fn ask(client: &mut Client) -> Result<Option<Status>, CliError> {
    let details = details(client).await?;
    Ok(serde_json::from_value(details["templates"].clone()).ok())
}

/// The daemon's configuration and state, as JSON.
pub(super) async fn details(client: &mut Client) -> Result<serde_json::Value, CliError> {
    let request = cri::StatusRequest { verbose: true };
    let answer = client.runtime.status(request).await;
    let answer = answer.map_err(failed("status of the daemon"))?.into_inner();
    let details = answer.info.get("config").map(String::as_str);
    Ok(serde_json::from_str(details.unwrap_or_default()).unwrap_or_default())
}

/// Prints a row for each template, and the counts.
pub async fn print(client: &mut Client) -> Result<(), CliError> {
    let details = details(client).await?;
    let Ok(status) = serde_json::from_value::<Status>(details["templates"].clone()) else {
        println!("The daemon knows no templates; it is of an earlier version.");
        return Ok(());
    };
    print!("{}", table(&rows(&status)));
    println!("{}", status.sentence());
    if let Ok(spares) = serde_json::from_value::<spares::Status>(details["spares"].clone()) {
        println!("{}", spares.sentence());
    }
    if let Ok(warmed) = serde_json::from_value::<warmed::Status>(details["warmed"].clone()) {
        println!("{}", warmed.sentence());
    }
    Ok(())
}

fn rows(status: &Status) -> Vec<Vec<String>> {
    let mut rows = vec![headings(&["MEMORY", "NAMESPACE", "TAKES"])];
    rows.extend(status.templates.iter().map(|template| {
        let namespace = match template.namespace.as_str() {
            "" => "(all)",
            name => name,
        };
        vec![
            format!("{} MiB", template.memory_mib),
            namespace.to_owned(),
            format!("{} MiB", template.bytes / MIB),
        ]
    }));
    rows
}
