// SPDX-License-Identifier: Apache-2.0
//! A daemon with a healthy pod that must not suffer, and how long it and another client wait during an attack.

use bulkhead_tests::client::{Client, Pod};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::table::Table;
use bulkhead_tests::watch::Watch;
use tokio::time::sleep;

use super::IDLE;

/// A daemon with a healthy pod and, since it was started again, another configuration for new ones.
pub struct Setting {
    pub daemon: Daemon,
    pub client: Client,
    pub healthy: Pod,
    /// A container of the healthy pod.
    pub neighbour: String,
    pub busybox: String,
}

impl Setting {
    /// `config` makes the configuration with which the daemon is started again.
    pub async fn new(config: impl FnOnce(&Daemon) -> String) -> Self {
        let mut daemon = Daemon::start().await;
        let mut client = daemon.client().await;
        let busybox = Registry::shared().image("test/busybox");
        client.pull(&busybox).await.expect("pull");
        let healthy = client.run_pod("healthy").await.expect("run pod");
        let sleeping = "exec sleep 10000";
        let neighbour = client
            .run_script(&healthy, "main", &busybox, sleeping)
            .await;
        let config = config(&daemon);
        daemon.restart_with(Networking::Bridge, &config).await;
        let client = daemon.client().await;
        Self {
            daemon,
            client,
            healthy,
            neighbour,
            busybox,
        }
    }

    /// Measures during one attack. Returns what it returns.
    pub async fn measured<T>(
        &self,
        table: &mut Table,
        name: &str,
        attack: impl Future<Output = T>,
    ) -> T {
        let watch = Watch::over(&self.daemon, Some(&self.neighbour)).await;
        let done = attack.await;
        let seen = watch.end().await;
        // At once too, because a test that fails later does not come to its table.
        println!("{name}: {seen}");
        table.row(name, seen.is_bounded(), seen);
        done
    }

    /// Measures while nothing attacks.
    pub async fn measured_idle(&self, table: &mut Table) {
        self.measured(table, "idle", sleep(IDLE)).await;
    }
}
