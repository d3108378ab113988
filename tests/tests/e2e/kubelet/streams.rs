// SPDX-License-Identifier: Apache-2.0
//! Exec, attach, port-forward and logs through kubelet's API, as the API server uses it.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use bulkhead_tests::node::{Node, PATIENCE, pod, script, with};
use bulkhead_tests::node_api::{is_ready, url_escape};
use bulkhead_tests::spdy::Process;
use bulkhead_tests::table::Table;
use bulkhead_tests::wait::try_until;
use serde_json::json;

const LINES: usize = 4000;

/// The path of an exec in the container `main` of the pod `streams`.
fn exec(command: &[&str], kinds: &[&str]) -> String {
    let mut path = String::from("exec/default/streams-node/main?");
    for word in command {
        path += &format!("command={}&", url_escape(word));
    }
    path + &flags(kinds)
}

fn flags(kinds: &[&str]) -> String {
    let flags = kinds.iter().map(|kind| match *kind {
        "stdin" => "input=1",
        "stdout" => "output=1",
        "stderr" => "error=1",
        "resize" => "tty=1",
        other => panic!("no stream is called {other}"),
    });
    flags.collect::<Vec<_>>().join("&")
}

/// Runs the clients of `websocket_clients.py` against kubelet.
async fn websockets(node: &Node, table: &mut Table) {
    let fails = ["sh", "-c", "echo out; echo err >&2; exit 3"];
    let all = ["stdin", "stdout", "stderr"];
    let paths = [
        ("v4-exit", exec(&fails, &all[1..])),
        ("v4-input", exec(&["head", "-c", "400000"], &all)),
        ("v4-terminal", exec(&["sh"], &["stdin", "stdout", "resize"])),
        ("v5-half-close", exec(&["wc", "-c"], &all)),
        ("base64", exec(&["cat"], &all)),
        (
            "ports",
            "portForward/default/streams-node?port=7001&port=7003".to_owned(),
        ),
        (
            "tunnel",
            "portForward/default/streams-node?port=7001&port=7003".to_owned(),
        ),
    ];
    for (name, path) in paths {
        let output = tokio::process::Command::new("/usr/bin/python3")
            .arg(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/tests/websocket_clients.py"
            ))
            .arg(node.certificate.path("certificate.pem"))
            .arg(format!("{name}=https://{}/{path}", node.api.address))
            .output();
        let output = output.await.expect("run Python");
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().unwrap_or("passed");
        table.row(&format!("WebSocket: {name}"), output.status.success(), last);
    }
}

