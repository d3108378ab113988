// SPDX-License-Identifier: Apache-2.0
//! Exec, attach, port-forward and logs of a delegate's container. The URLs are the delegate's own.

use bulkhead_proto::cri::ReopenContainerLogRequest;
use bulkhead_tests::client::{PATIENCE, container};
use bulkhead_tests::containerd::Release;
use bulkhead_tests::spdy::{self, Frame, Process};
use tokio::time::timeout;

use super::Both;

#[tokio::test(flavor = "multi_thread")]
async fn a_delegates_containers_are_reached_by_the_urls_that_it_gives() {
    for release in Release::ALL {
        let mut both = Both::start(release, "").await;
        both.client.pull(&both.busybox).await.expect("pull");
        let (pod, id) = both.sleeper("runc", "beside").await;
        let client = &mut both.client;

        let answer = client.exec(&id, &["sh", "-c", "echo out; exit 3"], 0).await;
        let answer = answer.expect("exec");
        assert_eq!(
            (answer.exit_code, answer.stdout.as_slice()),
            (3, &b"out\n"[..])
        );

        let kinds = ["stdin", "stdout", "stderr"];
        let command = ["sh", "-c", "wc -c; echo err >&2; exit 7"];
        let url = client.exec_url(&id, &command, &kinds).await.expect("exec");
        let mut process = Process::connect(&url, &kinds).await;
        process.input(&vec![b'x'; 300_000]).await;
        process.end_input().await;
        let outcome = timeout(PATIENCE, process.end()).await.expect("an end");
        assert_eq!(outcome.out().trim(), "300000");
        assert_eq!(outcome.stderr, b"err\n");
        assert!(outcome.status.contains("\"7\""), "{outcome:?}");

        let mut config = container(
            "reads",
            &both.busybox,
            &["sh", "-c", "read x; echo got $x; sleep 1000"],
        );
        config.stdin = true;
        let reads = client.create(&pod, config).await.expect("create");
        client.start(&reads).await.expect("start");
        let kinds = ["stdin", "stdout", "stderr"];
        let url = client.attach_url(&reads, &kinds).await.expect("attach");
        let mut process = Process::connect(&url, &kinds).await;
        process.input(b"words\n").await;
        process.until(|seen| seen.out().contains("got words")).await;

        let script = "echo a page > /tmp/index.html; httpd -p 7001 -h /tmp";
        client.shell(&id, script).await;
        let url = client.port_forward_url(&pod.id, &[]).await.expect("URL");
        let connected = spdy::connect(&url, &["portforward.k8s.io"]).await;
        let (mut sender, mut receiver) = connected.expect("an upgrade");
        let headers = |kind| [("streamtype", kind), ("port", "7001"), ("requestid", "0")];
        let error = spdy::open_with(&mut sender, &mut receiver, &headers("error")).await;
        sender.fin(error).await.expect("end the error stream");
        let data = spdy::open_with(&mut sender, &mut receiver, &headers("data")).await;
        let request = b"GET / HTTP/1.0\r\n\r\n";
        sender.data(data, request).await.expect("send");
        let mut page = Vec::new();
        while !page.ends_with(b"a page\n") {
            let frame = timeout(PATIENCE, receiver.next_but_windows()).await;
            match frame.expect("a frame in time") {
                Some(Frame::Data { stream, bytes, .. }) if stream == data => page.extend(bytes),
                Some(_) => {}
                None => panic!("the connection ended after {page:?}"),
            }
        }

        client
            .log_until(&pod, "main", |log| log.contains("started"))
            .await;
        let log = client.log_path(&pod, "reads");
        std::fs::rename(&log, log.with_extension("old")).expect("rotate the log");
        let request = ReopenContainerLogRequest {
            container_id: reads.clone(),
        };
        let reopened = client.runtime.reopen_container_log(request).await;
        reopened.expect("reopen the log");
        assert!(log.exists());
        client.end_pod(&pod).await;
    }
}
