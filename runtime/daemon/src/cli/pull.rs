// SPDX-License-Identifier: Apache-2.0
//! `bulkhead pull`, with a progress bar if the output is a terminal.

use std::time::Duration;

use bulkhead_proto::cri;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;

use super::CliError;
use super::client::{Client, failed, image_spec};
use crate::cri::PULL_INFO;

/// How often to ask for the progress.
const LOOK: Duration = Duration::from_millis(150);
const BAR: &str = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}";

/// The progress of a running pull, from a verbose `ImageStatus`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Progress {
    received_bytes: u64,
    total_bytes: u64,
}

/// Pulls `image` and returns its id.
pub async fn pull(client: &Client, image: &str) -> Result<String, CliError> {
    let bar = ProgressBar::no_length().with_message(image.to_owned());
    if let Ok(style) = ProgressStyle::with_template(BAR) {
        bar.set_style(style);
    }
    let mut images = client.images.clone();
    let request = cri::PullImageRequest {
        image: Some(image_spec(image)),
        ..Default::default()
    };
    let pulled = tokio::select! {
        pulled = images.pull_image(request) => pulled,
        () = watch(client.clone(), image, &bar) => unreachable!("watching has no end"),
    };
    bar.finish_and_clear();
    Ok(pulled.map_err(failed("pull"))?.into_inner().image_ref)
}

async fn watch(mut client: Client, image: &str, bar: &ProgressBar) {
    loop {
        tokio::time::sleep(LOOK).await;
        let request = cri::ImageStatusRequest {
            image: Some(image_spec(image)),
            verbose: true,
        };
        // Errors are ignored: this is only for the progress bar, and the pull itself reports what is wrong.
        let Ok(answer) = client.images.image_status(request).await else {
            continue;
        };
        let info = answer.into_inner().info;
        let progress = info
            .get(PULL_INFO)
            .and_then(|text| serde_json::from_str::<Progress>(text).ok());
        if let Some(progress) = progress.filter(|progress| progress.total_bytes > 0) {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.received_bytes);
        }
    }
}
