// SPDX-License-Identifier: Apache-2.0
//! Databases: what they have confirmed survives the death of their processes, and their books are right.

use std::path::Path;

use bulkhead_proto::cri::ContainerConfig;
use bulkhead_tests::wait::{until, whether};
use bulkhead_tests::workload::{Asks, Workload, ask};

/// PostgreSQL's user in the image.
const POSTGRES: i64 = 999;
const REDIS: i64 = 998;

const POSTGRES_SERVER: &str = "
    PATH=$PATH:/usr/lib/postgresql/15/bin
    [ -e /data/main/PG_VERSION ] || initdb -N -D /data/main -A trust --locale=C.UTF-8 >/data/initdb.log 2>&1 || cat /data/initdb.log
    exec postgres -D /data/main -c jit=off -c shared_buffers=32MB -c unix_socket_directories=/tmp -c timezone=UTC -c listen_addresses='*'";
/// Adds numbers one by one, and notes each one that the server has confirmed.
const WRITER: &str = "
    number=0
    while psql -qc \"insert into confirmed values ($number)\"; do echo $number >>/data/confirmed; number=$((number + 1)); done";
/// pgbench moves amounts between accounts, tellers and branches: all sums stay the same.
const BOOKS: &str = "psql -At -c \"select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history) \
    and (select sum(tbalance) from pgbench_tellers) = (select sum(delta) from pgbench_history) \
    and (select sum(bbalance) from pgbench_branches) = (select sum(delta) from pgbench_history)\"";
const ENVIRONMENT: &str = "export PATH=$PATH:/usr/lib/postgresql/15/bin PGHOST=127.0.0.1 PGUSER=postgres PGDATABASE=postgres;";

fn postgres(work: &Workload, name: &str, data: &Path) -> ContainerConfig {
    work.script(name, POSTGRES_SERVER)
        .user(POSTGRES)
        .memory_mib(256)
        .volume(data, "/data")
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql() {
    let title = "PostgreSQL: pgbench's books are right, and after SIGKILL under load all that was confirmed is there";
    let mut work = Workload::start("postgres", title).await;
    let data = work.empty_dir("data");
    let first = work.run(postgres(&work, "first", &data)).await;
    let with = |line: &str| format!("{ENVIRONMENT} {line}");
    let ready = with("pg_isready");
    work.until("a new cluster accepts connections", &first, &ready)
        .await;
    let line = with(
        "psql -qc 'create table confirmed (number int primary key)' && pgbench -i -s 1 -q 2>&1 | tail -n 1",
    );
    work.says("pgbench -i", &first, &line, |said| said.contains("done"))
        .await;
    let line = with("pgbench -c 2 -t 50 | grep processed");
    let whole = |said: &str| said.ends_with("100/100");
    work.says("transactions of two clients", &first, &line, whole)
        .await;
    let line = with(&format!(
        "(pgbench -n -c 2 -T 100000 >/dev/null 2>&1 & {WRITER}) >/dev/null 2>&1 &"
    ));
    work.sh(&first, &line).await;
    until("ten rows are confirmed", async || {
        let (_, lines) = work.sh(&first, "wc -l </data/confirmed").await;
        whether(lines.parse::<u32>().is_ok_and(|lines| lines >= 10), lines)
    })
    .await;
    // Without any grace: SIGKILL to all processes.
    work.client.stop(&first, 0).await.expect("kill the server");
    let code = work.client.exited(&first).await.exit_code;
    work.row("killed under load", code == 137, code);
    let second = work.run(postgres(&work, "second", &data)).await;
    work.until("the next server accepts connections", &second, &ready)
        .await;
    let log = work.log("second").await;
    let recovered = log
        .lines()
        .find(|line| line.contains("redo done"))
        .unwrap_or(&log);
    let interrupted = log.contains("database system was interrupted")
        || log.contains("automatic recovery in progress");
    work.row(
        "it recovers from its log",
        interrupted && log.contains("redo done"),
        recovered,
    );
    let line = with(
        "last=$(tail -n 1 /data/confirmed); \
         echo $last $(psql -At -c \"select count(*) from confirmed where number <= $last\")",
    );
    let all = |said: &str| {
        let numbers: Vec<u64> = said
            .split(' ')
            .filter_map(|word| word.parse().ok())
            .collect();
        matches!(numbers[..], [last, rows] if rows == last + 1)
    };
    work.says(
        "last row confirmed before, rows up to it now",
        &second,
        &line,
        all,
    )
    .await;
    work.equals("the books are right", &second, &with(BOOKS), "t")
        .await;
    work.client.stop(&second, 60).await.expect("stop");
    let code = work.client.exited(&second).await.exit_code;
    work.row("it ends by itself on SIGTERM", code == 0, code);
    work.finish().await;
}

fn redis(work: &Workload, name: &str, data: &Path) -> ContainerConfig {
    let server = "exec redis-server --dir /data --appendonly yes --appendfsync always --save '' --protected-mode no \
         --bind 0.0.0.0";
    work.script(name, server)
        .user(REDIS)
        .memory_mib(128)
        .volume(data, "/data")
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_with_an_append_only_file() {
    let title = "Redis: with an append-only file, a server that was killed comes back with every write it confirmed";
    let mut work = Workload::start("redis", title).await;
    let data = work.empty_dir("data");
    let first = work.run(redis(&work, "first", &data)).await;
    work.until(
        "the server answers",
        &first,
        "redis-cli ping | grep -x PONG",
    )
    .await;
    let line = "for i in $(seq 500); do echo set key$i value$i; done | redis-cli | grep -cx OK";
    work.equals("writes that it confirms", &first, line, "500")
        .await;
    let line = "redis-cli bgrewriteaof >/dev/null; \
        until redis-cli info persistence | grep -q aof_rewrite_in_progress:0; do sleep 0.1; done; \
        redis-cli info persistence | tr -d '\\r' | grep aof_last_bgrewrite_status; redis-cli incr more";
    let expected = "aof_last_bgrewrite_status:ok\n1";
    work.equals("a child rewrites the file (fork)", &first, line, expected)
        .await;
    let address = work.address(&work.pod.clone()).await;
    let pong = ask(&address, 6379, "PING\r\nQUIT\r\n").await;
    let pong = pong.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    work.row(
        "a client outside",
        pong == Ok("+PONG\r\n+OK\r\n".to_owned()),
        format!("{pong:?}"),
    );
    work.client.stop(&first, 0).await.expect("kill the server");
    let code = work.client.exited(&first).await.exit_code;
    work.row("killed", code == 137, code);
    let second = work.run(redis(&work, "second", &data)).await;
    let line = "redis-cli get key500 | grep -x value500";
    work.until("the next server has the last write", &second, line)
        .await;
    work.equals(
        "and all others",
        &second,
        "redis-cli dbsize; redis-cli get more",
        "501\n1",
    )
    .await;
    work.finish().await;
}
