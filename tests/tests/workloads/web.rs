// SPDX-License-Identifier: Apache-2.0
//! nginx, the web server most pods have.

use bulkhead_tests::workload::{Workload, get};

/// The file in the image: `line 0` to `line 199999`, each with its end.
const BIG_BYTES: usize = 2_288_890;

#[tokio::test(flavor = "multi_thread")]
async fn nginx() {
    let title = "nginx: serves files and an upstream, compresses, reloads without a pause, and ends when it has served";
    let mut work = Workload::start("nginx", title).await;
    let server = work.program("main", &["nginx", "-g", "daemon off;"]);
    let id = work.run(server).await;
    let address = work.address(&work.pod.clone()).await;
    let (head, body) = get(&address, 80, "/", "").await;
    let body = String::from_utf8_lossy(&body).into_owned();
    let right = head.starts_with("HTTP/1.1 200") && body.contains("Welcome to nginx!");
    work.row("GET from outside", right, body);
    let (_, body) = get(&address, 80, "/big.txt", "").await;
    let right = body.len() == BIG_BYTES && body.ends_with(b"\nline 199999\n");
    work.row(
        "a large file (sendfile)",
        right,
        format!("{} bytes", body.len()),
    );
    let (head, body) = get(&address, 80, "/big.txt", "Range: bytes=100-199\r\n").await;
    let right = head.contains(" 206 ") && body.len() == 100;
    work.row("a part of it", right, format!("{} bytes", body.len()));
    let (head, body) = get(&address, 80, "/big.txt", "Accept-Encoding: gzip\r\n").await;
    let head = head.to_lowercase();
    let right = head.contains("content-encoding: gzip") || body.starts_with(&[0x1f, 0x8b]);
    work.row("compressed", right, format!("{} bytes", body.len()));
    let (_, body) = get(&address, 80, "/up", "").await;
    let body = String::from_utf8_lossy(&body).into_owned();
    work.row(
        "an upstream behind a socket",
        body == "from the upstream\n",
        body,
    );
    let line = "echo 'server { listen 8081; return 200 \"new\\n\"; }' >/etc/nginx/conf.d/new.conf && nginx -t && \
        nginx -s reload";
    work.says("nginx -s reload", &id, line, |said| {
        said.contains("test is successful")
    })
    .await;
    let (_, body) = get(&address, 8081, "/", "").await;
    let body = String::from_utf8_lossy(&body).into_owned();
    work.row("the new configuration", body == "new\n", body);
    let log = work.log("main").await;
    let lines = log.lines().filter(|line| line.contains("GET /big.txt"));
    let lines = lines.count();
    work.row("requests in the container's log", lines == 3, lines);
    // The image's signal is SIGQUIT.
    work.client.stop(&id, 60).await.expect("stop");
    let code = work.client.exited(&id).await.exit_code;
    work.row("it ends by its own signal", code == 0, code);
    work.finish().await;
}
