// SPDX-License-Identifier: Apache-2.0
//! A hostile guest, hostile images and a hostile registry at the same time: the figures of issue 13.

use bulkhead_tests::table::Table;
use tokio::time::sleep;

use super::IDLE;
use super::guest;
use super::images::{self, Pulls};

#[tokio::test(flavor = "multi_thread")]
async fn all_do_their_worst_and_the_others_are_answered() {
    let registry = images::Hostile::start(images::hostile_images());
    let mut setting = guest::setting(&registry.config()).await;
    let mut table = Table::new("another client and a neighbour while all do their worst");
    setting.measured_idle(&mut table).await;

    let mut hostile = guest::Hostile::start(&setting).await;
    let attack = async {
        hostile.run("victim").await;
        for log in ["flood", "feeds", "bytes", "kinds"] {
            hostile.run(log).await;
        }
        for device in ["frames", "disk", "random", "sockets", "files"] {
            hostile.order(&["devices", device]).await;
        }
        hostile.order(&["news", "exits"]).await;
        sleep(IDLE).await;
    };
    setting.measured(&mut table, "hostile guest", attack).await;

    let name = "hostile guest, images and registry";
    let attack = async { Pulls::start(&setting.daemon, &registry).refused().await };
    setting.measured(&mut table, name, attack).await;
    table.finish();
    setting.client.end_pod(&hostile.pod).await;
    setting.client.end_pod(&setting.healthy).await;
}
