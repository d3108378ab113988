// SPDX-License-Identifier: Apache-2.0
//! Languages whose runtimes look up the limits of their container: what they find is what the pod was given.

use bulkhead_tests::workload::{Asks, Workload, get};

const MEMORY_MIB: i64 = 512;
const ONE_CPU: i64 = 1000;

/// The number after `name=` in a line.
fn number(said: &str, name: &str) -> Option<u64> {
    let mut words = said.split_whitespace();
    words.find_map(|word| word.strip_prefix(name)?.parse().ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn java() {
    let title = "Java 17: the heap and the CPUs of the JVM come from the container's limits, and H2 runs on it";
    let mut work = Workload::start_limited("java", title, 1024, ONE_CPU).await;
    let half = work.idle("half").memory_mib(512).cpu_millis(500);
    let half = work.run(half).await;
    let line = "java -XX:+PrintFlagsFinal -XshowSettings:system -version | \
        grep -oE 'MaxHeapSize +=.[0-9]+|Effective CPU Count: [0-9]+|Memory Limit: [0-9.]+.' | tr -s ' ' | sort -u";
    let right = |said: &str| {
        [
            "MaxHeapSize = 134217728",
            "CPU Count: 1",
            "Memory Limit: 512.00M",
        ]
        .iter()
        .all(|words| said.contains(words))
    };
    work.says("what it finds: 512 MiB, half a CPU", &half, line, right)
        .await;
    let line = "java -XX:MaxRAMPercentage=50 -XX:+PrintFlagsFinal -version 2>/dev/null | grep -ow 'MaxHeapSize .*= [0-9]*' | tr -s ' ' | sort -u";
    work.equals("half of it as heap", &half, line, "MaxHeapSize = 268435456")
        .await;
    let line = "java -cp /usr/share/java/h2.jar org.h2.tools.Shell -url jdbc:h2:/tmp/database -sql \
        'create table t as select x, x * x as y from system_range(1, 20000); select sum(y) from t'";
    work.says("a database in Java, with a file", &half, line, |said| {
        said.contains("2666866670000")
    })
    .await;
    work.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn python() {
    const MULTIPROCESSING: &str = "
import multiprocessing, os, sqlite3, ssl, hashlib
if __name__ == '__main__':
    with multiprocessing.Pool(2) as pool:
        print('pool', sum(pool.map(abs, range(-1000, 0))))
    db = sqlite3.connect('/data/db')
    print('journal', db.execute('pragma journal_mode=wal').fetchone()[0])
    db.execute('create table t(x)')
    db.executemany('insert into t values (?)', ((x,) for x in range(1000)))
    db.commit()
    print('rows', sqlite3.connect('/data/db').execute('select count(*) from t').fetchone()[0])
    print('tls', ssl.create_default_context().verify_mode.name)
";
    const SERVED: &str = "
import http.server, threading, urllib.request
server = http.server.ThreadingHTTPServer(('127.0.0.1', 8000), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(urllib.request.urlopen('http://127.0.0.1:8000/etc/hostname').read().decode())
";
    let title = "Python 3.11: CPUs and memory are those of the pod, multiprocessing and SQLite work, and too much memory ends only its container";
    let mut work = Workload::start_limited("python", title, MEMORY_MIB, ONE_CPU).await;
    let data = work.empty_dir("data");
    let config = work.idle("main").memory_mib(256).volume(&data, "/data");
    let id = work.run(config).await;
    let line = "python3 -c \"import os; print('cpus=%d' % os.cpu_count(), \
        'machine-mib=%d' % (os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') >> 20), \
        'limit=' + open('/sys/fs/cgroup/memory.max').read())\"";
    work.says(
        "what it finds: 256 of the pod's 512 MiB, one CPU",
        &id,
        line,
        |said| {
            let mib = number(said, "machine-mib=").unwrap_or_default();
            number(said, "cpus=") == Some(1)
                && number(said, "limit=") == Some(256 << 20)
                && (500..700).contains(&mib)
        },
    )
    .await;
    let line = format!("cat >/tmp/many.py <<'EOF'\n{MULTIPROCESSING}\nEOF\npython3 /tmp/many.py");
    let expected = "pool 500500\njournal wal\nrows 1000\ntls CERT_REQUIRED";
    work.equals("processes, a database, TLS", &id, &line, expected)
        .await;
    let line = format!("cd / && python3 -c \"{SERVED}\" 2>/dev/null");
    work.equals("a web server and its client", &id, &line, "pod")
        .await;
    let greedy =
        "import mmap; m = mmap.mmap(-1, 400 << 20); [m.write(bytes(1 << 20)) for _ in range(400)]";
    let config = work
        .program("greedy", &["python3", "-c", greedy])
        .memory_mib(128);
    let greedy = work.run(config).await;
    let status = work.client.exited(&greedy).await;
    let seen = format!("{} {}", status.exit_code, status.reason);
    work.row("more than its limit", seen == "137 OOMKilled", seen);
    work.equals("the other container lives", &id, "echo alive", "alive")
        .await;
    work.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn go() {
    let title =
        "Go: a static program in an image of its own finds its limits, serves, and ends on SIGTERM";
    let mut work = Workload::start_limited("go", title, 128, ONE_CPU).await;
    let config = work.program("main", &[]).memory_mib(64).cpu_millis(500);
    let id = work.run(config).await;
    let address = work.address(&work.pod.clone()).await;
    let (_, limits) = get(&address, 8080, "/limits", "").await;
    let limits = String::from_utf8_lossy(&limits).into_owned();
    let right = number(&limits, "cpus=") == Some(1)
        && number(&limits, "gomaxprocs=") == Some(1)
        && number(&limits, "memory.max=") == Some(64 << 20)
        && limits.contains("cpu.max=50000 100000")
        && number(&limits, "machine-mib=").is_some_and(|mib| (120..300).contains(&mib));
    work.row(
        "what it finds: 64 of the pod's 128 MiB, half a CPU",
        right,
        limits,
    );
    let (_, done) = get(&address, 8080, "/work", "").await;
    let done = String::from_utf8_lossy(&done).into_owned();
    // The sum of 64 KiB of zeros.
    let right = done == "goroutines=1000 sum=de2f2560\n";
    work.row("a thousand goroutines", right, done);
    work.client.stop(&id, 60).await.expect("stop");
    let code = work.client.exited(&id).await.exit_code;
    let log = work.log("main").await;
    work.row(
        "it ends by itself on SIGTERM",
        code == 0 && log.ends_with("ended as asked\n"),
        format!("exit code {code}: {log}"),
    );
    work.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn node() {
    const FOUND: &str = "console.log('cpus=' + require('os').cpus().length, \
        'machine-mib=' + (require('os').totalmem() >> 20), \
        'heap-mib=' + (require('v8').getHeapStatistics().heap_size_limit >> 20))";
    const WORKERS: &str = "
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
if (isMainThread) {
  const all = [1, 2, 3].map(n => new Promise((done, failed) => {
    const worker = new Worker(__filename, { workerData: n });
    worker.on('message', done); worker.on('error', failed);
  }));
  const watched = new Promise(done => require('fs').watch('/tmp/watched', (kind, name) => done(name)));
  require('fs').writeFileSync('/tmp/watched/file', 'x');
  Promise.all([...all, watched]).then(seen => { console.log(seen.join(' ')); process.exit(0); });
} else parentPort.postMessage(require('crypto').createHash('sha256').update('' + workerData).digest('hex').slice(0, 8));
";
    const SERVER: &str = "
process.on('SIGTERM', () => server.close(() => { console.log('closed'); process.exit(0); }));
const server = require('http').createServer((q, s) => { s.setHeader('Connection', 'close'); s.end('from node\\n'); });
server.listen(3000, () => console.log('listening'));
";
    let title = "Node.js 18: its heap fits the pod, worker threads and file watches work, and it ends on SIGTERM";
    let mut work = Workload::start_limited("node", title, MEMORY_MIB, ONE_CPU).await;
    let config = work.idle("main").memory_mib(256);
    let id = work.run(config).await;
    let line = format!("node -e \"{FOUND}\"");
    work.says(
        "what it finds: a machine of 512 MiB, one CPU",
        &id,
        &line,
        |said| {
            let mib = |name| number(said, name).unwrap_or_default();
            number(said, "cpus=") == Some(1)
                && (500..700).contains(&mib("machine-mib="))
                && (64..512).contains(&mib("heap-mib="))
        },
    )
    .await;
    let line =
        format!("mkdir /tmp/watched; cat >/tmp/w.js <<'EOF'\n{WORKERS}\nEOF\nnode /tmp/w.js");
    work.equals(
        "worker threads and a watch",
        &id,
        &line,
        "6b86b273 d4735e3a 4e074085 file",
    )
    .await;
    let config = work.program("server", &["node", "-e", SERVER]);
    let server = work.run(config).await;
    let address = work.address(&work.pod.clone()).await;
    let (_, body) = get(&address, 3000, "/", "").await;
    let body = String::from_utf8_lossy(&body).into_owned();
    work.row("GET from outside", body == "from node\n", body);
    work.client.stop(&server, 60).await.expect("stop");
    let code = work.client.exited(&server).await.exit_code;
    work.row("it ends by itself on SIGTERM", code == 0, code);
    work.finish().await;
}
