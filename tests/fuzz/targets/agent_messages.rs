// SPDX-License-Identifier: Apache-2.0
//! Messages of a hostile agent: news of containers, and statistics. The first byte says which.
//!
//! What is passed on is bounded, printable and possible.
#![no_main]

use std::time::Duration;

use bulkhead_fuzz::input::Input;
use bulkhead_guest::exit::Exit;
use bulkhead_guest::news::{News, Told};
use bulkhead_guest::statistics::Bounds;
use bulkhead_proto::agent::{ContainerStatus, StatisticsResponse};
use prost::Message;

const NOW: i64 = 1_795_953_600_000_000_000;
const BOUNDS: Bounds = Bounds {
    memory_bytes: 1 << 30,
    scratch_bytes: 1 << 32,
    cpu: Duration::from_secs(10),
};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    match input.below(2) {
        0 => {
            if let Ok(status) = ContainerStatus::decode(input.rest())
                && let Some(checked) = News::check(status, || NOW)
            {
                news(checked);
            }
        }
        _ => {
            if let Ok(answer) = StatisticsResponse::decode(input.rest()) {
                statistics(BOUNDS.cut(answer, |id| id.len() == 1));
            }
        }
    }
});

fn news(news: News) {
    assert!(news.id.len() == 64 && news.id.bytes().all(|byte| byte.is_ascii_hexdigit()));
    if let Some(user) = news.user {
        assert!(user.groups.len() <= 1024);
    }
    match news.state {
        Told::Created => (),
        Told::Running { started_at, .. } => assert!((0..=NOW).contains(&started_at)),
        Told::Exited(Exit {
            code,
            message,
            started_at,
            finished_at,
            ..
        }) => {
            assert!((0..=255).contains(&code));
            assert!(message.len() <= 4096);
            assert!((0..=NOW).contains(&started_at) && (0..=NOW).contains(&finished_at));
        }
    }
}

fn statistics(answer: StatisticsResponse) {
    let guest = answer.guest.expect("a guest");
    assert!(guest.memory_available_bytes <= guest.memory_total_bytes);
    assert!(guest.memory_total_bytes <= BOUNDS.memory_bytes);
    let of_containers = answer.containers.into_iter().map(|container| {
        assert_eq!(container.id.len(), 1, "a container that is not known");
        container.cgroup.expect("a cgroup")
    });
    for cgroup in of_containers.chain(guest.pod) {
        let cpu = cgroup.cpu.expect("CPU time");
        assert!(u128::from(cpu.usage_us) <= BOUNDS.cpu.as_micros());
        assert!(cpu.user_us <= cpu.usage_us && cpu.system_us <= cpu.usage_us);
        let memory = cgroup.memory.expect("memory");
        assert!(memory.current_bytes <= BOUNDS.memory_bytes);
        assert!(cgroup.io.len() <= 16 && cgroup.hugepages.len() <= 8);
        for pressure in [
            cgroup.cpu_pressure,
            cgroup.memory_pressure,
            cgroup.io_pressure,
        ] {
            for line in pressure
                .into_iter()
                .flat_map(|pressure| [pressure.some, pressure.full])
                .flatten()
            {
                for average in [line.avg10, line.avg60, line.avg300] {
                    assert!((0.0..=100.0).contains(&average));
                }
            }
        }
    }
}
