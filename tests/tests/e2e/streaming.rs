// SPDX-License-Identifier: Apache-2.0
//! Exec, attach and port-forward, over SPDY by the client in `bulkhead_tests::spdy` and over WebSocket by Python
//! clients.

use std::process::Stdio;
use std::time::{Duration, Instant};

use bulkhead_proto::cri::{AttachRequest, ExecRequest};
use bulkhead_tests::certificate::Certificate;
use bulkhead_tests::client::{Client, Pod, assert_fails, container};
use bulkhead_tests::daemon::{Daemon, Networking};
use bulkhead_tests::registry::Registry;
use bulkhead_tests::spdy::{self, Frame, Outcome, Process};
use bulkhead_tests::wait::{PATIENCE, until, whether};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::time::timeout;
use tonic::Code;

const ALL: [&str; 3] = ["stdin", "stdout", "stderr"];
const OUTPUT: [&str; 2] = ["stdout", "stderr"];
const TERMINAL: [&str; 3] = ["stdin", "stdout", "resize"];
const SUCCESS: &str = "\"status\":\"Success\"";

async fn pod() -> (Daemon, Client, Pod, String) {
    let daemon = Daemon::start_with(Networking::Loopback, "").await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let pod = client.run_pod("pod").await.expect("run pod");
    (daemon, client, pod, busybox)
}

/// Runs a pod with a container that sleeps. The last value is the container's id.
async fn sleeper() -> (Daemon, Client, Pod, String) {
    let (daemon, mut client, pod, busybox) = pod().await;
    let id = client
        .run_script(&pod, "main", &busybox, "exec sleep 10000")
        .await;
    (daemon, client, pod, id)
}

async fn exec(client: &mut Client, id: &str, command: &[&str], kinds: &[&str]) -> Process {
    let url = client.exec_url(id, command, kinds).await.expect("exec");
    Process::connect(&url, kinds).await
}

async fn shell(client: &mut Client, id: &str, line: &str, kinds: &[&str]) -> Process {
    exec(client, id, &["sh", "-c", line], kinds).await
}

