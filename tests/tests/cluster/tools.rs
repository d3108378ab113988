// SPDX-License-Identifier: Apache-2.0
//! kubectl's tools on a running pod, each through the API server and kubelet.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use bulkhead_tests::cluster::{
    Namespace, Running, cluster, either, image, object, script, spec, with_input,
};
use bulkhead_tests::table::Table;
use serde_json::json;

/// Prints a line each second, ten in all, beside a server.
const LINE: &str = "mkdir /www; echo served >/www/index.html; httpd -p 8080 -h /www
    for i in 1 2 3 4 5 6 7 8 9 10; do echo line $i; sleep 1; done
    trap 'exit 0' TERM; sleep 100000 & wait";

/// Prepares a namespace with a pod of two containers, and returns it when they run.
fn running(name: &str) -> Namespace {
    let own = Namespace::new(name);
    let containers = json!([
        script(
            "main",
            LINE,
            json!({"env": [{"name": "WHO", "value": "main"}]})
        ),
        script(
            "other",
            "exec sleep 100000",
            json!({"env": [{"name": "WHO", "value": "other"}]})
        ),
    ]);
    own.apply(&[object(
        "Pod",
        "tools",
        json!({"spec": spec(containers, json!({}))}),
    )]);
    own.until_ready("tools");
    own
}

#[test]
fn exec_cp_and_logs() {
    let own = running("exec");
    let mut table = Table::new("cluster: kubectl exec, cp, logs");
    let follow = own.start(&["logs", "-f", "tools", "-c", "main"]);

    let seen = own.kubectl(&[
        "exec",
        "tools",
        "-c",
        "other",
        "--",
        "sh",
        "-c",
        "echo $WHO",
    ]);
    table.equal("exec in a container", seen, Ok("other\n".into()));
    let seen = own
        .command(&["exec", "tools", "-c", "main", "--", "sh", "-c", "exit 42"])
        .status();
    table.equal(
        "exit code",
        seen.ok().and_then(|status| status.code()),
        Some(42),
    );
    let seen = with_input(
        &mut own.command(&["exec", "-i", "tools", "-c", "main", "--", "wc", "-c"]),
        &"x".repeat(100_000),
    );
    table.equal(
        "standard input",
        String::from_utf8_lossy(&seen.stdout).trim().to_owned(),
        "100000".to_owned(),
    );

    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path().join("here");
    let back = directory.path().join("back");
    let content: Vec<u8> = (0..1_000_000_u32)
        .flat_map(u32::to_le_bytes)
        .take(1_000_000)
        .collect();
    std::fs::write(&here, &content).expect("a file");
    let copied = own.kubectl(&[
        "cp",
        "-c",
        "main",
        &here.display().to_string(),
        "tools:/tmp/there",
    ]);
    table.row("cp into the pod", copied.is_ok(), format!("{copied:?}"));
    let copied = own.kubectl(&[
        "cp",
        "-c",
        "main",
        "tools:/tmp/there",
        &back.display().to_string(),
    ]);
    let same = std::fs::read(&back).is_ok_and(|seen| seen == content);
    table.row(
        "cp back: the same bytes",
        same,
        format!("{:?}", copied.map(|_| content.len())),
    );

    let mut follow = follow;
    let output = follow.0.stdout.take().expect("kubectl's output");
    let mut lines = BufReader::new(output).lines().map_while(Result::ok);
    let seen: Vec<_> = lines.by_ref().take(10).collect();
    let expected: Vec<_> = (1..=10).map(|i| format!("line {i}")).collect();
    table.equal("logs -f", seen, expected);
    let seen = own.get(&["logs", "tools", "-c", "main", "--tail=2"]);
    table.equal("logs --tail", seen.as_str(), "line 9\nline 10\n");
    own.get(&["delete", "pod", "tools"]);
    table.equal("logs -f ends with the pod", lines.next(), None);
    table.finish();
}