/// Returns the number of a container's log files, and their joined text, oldest first.
fn all_logs(directory: &Path) -> (usize, String) {
    let mut files: Vec<_> = fs::read_dir(directory)
        .expect("the container's logs")
        .flatten()
        .map(|entry| entry.path())
        .collect();
    // Rotated files are 0.log.DATE and 0.log.DATE.gz. The file without a date is the newest.
    files.sort_by_key(|path| {
        (
            path.extension().is_some_and(|end| end == "log"),
            path.clone(),
        )
    });
    let mut text = String::new();
    for path in &files {
        let bytes = fs::read(path).expect("a log");
        if path.extension().is_some_and(|end| end == "gz") {
            let mut decoder = flate2::read::GzDecoder::new(&bytes[..]);
            decoder.read_to_string(&mut text).expect("a compressed log");
        } else {
            text += &String::from_utf8(bytes).expect("a log in text");
        }
    }
    (files.len(), text)
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_and_logs_pass_through_kubelet() {
    let settings = json!({
        "containerLogMaxSize": "40Ki", "containerLogMaxFiles": 20, "containerLogMonitorInterval": "3s",
    });
    let node = Node::start(settings).await;
    let httpd = "mkdir /page; echo a page >/page/index.html; httpd -p 127.0.0.1:7001 -h /page; exec sleep 10000";
    let reads = with(
        script(
            "reads",
            "while read line; do echo \"read $line\"; done; echo end",
        ),
        json!({"stdin": true}),
    );
    // Writes slowly enough for several rotations.
    let chatter = format!(
        "i=0; while [ $i -lt {LINES} ]; do echo line $i of a log that is rotated; i=$((i+1)); [ $((i % 100)) = 0 ] && sleep 0.4; done; while :; do echo the end; sleep 3; done"
    );
    let twice = "[ -e /work/once ] && { echo second; exec sleep 10000; }; touch /work/once; echo first; exit 1";
    let twice = with(
        script("twice", twice),
        json!({"volumeMounts": [{"name": "work", "mountPath": "/work"}]}),
    );
    node.apply(&pod(
        "streams",
        json!({
            "volumes": [{"name": "work", "emptyDir": {}}],
            "containers": [script("main", httpd), reads, script("chatter", &chatter), twice],
        }),
    ));
    let mut table = Table::new("kubelet: streams and logs");
    let ready = node
        .api
        .until("streams", PATIENCE, |pod| is_ready(pod).then_some(()))
        .await;
    ready.expect("the pod gets ready");

    // kubectl before 1.31 speaks SPDY, and so do other clients today.
    let url = node.api.url(&exec(
        &["sh", "-c", "cat; echo err >&2; exit 4"],
        &["stdin", "stdout", "stderr"],
    ));
    let mut process = Process::connect(&url, &["stdin", "stdout", "stderr"]).await;
    process.input(b"through SPDY").await;
    process.end_input().await;
    let seen = process.end().await;
    table.equal("SPDY: exec's output", seen.out().as_str(), "through SPDY");
    table.equal(
        "SPDY: exec's errors",
        seen.stderr.as_slice(),
        b"err\n".as_slice(),
    );
    table.row(
        "SPDY: exec's exit code",
        seen.status.contains("\"message\":\"4\""),
        &seen.status,
    );
    let path = "attach/default/streams-node/reads?input=1&output=1&error=1";
    let mut process = Process::connect(&node.api.url(path), &["stdin", "stdout", "stderr"]).await;
    process.input(b"something\n").await;
    process
        .until(|seen| seen.out().contains("read something\n"))
        .await;
    table.row("SPDY: attach", true, process.seen.out());
    websockets(&node, &mut table).await;
    let run = node
        .api
        .run("streams", "main", "cat /page/index.html")
        .await;
    table.equal("run", run.as_deref(), Ok("a page\n"));

    let logs = |query: &str| {
        let path = format!("containerLogs/default/streams-node/{query}");
        let api = &node.api;
        async move { api.get(&path).await.unwrap_or_else(|error| error) }
    };
    // The container repeats its last line, because a log that was just rotated is empty.
    let ended = "the end\n";
    let last = try_until("the last line is in the log", PATIENCE, async || {
        let last = logs("chatter?tailLines=1").await;
        if last == ended { Ok(last) } else { Err(last) }
    });
    let last = last.await.unwrap_or_else(|late| late.seen);
    table.equal("logs: the last line", last.as_str(), ended);
    table.equal(
        "logs: of an earlier run",
        logs("twice?previous=true").await.as_str(),
        "first\n",
    );
    table.equal(
        "logs: of this run",
        logs("twice").await.as_str(),
        "second\n",
    );
    let stamped = logs("twice?timestamps=true").await;
    table.row(
        "logs: with timestamps",
        stamped.starts_with("20") && stamped.ends_with("Z second\n"),
        stamped,
    );
    let uid = node.api.pod("streams").await["metadata"]["uid"].clone();
    let uid = uid.as_str().expect("a uid");
    let directory = node
        .path("logs")
        .join(format!("default_streams-node_{uid}/chatter"));
    let (files, text) = all_logs(&directory);
    table.row("logs: rotated", files >= 3, format!("{files} files"));
    let mut numbers = text
        .lines()
        .filter_map(|line| line.split_once(" F line ")?.1.split(' ').next());
    let whole = (0..LINES).all(|number| numbers.next() == Some(&number.to_string()));
    table.row(
        "logs: nothing lost, nothing twice",
        whole && numbers.next().is_none(),
        format!("{LINES} lines"),
    );

    // The command of `kubectl cp`.
    let tar = exec(
        &["tar", "cf", "-", "-C", "/page", "index.html"],
        &["stdout"],
    );
    let archive = Process::connect(&node.api.url(&tar), &["stdout"])
        .await
        .end()
        .await;
    let listed = list_archive(&archive.stdout);
    table.equal("an archive through exec", listed.as_str(), "index.html\n");
    table.finish();
    node.end().await;
}

fn list_archive(bytes: &[u8]) -> String {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("archive.tar");
    fs::write(&path, bytes).expect("an archive");
    let output = Command::new("tar")
        .arg("tf")
        .arg(path)
        .output()
        .expect("run tar");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