/// Reads until the server closes the connection, with a time limit.
async fn end(process: Process) -> Outcome {
    let ended = timeout(PATIENCE, process.end()).await;
    ended.expect("the session should have ended")
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_carries_three_streams_and_the_exit_code() {
    let (_daemon, mut client, pod, id) = sleeper().await;
    let line = "echo out; echo err >&2; exit 3";
    let outcome = end(shell(&mut client, &id, line, &OUTPUT).await).await;
    assert_eq!(outcome.stdout, b"out\n");
    assert_eq!(outcome.stderr, b"err\n");
    assert!(outcome.status.contains("NonZeroExitCode"), "{outcome:?}");
    assert!(outcome.status.contains("\"message\":\"3\""), "{outcome:?}");

    // Half-close: `wc` prints its count only once its input has ended.
    let mut count = exec(&mut client, &id, &["wc", "-c"], &ALL).await;
    let input = vec![b'x'; 3_000_000];
    count.input(&input).await;
    count.end_input().await;
    let outcome = end(count).await;
    assert_eq!(outcome.out().trim(), "3000000");
    assert!(outcome.status.contains(SUCCESS), "{outcome:?}");

    // All output arrives before the exit code, and none is lost.
    let mut big = shell(&mut client, &id, "head -c 5000000 /dev/zero", &OUTPUT).await;
    big.until(|seen| !seen.status.is_empty()).await;
    assert_eq!(end(big).await.stdout.len(), 5_000_000);

    // Two commands that do not read their input and end while it is open.
    for line in ["echo done", "sleep 1; echo done"] {
        let mut open = shell(&mut client, &id, line, &ALL).await;
        let _ = open.sender.data(open.stdin.expect("stdin"), &input).await;
        let outcome = end(open).await;
        assert_eq!(outcome.out(), "done\n");
        assert!(outcome.status.contains(SUCCESS), "{outcome:?}");
    }

    // A child in the background keeps the output open. The session ends nevertheless.
    let started = Instant::now();
    let line = "sleep 1000 & echo started";
    let outcome = end(shell(&mut client, &id, line, &OUTPUT).await).await;
    assert_eq!(outcome.out(), "started\n");
    assert!(started.elapsed() < Duration::from_secs(30), "{started:?}");

    let missing = exec(&mut client, &id, &["no-such-command"], &OUTPUT).await;
    let outcome = end(missing).await;
    assert!(outcome.status.contains("InternalError"), "{outcome:?}");
    assert!(outcome.status.contains("no-such-command"), "{outcome:?}");
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_the_clients_size_and_hangs_up_when_the_client_leaves() {
    let (_daemon, mut client, pod, id) = sleeper().await;
    let line = "trap 'stty size; exit 5' WINCH; tty; echo $TERM; while :; do sleep 0.1; done";
    let mut process = shell(&mut client, &id, line, &TERMINAL).await;
    process.until(|seen| seen.out().contains("xterm")).await;
    assert!(
        process.seen.out().starts_with("/dev/pts/"),
        "{:?}",
        process.seen
    );
    process.resize(91, 37).await;
    let outcome = end(process).await;
    assert!(outcome.out().contains("37 91"), "{outcome:?}");
    assert!(outcome.status.contains("\"message\":\"5\""), "{outcome:?}");

    let mut process = exec(&mut client, &id, &["sh"], &TERMINAL).await;
    process.input(b"echo a$((1+1))b; sleep 4321\n").await;
    process.until(|seen| seen.out().contains("a2b")).await;
    drop(process);
    let line =
        "for i in $(seq 100); do ps | grep -q '[s]leep 4321' || exit 0; sleep 0.2; done; exit 1";
    client.shell(&id, line).await;
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_stall_or_leave_stop_only_themselves() {
    let (daemon, mut client, pod, id) = sleeper().await;
    // One client does not read its output; another one's process does not read its input.
    let stalled = shell(&mut client, &id, "exec cat /dev/zero", &OUTPUT).await;
    let mut deaf = shell(&mut client, &id, "exec sleep 5432", &ALL).await;
    let stdin = deaf.stdin.expect("stdin");
    let flood = tokio::spawn(async move {
        let _ = deaf.sender.data(stdin, &vec![0; 50 << 20]).await;
        deaf
    });
    let mut many = Vec::new();
    for number in 0..12 {
        let line = format!("echo {number}; cat");
        many.push(shell(&mut client, &id, &line, &ALL).await);
    }
    for (number, process) in many.iter_mut().enumerate() {
        process.input(format!("to {number}\n").as_bytes()).await;
        process.end_input().await;
    }
    for (number, process) in many.into_iter().enumerate() {
        let outcome = end(process).await;
        assert_eq!(outcome.out(), format!("{number}\nto {number}\n"));
    }

    // Clients that disconnect at each step of a session leave nothing behind.
    flood.abort();
    drop(stalled);
    let descriptors = || daemon.descriptors();
    let before = descriptors();
    for step in 0..6 {
        let kinds = ALL;
        let url = client.exec_url(&id, &["cat"], &kinds).await.expect("exec");
        if step == 0 {
            continue;
        }
        if step == 1 {
            let host = url.trim_start_matches("http://").split('/').next();
            drop(tokio::net::TcpStream::connect(host.expect("host")).await);
            continue;
        }
        let connected = spdy::connect(&url, &spdy::PROCESS_PROTOCOLS).await;
        let (mut sender, mut receiver) = connected.expect("an upgrade");
        for kind in ["error", "stdin", "stdout", "stderr"].iter().take(step - 1) {
            spdy::open(&mut sender, &mut receiver, kind).await;
        }
        if step == 5 {
            sender.data(3, b"hello").await.expect("send");
        }
    }
    // Each `cat` ends when its input ends. So do the commands above.
    until("nothing of the sessions is left", async || {
        let cats = client.shell(&id, "ps | grep '[c]at' || true").await;
        let now = descriptors();
        let seen = format!("{now} descriptors, {before} before; {cats}");
        whether(now <= before && cats.is_empty(), seen)
    })
    .await;
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attached_clients_share_a_container_whose_log_goes_on() {
    let (_daemon, mut client, pod, busybox) = pod().await;
    let script = "while read line; do echo got $line; echo err $line >&2; done; echo bye";
    let mut config = container("reader", &busybox, &["sh", "-c", script]);
    config.stdin = true;
    let id = client.create(&pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    let attach = async |client: &mut Client, kinds: &[&str]| {
        let url = client.attach_url(&id, kinds).await.expect("attach");
        Process::connect(&url, kinds).await
    };
    let mut first = attach(&mut client, &ALL).await;
    let mut second = attach(&mut client, &OUTPUT).await;
    first.input(b"one\n").await;
    for process in [&mut first, &mut second] {
        process
            .until(|seen| seen.out().contains("got one") && seen.stderr.ends_with(b"err one\n"))
            .await;
    }
    // Without `stdin_once`, the container's input stays open when a client leaves.
    first.end_input().await;
    drop(first);
    let mut third = attach(&mut client, &ALL).await;
    third.input(b"two\n").await;
    third.until(|seen| seen.out().contains("got two")).await;
    second.until(|seen| seen.out().contains("got two")).await;
    client
        .log_until(&pod, "reader", |log| log.contains("err two"))
        .await;
    client.stop(&id, 0).await.expect("stop");
    assert!(end(second).await.status.contains(SUCCESS));

    let mut config = container("once", &busybox, &["sh", "-c", script]);
    config.stdin = true;
    config.stdin_once = true;
    let id = client.create(&pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    let url = client.attach_url(&id, &ALL).await.expect("attach");
    let mut process = Process::connect(&url, &ALL).await;
    process.input(b"three\n").await;
    process.end_input().await;
    let outcome = end(process).await;
    assert!(outcome.out().ends_with("got three\nbye\n"), "{outcome:?}");
    assert_eq!(client.exited(&id).await.exit_code, 0);

    let mut config = container("terminal", &busybox, &["sh"]);
    config.stdin = true;
    config.tty = true;
    let id = client.create(&pod, config).await.expect("create");
    client.start(&id).await.expect("start");
    let url = client.attach_url(&id, &TERMINAL).await.expect("attach");
    let mut process = Process::connect(&url, &TERMINAL).await;
    process.resize(100, 40).await;
    // The window size may arrive after the input.
    process
        .input(b"while [ \"$(stty size)\" != '40 100' ]; do :; done; exit 4\n")
        .await;
    let outcome = end(process).await;
    assert!(outcome.status.contains(SUCCESS), "{outcome:?}");
    assert_eq!(client.exited(&id).await.exit_code, 4);
    client.end_pod(&pod).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attached_client_that_does_not_read_misses_output_and_is_told() {
    let (_daemon, mut client, pod, busybox) = pod().await;
    // More than the sockets on the way and the agent buffer for one client. It is one line, because that is cheap to
    // log.
    let script = "until [ -e /go ]; do sleep 0.1; done; \
                  head -c 16000000 /dev/zero | tr '\\0' 'x'; echo; echo end; exec sleep 1000";
    let id = client.run_script(&pod, "chatty", &busybox, script).await;
    let url = client.attach_url(&id, &OUTPUT).await.expect("attach");
    let mut slow = Process::connect(&url, &OUTPUT).await;
    client.shell(&id, "touch /go").await;
    client
        .log_until(&pod, "chatty", |log| log.contains("end"))
        .await;
    slow.until(|seen| {
        String::from_utf8_lossy(&seen.stderr).contains("bytes of output are missing")
    })
    .await;
    client.stop(&id, 0).await.expect("stop");
    client.end_pod(&pod).await;
}

/// Opens the two streams of a forwarded connection.
async fn forwarded(
    sender: &mut spdy::Sender,
    receiver: &mut spdy::Receiver,
    port: &str,
    request: &str,
) -> (u32, u32) {
    let headers = |kind| [("streamtype", kind), ("port", port), ("requestid", request)];
    let error = spdy::open_with(sender, receiver, &headers("error")).await;
    sender.fin(error).await.expect("finish the error stream");
    let data = spdy::open_with(sender, receiver, &headers("data")).await;
    (data, error)
}

/// Reads two streams until both have ended, and returns their bytes.
async fn drain(receiver: &mut spdy::Receiver, one: u32, two: u32) -> (Vec<u8>, Vec<u8>) {
    let (mut bytes, mut ended) = ((Vec::new(), Vec::new()), [false; 2]);
    while ended != [true; 2] {
        let frame = timeout(PATIENCE, receiver.next_but_windows()).await;
        match frame.expect("a frame in time") {
            Some(Frame::Data {
                stream,
                fin,
                bytes: more,
            }) => {
                if stream == one {
                    bytes.0.extend(more);
                    ended[0] |= fin;
                } else if stream == two {
                    bytes.1.extend(more);
                    ended[1] |= fin;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_on_the_pods_loopback_are_reached_by_ipv4_and_ipv6() {
    let (_daemon, mut client, pod, id) = sleeper().await;
    // Two web servers, one for each address family, and a server that answers in capitals once the client has sent all.
    let serve = |address: &str| format!("httpd -p '{address}' -h /page;");
    let line = format!(
        "mkdir /page; echo a page > /page/index.html; {} {} \
         nc -ll -p 7004 -e tr a-z A-Z >/dev/null 2>&1 &",
        serve("127.0.0.1:7001"),
        serve("[::1]:7002")
    );
    client.shell(&id, &line).await;
    client.until_listening(&id, 7004).await;
    let url = client.port_forward_url(&pod.id, &[]).await.expect("URL");
    let connected = spdy::connect(&url, &["portforward.k8s.io"]).await;
    let (mut sender, mut receiver) = connected.expect("an upgrade");
    let (four, four_error) = forwarded(&mut sender, &mut receiver, "7001", "0").await;
    let (six, six_error) = forwarded(&mut sender, &mut receiver, "7002", "1").await;
    for (data, error) in [(six, six_error), (four, four_error)] {
        let request = b"GET / HTTP/1.0\r\n\r\n";
        sender.data(data, request).await.expect("send");
        let (answer, error) = drain(&mut receiver, data, error).await;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.ends_with("a page\n"), "{answer}");
        assert_eq!(error, b"");
    }
    let (half, half_error) = forwarded(&mut sender, &mut receiver, "7004", "3").await;
    // No more than the buffers on the way hold, because this client sends everything before it reads.
    let text = vec![b'x'; 50_000];
    sender.data(half, &text).await.expect("send");
    sender.fin(half).await.expect("fin");
    let (answer, error) = drain(&mut receiver, half, half_error).await;
    assert_eq!((answer.len(), &error[..]), (text.len(), &b""[..]));
    assert!(answer.iter().all(|byte| *byte == b'X'));

    let (data, error) = forwarded(&mut sender, &mut receiver, "7003", "2").await;
    let (answer, error) = drain(&mut receiver, data, error).await;
    let error = String::from_utf8_lossy(&error).into_owned();
    assert!(answer.is_empty());
    assert!(
        error.contains("7003") && error.contains("refused"),
        "{error}"
    );
    sender.ping(1).await;
    assert_eq!(receiver.next_but_windows().await, Some(Frame::Ping(1)));
    for headers in [
        [("streamtype", "data"), ("port", "0")],
        [("streamtype", "what"), ("port", "80")],
    ] {
        let stream = sender.open(&headers).await;
        let answer = receiver.next_but_windows().await;
        assert_eq!(answer, Some(Frame::Reset(stream)), "{headers:?}");
    }
    client.end_pod(&pod).await;
}

/// The Python clients in `websocket_clients.py` use the packages `kubernetes` and `websocket-client`.
#[tokio::test(flavor = "multi_thread")]
async fn third_party_websocket_clients_get_the_same() {
    let tls = Certificate::make();
    let streaming = format!(
        "[streaming]\ntls_certificate = \"{}\"\ntls_key = \"{}\"\n",
        tls.path("certificate.pem").display(),
        tls.path("key.pem").display()
    );
    let daemon = Daemon::start_with(Networking::Loopback, &streaming).await;
    let mut client = daemon.client().await;
    let busybox = Registry::shared().image("test/busybox");
    client.pull(&busybox).await.expect("pull");
    let pod = client.run_pod("pod").await.expect("run pod");
    let chatter = "while :; do echo again; sleep 1; done";
    let id = client.run_script(&pod, "main", &busybox, chatter).await;
    let line = "mkdir /page; echo a page > /page/index.html; httpd -p 127.0.0.1:7001 -h /page";
    client.shell(&id, line).await;
    let line = "echo out; echo err >&2; exit 3";
    let said = ["echo", "remote execution test"];
    let echoed = ["sh", "-c", "head -n 1; exit 4"];
    let mut clients = Clients::start(&tls).await;
    for (name, command, kinds) in [
        ("v4-exit", &["sh", "-c", line][..], &OUTPUT[..]),
        ("v4-input", &["head", "-c", "400000"], &ALL),
        ("v4-terminal", &["sh"], &TERMINAL),
        ("v5-half-close", &["wc", "-c"], &ALL),
        ("v5-out-of-range", &["cat"], &ALL),
        ("v5-too-long", &["cat"], &ALL),
        ("base64", &["cat"], &ALL),
        ("first-success", &said, &OUTPUT),
        ("first-failure", &["sh", "-c", line], &OUTPUT),
        ("first-input", &["head", "-c", "250000"], &ALL),
        ("first-base64", &echoed, &ALL),
        ("unnamed-success", &said, &OUTPUT),
        ("unnamed-failure", &["sh", "-c", line], &OUTPUT),
        ("unnamed-input", &["head", "-c", "250000"], &ALL),
        ("unknown-protocol", &["cat"], &ALL),
    ] {
        let url = client.exec_url(&id, command, kinds).await.expect("exec");
        clients.serve(name, &url).await;
    }
    for name in ["first-attach", "unnamed-attach"] {
        let url = client.attach_url(&id, &OUTPUT).await.expect("attach");
        clients.serve(name, &url).await;
    }
    let ports = [7001, 7003];
    for name in [
        "ports",
        "ports-v4-base64",
        "ports-first",
        "ports-first-base64",
        "ports-unnamed",
        "tunnel",
    ] {
        let url = client.port_forward_url(&pod.id, &ports).await.expect("URL");
        clients.serve(name, &url).await;
    }
    clients.end().await;
    client.end_pod(&pod).await;
}

/// The running Python script with its clients.
struct Clients {
    child: tokio::process::Child,
    stdin: tokio::process::ChildStdin,
    said: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
}

impl Clients {
    async fn start(tls: &Certificate) -> Self {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/websocket_clients.py");
        // Debian's Python finds Debian's packages.
        let mut child = tokio::process::Command::new("/usr/bin/python3")
            .arg(script)
            .arg(tls.path("certificate.pem"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("run Python");
        let stdout = child.stdout.take().expect("its output");
        let mut clients = Self {
            stdin: child.stdin.take().expect("its input"),
            said: BufReader::new(stdout).lines(),
            child,
        };
        clients.says("ready").await;
        clients
    }

    async fn serve(&mut self, name: &str, url: &str) {
        let line = format!("{name}={url}\n");
        self.stdin.write_all(line.as_bytes()).await.expect("ask");
        self.says(name).await;
    }

    async fn says(&mut self, expected: &str) {
        let line = timeout(PATIENCE, self.said.next_line()).await;
        let line = line.expect(expected).expect("output");
        if line.as_deref() != Some(expected) {
            let mut wrong = String::new();
            let mut stderr = self.child.stderr.take().expect("its errors");
            let _ = stderr.read_to_string(&mut wrong).await;
            panic!("{expected}: {line:?}, {wrong}");
        }
    }

    async fn end(self) {
        let Self {
            mut child, stdin, ..
        } = self;
        drop(stdin);
        let ended = timeout(PATIENCE, child.wait()).await.expect("in time");
        assert!(ended.expect("wait").success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_with_a_reason_and_disturbs_no_other_session() {
    let (daemon, mut client, pod, id) = sleeper().await;
    let mut other = exec(&mut client, &id, &["cat"], &ALL).await;
    let before = daemon.descriptors();

    // Tokens: unknown, for another path, used already.
    let url = client.exec_url(&id, &["true"], &OUTPUT).await.expect("URL");
    let refused = |url: String| async move {
        let refused = spdy::connect(&url, &spdy::PROCESS_PROTOCOLS).await;
        refused.expect_err("must be refused")
    };
    let guessed = format!(
        "{}/exec/{}",
        &url[..url.find("/exec").expect("a path")],
        "0".repeat(48)
    );
    for wrong in [guessed, url.replace("/exec/", "/attach/"), url.clone()] {
        let refused = refused(wrong).await;
        assert_eq!(refused.code, 404, "{refused:?}");
        assert!(refused.body.contains("token"), "{refused:?}");
    }
    // Handshakes: no upgrade, no common protocol, a head that is too long.
    let url = client.exec_url(&id, &["true"], &OUTPUT).await.expect("URL");
    assert_eq!(spdy::request(&url, &[]).await.1, 400);
    let url = client.exec_url(&id, &["true"], &OUTPUT).await.expect("URL");
    let answer = spdy::connect(&url, &["v9.channel.k8s.io"]).await;
    let answer = answer.expect_err("no protocol in common");
    assert_eq!(answer.code, 403);
    assert!(answer.body.contains("v9.channel.k8s.io"), "{answer:?}");
    let long = "x".repeat(200_000);
    assert_eq!(spdy::request(&url, &[("X-Long", &long)]).await.1, 431);

    // SPDY frames.
    let bomb = vec![0; 10 << 20];
    for case in ["bomb", "version", "length", "zero", "garbage"] {
        let url = client.exec_url(&id, &["cat"], &ALL).await.expect("URL");
        let connected = spdy::connect(&url, &spdy::PROCESS_PROTOCOLS).await;
        let (mut sender, mut receiver) = connected.expect("an upgrade");
        match case {
            "bomb" => drop(sender.open_raw(&bomb).await),
            "version" => sender
                .raw(&[0x80, 2, 0, 1, 0, 0, 0, 0])
                .await
                .expect("send"),
            "length" => sender
                .raw(&[0x80, 3, 0, 1, 0, 255, 255, 255])
                .await
                .expect("send"),
            "zero" => sender.raw(&[0, 0, 0, 0, 0, 0, 0, 0]).await.expect("send"),
            _ => sender.raw(&[0xff; 64]).await.expect("send"),
        }
        let end = timeout(PATIENCE, receiver.next()).await.expect("in time");
        assert_eq!(end, Some(Frame::GoAway(1)), "{case}: a protocol error");
    }

    // CRI calls.
    let mut request = ExecRequest {
        container_id: id.clone(),
        cmd: vec!["true".into()],
        ..Default::default()
    };
    let answer = client.runtime.exec(request.clone()).await;
    assert_fails(answer, Code::InvalidArgument, &["stdin, stdout and stderr"]);
    (request.tty, request.stderr) = (true, true);
    let answer = client.runtime.exec(request.clone()).await;
    assert_fails(answer, Code::InvalidArgument, &["tty", "stderr"]);
    let mut attach = AttachRequest {
        container_id: "nosuchcontainer".into(),
        stdout: true,
        ..Default::default()
    };
    let answer = client.runtime.attach(attach.clone()).await;
    assert_fails(answer, Code::NotFound, &["nosuchcontainer"]);
    let answer = client.port_forward_url(&pod.id, &[70_000]).await;
    assert_fails(answer, Code::InvalidArgument, &["70000"]);

    // The session of another client goes on.
    other.input(b"still here\n").await;
    other.end_input().await;
    assert_eq!(end(other).await.out(), "still here\n");
    let what = format!("the daemon has at most {before} descriptors again");
    until(&what, async || {
        let now = daemon.descriptors();
        whether(now <= before, now)
    })
    .await;
    client.stop(&id, 0).await.expect("stop");
    attach.container_id.clone_from(&id);
    let answer = client.runtime.attach(attach).await;
    assert_fails(answer, Code::FailedPrecondition, &["exited"]);
    client.end_pod(&pod).await;
}
