// SPDX-License-Identifier: Apache-2.0
//! Which pods go where: what the configuration says, and nothing that a pod could choose by itself.

use std::path::Path;

use bulkhead_proto::cri::{NamespaceMode, NamespaceOption, PodSandboxStatusRequest};
use bulkhead_tests::client::{Client, Pod, assert_fails};
use bulkhead_tests::containerd::Release;
use tonic::Code;

use super::{Both, OWN_PROCESSES, pod_config};

const HOST: i32 = NamespaceMode::Node as i32;

/// Pods that share one of the host's namespaces, each with the word for it in a refusal.
fn shared() -> [(&'static str, NamespaceOption); 2] {
    let network = NamespaceOption {
        network: HOST,
        ..OWN_PROCESSES
    };
    [
        ("network", network),
        (
            "IPC",
            NamespaceOption {
                ipc: HOST,
                ..OWN_PROCESSES
            },
        ),
    ]
}

async fn handler_of(client: &mut Client, pod: &Pod) -> String {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: false,
    };
    let status = client.runtime.pod_sandbox_status(request).await;
    let status = status.expect("pod status").into_inner().status;
    status.expect("a status").runtime_handler
}

impl Both {
    /// Runs a pod and checks on which side it is. Then ends it.
    async fn runs(&mut self, handler: &str, namespaces: NamespaceOption, on_host: bool) {
        let config = pod_config(&self.client, "one", namespaces.clone());
        let pod = self.client.run_pod_by(handler, config).await;
        let pod = pod.unwrap_or_else(|error| panic!("{handler:?} {namespaces:?}: {error:?}"));
        assert_eq!(
            self.has_hosts_kernel(&pod).await,
            on_host,
            "{handler:?} {namespaces:?}"
        );
        assert_eq!(handler_of(&mut self.client, &pod).await, handler);
        self.client.end_pod(&pod).await;
        assert!(self.client.pod_ids().await.is_empty());
    }

    async fn refuses(&mut self, handler: &str, namespaces: NamespaceOption, words: &[&str]) {
        let config = pod_config(&self.client, "refused", namespaces);
        let refused = self.client.run_pod_by(handler, config).await;
        assert_fails(refused, Code::InvalidArgument, words);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_runs_where_its_handler_and_the_configuration_say() {
    for release in Release::ALL {
        let mut both = Both::start(release, "").await;
        both.client.pull(&both.busybox).await.expect("pull");
        both.runs("", OWN_PROCESSES, false).await;
        both.runs("runc", OWN_PROCESSES, true).await;
        both.refuses("nobody", OWN_PROCESSES, &["nobody", "bulkhead", "runc"])
            .await;
        for (word, namespaces) in shared() {
            both.runs("runc", namespaces.clone(), true).await;
            for handler in ["", "bulkhead"] {
                let words = ["host", word, "RuntimeClass"];
                both.refuses(handler, namespaces.clone(), &words).await;
            }
        }

        let config = both.containerd.config("host_namespaces_handler = \"runc\"");
        both.configure(&config).await;
        for (word, namespaces) in shared() {
            both.runs("", namespaces.clone(), true).await;
            both.refuses("bulkhead", namespaces, &["host", word]).await;
        }
        both.runs("", OWN_PROCESSES, false).await;

        let config = both.containerd.config("default_handler = \"runc\"");
        both.configure(&config).await;
        both.runs("", OWN_PROCESSES, true).await;
        both.runs("bulkhead", OWN_PROCESSES, false).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delegate_is_asked_for_the_handler_that_is_configured_for_it() {
    let mut both = Both::start(Release::New, "").await;
    let socket = both.containerd.socket();
    let config = format!(
        "[runtimes.trusted]\ncri = \"unix://{}\"\nhandler = \"second\"\n",
        socket.display()
    );
    both.configure(&config).await;
    both.client.pull(&both.busybox).await.expect("pull");
    let config = pod_config(&both.client, "one", OWN_PROCESSES);
    let pod = both
        .client
        .run_pod_by("trusted", config)
        .await
        .expect("run pod");
    assert_eq!(handler_of(&mut both.client, &pod).await, "trusted");
    let mut direct = both.containerd.client(Path::new("/nowhere")).await;
    assert_eq!(handler_of(&mut direct, &pod).await, "second");
    both.client.end_pod(&pod).await;
    both.refuses("runc", OWN_PROCESSES, &["runc", "bulkhead", "trusted"])
        .await;
}
