// SPDX-License-Identifier: Apache-2.0
//! crictl, used as by hand: the life of a pod, and streams over both transports.

use std::fs;
use std::process::{Command, Output, Stdio};

use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::node::client_program;
use bulkhead_tests::registry::{Registry, free_address};
use bulkhead_tests::wait::{PATIENCE, until};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn command(daemon: &Daemon, arguments: &[&str]) -> Command {
    let endpoint = format!("unix://{}", daemon.socket().display());
    let mut command = Command::new(client_program("crictl"));
    command
        .args([
            "--runtime-endpoint",
            &endpoint,
            "--image-endpoint",
            &endpoint,
        ])
        .args(["--timeout", "120s"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn crictl_fails(daemon: &Daemon, arguments: &[&str]) -> Output {
    command(daemon, arguments).output().expect("run crictl")
}

fn crictl(daemon: &Daemon, arguments: &[&str]) -> String {
    let output = crictl_fails(daemon, arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

fn parsed(daemon: &Daemon, arguments: &[&str]) -> Value {
    let said = crictl(daemon, arguments);
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {said}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn crictl_runs_a_pod_and_streams_over_both_transports() {
    let daemon = Daemon::start_with(Networking::Bridge, "").await;
    let busybox = Registry::shared().image("test/busybox");
    let write = |name: &str, config: Value| {
        let path = daemon.path(name).display().to_string();
        fs::write(&path, config.to_string()).expect("a configuration");
        path
    };
    let pod_config = write(
        "pod.json",
        json!({
            "metadata": {"name": "pod", "uid": "uid-pod", "namespace": "tests", "attempt": 1},
            "hostname": "by-hand",
            "log_directory": daemon.path("logs"),
            "linux": {},
        }),
    );
    let container_config = write(
        "container.json",
        json!({
            "metadata": {"name": "main"},
            "image": {"image": busybox},
            "command": ["sh", "-c", "echo hello; while read line; do echo \"read $line\"; done"],
            "log_path": "main.log",
            "stdin": true,
            "linux": {"resources": {"memory_limit_in_bytes": 67_108_864_i64}},
        }),
    );
    assert!(crictl(&daemon, &["version"]).contains("RuntimeName:  bulkhead"));
    let info = parsed(&daemon, &["info"]);
    let conditions = info["status"]["conditions"].as_array().expect("conditions");
    assert!(conditions.iter().all(|one| one["status"] == true), "{info}");
    crictl(&daemon, &["pull", &busybox]);
    assert!(crictl(&daemon, &["images"]).contains("test/busybox"));
    let image = parsed(&daemon, &["inspecti", &busybox]);
    assert_eq!(image["status"]["repoTags"][0], format!("{busybox}:latest"));

    let pod = crictl(&daemon, &["runp", &pod_config]);
    let pod = pod.trim();
    let id = crictl(&daemon, &["create", pod, &container_config, &pod_config]);
    let id = id.trim();
    crictl(&daemon, &["start", id]);
    assert_eq!(
        parsed(&daemon, &["inspectp", pod])["status"]["state"],
        "SANDBOX_READY"
    );
    let container = parsed(&daemon, &["inspect", id]);
    assert_eq!(
        container["status"]["state"], "CONTAINER_RUNNING",
        "{container}"
    );
    let limit = &container["status"]["resources"]["linux"]["memoryLimitInBytes"];
    assert_eq!(limit, "67108864", "{container}");
    let listed = crictl(&daemon, &["ps", "--quiet", "--no-trunc"]);
    assert_eq!(listed.trim(), id);

    let synchronous = crictl(&daemon, &["exec", "--sync", id, "hostname"]);
    // crictl prints a line of its own for each output.
    assert_eq!(synchronous.trim_end(), "by-hand");
    for transport in ["spdy", "websocket"] {
        streams(&daemon, pod, id, transport).await;
    }
    let log = crictl(&daemon, &["logs", id]);
    assert_eq!(log, "hello\nread over spdy\nread over websocket\n");
    assert_eq!(
        crictl(&daemon, &["logs", "--tail", "1", id]),
        "read over websocket\n"
    );

    let stats = parsed(&daemon, &["stats", "--output", "json", "--id", id]);
    let used = stats["stats"][0]["memory"]["workingSetBytes"]["value"].as_str();
    let used: u64 = used
        .and_then(|used| used.parse().ok())
        .expect("a working set");
    assert!(used > 0, "{stats}");
    let pods = parsed(&daemon, &["statsp", "--output", "json"]);
    assert_eq!(pods["stats"][0]["attributes"]["id"], pod, "{pods}");
    assert!(crictl(&daemon, &["metricsp"]).contains("container_memory_working_set_bytes"));
    crictl(&daemon, &["update", "--memory", "134217728", id]);
    let limit = crictl(&daemon, &["exec", id, "cat", "/sys/fs/cgroup/memory.max"]);
    assert_eq!(limit, "134217728\n");

    crictl(&daemon, &["stop", "--timeout", "1", id]);
    let ended = parsed(&daemon, &["inspect", id]);
    assert_eq!(ended["status"]["state"], "CONTAINER_EXITED", "{ended}");
    crictl(&daemon, &["rm", id]);
    crictl(&daemon, &["stopp", pod]);
    crictl(&daemon, &["rmp", pod]);
    assert_eq!(crictl(&daemon, &["pods", "--quiet"]), "");
    crictl(&daemon, &["rmi", &busybox]);
    assert!(!crictl(&daemon, &["images"]).contains("test/busybox"));
}

/// Exec, attach and port-forward with `crictl --transport`.
async fn streams(daemon: &Daemon, pod: &str, id: &str, transport: &str) {
    let line = "echo out; echo err >&2; exit 3";
    let ran = crictl_fails(
        daemon,
        &["exec", "--transport", transport, id, "sh", "-c", line],
    );
    assert_eq!(ran.stdout, b"out\n", "{transport}: {ran:?}");
    let errors = String::from_utf8_lossy(&ran.stderr);
    assert!(
        errors.contains("err\n") && errors.contains("exit code 3"),
        "{transport}: {errors}"
    );
    assert!(
        !ran.status.success(),
        "{transport}: crictl must pass the exit code on"
    );

    let arguments = [
        "exec",
        "--interactive",
        "--transport",
        transport,
        id,
        "head",
        "-c",
        "100000",
    ];
    let input = daemon.path("input");
    fs::write(&input, vec![b'x'; 100_000]).expect("input");
    let ran = command(daemon, &arguments)
        .stdin(fs::File::open(&input).expect("input"))
        .output()
        .expect("run crictl");
    assert_eq!(ran.stdout.len(), 100_000, "{transport}: {:?}", ran.stderr);

    // `crictl attach` does not end when its input ends. The log shows that the input arrived.
    fs::write(&input, format!("over {transport}\n")).expect("input");
    let mut attached = tokio::process::Command::from(command(
        daemon,
        &["attach", "--stdin", "--transport", transport, id],
    ));
    let mut attached = attached
        .stdin(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("run crictl");
    let mut stdin = attached.stdin.take().expect("input");
    let line = format!("over {transport}\n");
    stdin.write_all(line.as_bytes()).await.expect("type");
    let mut stdout = attached.stdout.take().expect("output");
    let mut seen = Vec::new();
    let answer = async {
        while !seen.ends_with(format!("read over {transport}\n").as_bytes()) {
            seen.push(stdout.read_u8().await.expect("output"));
        }
    };
    let answered = tokio::time::timeout(PATIENCE, answer).await;
    answered.unwrap_or_else(|_| panic!("attach over {transport} shows nothing"));
    attached.kill().await.expect("end crictl");

    let serve = "mkdir -p /page; echo a page >/page/index.html; httpd -p 127.0.0.1:7001 -h /page 2>/dev/null; true";
    crictl(daemon, &["exec", "--sync", id, "sh", "-c", serve]);
    let port = free_address().port();
    let mut forward = tokio::process::Command::from(command(
        daemon,
        &[
            "port-forward",
            "--transport",
            transport,
            pod,
            &format!("{port}:7001"),
        ],
    ));
    let _forward = forward.kill_on_drop(true).spawn().expect("run crictl");
    let what = format!("port-forward over {transport} answers");
    let page = until(&what, async || {
        page(port).await.map_err(|error| error.to_string())
    });
    let page = page.await;
    assert!(page.ends_with("a page\n"), "{transport}: {page}");
}

async fn page(port: u16) -> std::io::Result<String> {
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
    let mut page = String::new();
    stream.read_to_string(&mut page).await?;
    Ok(page)
}