/// Starts a port-forward and returns the address that it listens on.
fn forward(own: &Namespace) -> (Running, String) {
    let mut running = own.start(&["port-forward", "pod/tools", ":8080"]);
    // It stays open: kubectl ends when it cannot say that it handles a connection.
    let output = running.0.stdout.as_mut().expect("kubectl's output");
    let mut line = String::new();
    BufReader::new(output)
        .read_line(&mut line)
        .expect("its first line");
    let address = line
        .split_whitespace()
        .nth(2)
        .unwrap_or_default()
        .to_owned();
    (running, address)
}

fn served(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.lines().last().unwrap_or_default().to_owned())
}

#[test]
fn debug_port_forward_run_and_top() {
    let own = running("debug");
    let mut table = Table::new("cluster: kubectl debug, port-forward, run, top");
    let busybox = image("test/busybox");

    // An ephemeral container that sees the processes and the network of another.
    let line = "ps | grep -q '[h]ttpd -p 8080' && echo sees httpd; wget -qO- http://127.0.0.1:8080/; cat /proc/1/root/www/index.html";
    let debug = [
        "debug",
        "tools",
        "--image",
        &busybox,
        "--image-pull-policy=IfNotPresent",
        "--target=main",
        "-c",
        "debugger",
        "--profile=general",
        "--",
        "sh",
        "-c",
        line,
    ];
    let started = own.kubectl(&debug);
    table.row("debug", started.is_ok(), either(started));
    let ended = own.until("the ephemeral container has ended", || {
        let pod = own.object("pod", "tools");
        let state = pod["status"]["ephemeralContainerStatuses"][0]["state"]["terminated"].clone();
        state.is_object().then_some(state)
    });
    table.equal("its exit code", ended["exitCode"].clone(), json!(0));
    let log = own.get(&["logs", "tools", "-c", "debugger"]);
    let right = log.starts_with("sees httpd") && log.matches("served").count() == 2;
    table.row("it sees main's processes, network and files", right, &log);

    let copy = [
        "debug",
        "tools",
        "--copy-to=copy",
        "--container=main",
        "--image-pull-policy=IfNotPresent",
        "--",
        "sh",
        "-c",
        "echo a copy of $WHO; sleep 10000",
    ];
    let copied = own.kubectl(&copy);
    table.row("debug --copy-to", copied.is_ok(), either(copied));
    let log = own.until("the copy speaks", || {
        let log = own.kubectl(&["logs", "copy", "-c", "main"]).ok()?;
        log.contains("copy").then_some(log)
    });
    table.equal(
        "the copy runs another command",
        log.as_str(),
        "a copy of main\n",
    );

    let (forwarded, address) = forward(&own);
    let seen = served(&address).map_err(|error| error.to_string());
    table.equal("port-forward", seen, Ok("served".into()));
    drop(forwarded);

    let overrides = format!(
        "{{\"spec\": {{\"runtimeClassName\": \"{}\"}}}}",
        bulkhead_tests::cluster::RUNTIME_CLASS
    );
    let run = [
        "run",
        "once",
        "-i",
        "--rm",
        "--quiet",
        "--restart=Never",
        "--pod-running-timeout=5m",
        "--image",
        &busybox,
        "--image-pull-policy=IfNotPresent",
        "--overrides",
        &overrides,
        "--",
        "sh",
        "-c",
        "read line; echo got $line",
    ];
    let seen = with_input(&mut own.command(&run), "this\n");
    let out = String::from_utf8_lossy(&seen.stdout).into_owned();
    table.row(
        "run -i --rm (attach)",
        out.contains("got this"),
        format!("{out:?} {}", seen.status),
    );

    let top = own.until("there are metrics of the pod", || {
        own.kubectl(&["top", "pod", "tools", "--containers", "--no-headers"])
            .ok()
    });
    let rows: Vec<Vec<&str>> = top
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let memory = |row: &[&str]| {
        row.get(3)
            .and_then(|text| text.trim_end_matches("Mi").parse::<u64>().ok())
    };
    let right = rows.len() >= 2 && rows.iter().all(|row| memory(row).is_some());
    table.row("top pod --containers", right, &top);
    let top = cluster(&["top", "node", "--no-headers"]);
    table.row(
        "top node",
        top.as_ref().is_ok_and(|text| text.contains('%')),
        either(top),
    );
    table.finish();
}
