// SPDX-License-Identifier: Apache-2.0
//! Many pods: in a row and at once, and nothing is left.

use bulkhead_tests::client::Client;
use bulkhead_tests::daemon::Daemon;
use bulkhead_tests::registry::Registry;

async fn whole_life(mut client: Client, name: String, image: String) {
    let pod = client.run_pod(&name).await.expect("run pod");
    let id = client
        .run_script(&pod, "main", &image, "echo I am $(hostname)")
        .await;
    assert_eq!(client.exited(&id).await.exit_code, 0);
    let log = client.log_until(&pod, "main", |log| !log.is_empty()).await;
    assert_eq!(log, format!("I am {name}\n"));
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_pods_in_a_row_and_five_at_once_leave_nothing() {
    let daemon = Daemon::start().await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    whole_life(client.clone(), "warm".into(), busybox.clone()).await;
    let before = daemon.census();
    for number in 0..20 {
        whole_life(client.clone(), format!("row-{number}"), busybox.clone()).await;
    }
    daemon.census().assert_equals(&before);
    let lives: Vec<_> = (0..5)
        .map(|number| {
            tokio::spawn(whole_life(
                client.clone(),
                format!("crowd-{number}"),
                busybox.clone(),
            ))
        })
        .collect();
    for life in lives {
        life.await.expect("a pod's life");
    }
    daemon.census().assert_equals(&before);
}
