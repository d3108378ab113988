// SPDX-License-Identifier: Apache-2.0
//! A hostile guest, hostile images and a hostile registry at the same time: the figures of issue 13.

use bulkhead_tests::table::Table;
use bulkhead_tests::watch::Watch;
use tokio::time::sleep;

use super::IDLE;
use super::guest;
use super::images::{self, Pulls};

#[tokio::test(flavor = "multi_thread")]
async fn all_do_their_worst_and_the_others_are_answered() {
    let registry = images::Hostile::start(images::hostile_images());
    let mut setting = guest::Setting::new(&registry.config()).await;
    let mut table = Table::new("another client and a neighbour while all do their worst");
    let watch = Watch::over(&setting.daemon, Some(&setting.neighbour)).await;
    sleep(IDLE).await;
    let seen = watch.end().await;
    table.row("idle", seen.is_bounded(), seen);

    let mut hostile = guest::Hostile::start(&setting).await;
    let watch = Watch::over(&setting.daemon, Some(&setting.neighbour)).await;
    hostile.run("victim").await;
    for log in ["flood", "feeds", "bytes", "kinds"] {
        hostile.run(log).await;
    }
    for device in ["frames", "disk", "random", "sockets", "files"] {
        hostile.order(&["devices", device]).await;
    }
    hostile.order(&["news", "exits"]).await;
    sleep(IDLE).await;
    let seen = watch.end().await;
    table.row("hostile guest", seen.is_bounded(), seen);

    let watch = Watch::over(&setting.daemon, Some(&setting.neighbour)).await;
    Pulls::start(&setting.daemon, &registry).refused().await;
    let seen = watch.end().await;
    table.row(
        "hostile guest, images and registry",
        seen.is_bounded(),
        seen,
    );
    table.finish();
    setting.client.end_pod(&hostile.pod).await;
    setting.client.end_pod(&setting.healthy).await;
}
