// SPDX-License-Identifier: Apache-2.0
//! News and statistics that are not true.

use bulkhead_proto::agent as proto;
use bulkhead_proto::agent::container_status::State;
use bulkhead_proto::agent::watch_event::Event;

use crate::containers::Containers;

/// What comes as news, again and again, beside what is true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// Nothing else.
    True,
    /// Exits and starts of containers called `victim`, in turns.
    Exits,
    /// Containers that nobody knows run.
    Unknown,
    /// Failed starts of containers that run.
    FailedStarts,
    /// News with ids that are none.
    Invalid,
    /// Marks that all is told.
    Marks,
    /// As much text as fits, of control characters.
    Long,
    /// More than fits.
    TooLong,
    /// A list of users with as many entries as fit.
    Users,
}

impl News {
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "exits" => Self::Exits,
            "unknown" => Self::Unknown,
            "failed-starts" => Self::FailedStarts,
            "invalid" => Self::Invalid,
            "marks" => Self::Marks,
            "long" => Self::Long,
            "too-long" => Self::TooLong,
            "users" => Self::Users,
            _ => return None,
        })
    }

    /// Piece `number` of a stream without an end. `None` if nothing is to be said.
    pub fn piece(self, containers: &Containers, number: u64) -> Option<proto::WatchEvent> {
        let one_of = |word| -> Option<String> {
            let ids = containers.called(word);
            let at = number.checked_rem(ids.len() as u64)?;
            ids.into_iter().nth(usize::try_from(at).ok()?)
        };
        let state = if number.is_multiple_of(2) {
            State::Exited
        } else {
            State::Running
        };
        let mut status = proto::ContainerStatus {
            pid: 7,
            started_at_unix_nanoseconds: i64::MIN,
            finished_at_unix_nanoseconds: i64::MAX,
            ..Default::default()
        };
        status.set_state(state);
        match self {
            Self::True => return None,
            Self::Exits => status.id = one_of("victim")?,
            Self::Unknown => status.id = format!("{number:064x}"),
            Self::FailedStarts => {
                status.id = one_of("orders")?;
                status.reason = proto::START_ERROR.to_owned();
                status.set_state(State::Exited);
            }
            Self::Invalid => status.id = "../../\x1b[2J".repeat(100),
            Self::Marks => {
                let event = Some(Event::CaughtUp(true));
                return Some(proto::WatchEvent { event });
            }
            Self::Long | Self::TooLong => {
                status.id = one_of("victim")?;
                let bytes = if self == Self::Long { 60_000 } else { 1 << 20 };
                status.message = "\x1b".repeat(bytes);
                status.set_state(State::Exited);
            }
            Self::Users => {
                status.id = one_of("victim")?;
                status.identity = Some(proto::Identity {
                    uid: u32::MAX,
                    gid: u32::MAX,
                    groups: vec![1; 60_000],
                });
            }
        }
        let event = Some(Event::Container(status));
        Some(proto::WatchEvent { event })
    }
}

/// What statistics say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figures {
    Plain,
    /// The greatest numbers, and some that are none.
    Absurd,
    /// The same containers again and again.
    Repeated,
    /// Names with control characters, paths, and names that come twice.
    Names,
}

impl Figures {
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "absurd" => Self::Absurd,
            "repeated" => Self::Repeated,
            "names" => Self::Names,
            _ => return None,
        })
    }

    pub fn answer(self, containers: &Containers) -> proto::StatisticsResponse {
        let ids: Vec<String> = containers.all().into_keys().collect();
        let cgroup = || match self {
            Self::Plain | Self::Repeated => proto::CgroupStatistics::default(),
            Self::Absurd => absurd(),
            Self::Names => named(),
        };
        let of = |id: &String| proto::ContainerStatistics {
            id: id.clone(),
            cgroup: Some(cgroup()),
            processes: u64::MAX,
            file_descriptors: u64::MAX,
            sockets: u64::MAX,
            writable_layer: Some(proto::WritableLayer {
                bytes: u64::MAX,
                inodes: u64::MAX,
                cut: true,
            }),
            ..Default::default()
        };
        let times = if self == Self::Repeated { 100 } else { 1 };
        let containers = (0..times).flat_map(|_| ids.iter().map(of)).collect();
        proto::StatisticsResponse {
            guest: Some(proto::GuestStatistics {
                pod: Some(cgroup()),
                cpu_usage_us: u64::MAX,
                memory_total_bytes: 0,
                memory_available_bytes: u64::MAX,
                scratch: Some(proto::FilesystemStatistics {
                    total_bytes: 0,
                    free_bytes: u64::MAX,
                    total_inodes: 0,
                    free_inodes: u64::MAX,
                }),
            }),
            containers,
        }
    }
}

fn absurd() -> proto::CgroupStatistics {
    let line = proto::PressureLine {
        avg10: f64::NAN,
        avg60: f64::INFINITY,
        avg300: -1.0,
        total_us: u64::MAX,
    };
    let pressure = Some(proto::Pressure {
        some: Some(line),
        full: Some(line),
    });
    proto::CgroupStatistics {
        cpu: Some(proto::CpuStatistics {
            usage_us: u64::MAX,
            user_us: u64::MAX,
            system_us: u64::MAX,
            periods: u64::MAX,
            throttled_periods: u64::MAX,
            throttled_us: u64::MAX,
        }),
        memory: Some(proto::MemoryStatistics {
            current_bytes: u64::MAX,
            peak_bytes: u64::MAX,
            limit_bytes: 1,
            inactive_file_bytes: u64::MAX,
            page_faults: u64::MAX,
            oom_kills: u64::MAX,
            ..Default::default()
        }),
        cpu_pressure: pressure,
        memory_pressure: pressure,
        io_pressure: pressure,
        tasks: u64::MAX,
        tasks_limit: u64::MAX,
        ..Default::default()
    }
}

fn named() -> proto::CgroupStatistics {
    let names = ["vdb", "vdb", "\x1b[2J", "a\"} 1\nnode_up", "../../etc", ""];
    proto::CgroupStatistics {
        io: names
            .map(|name| proto::DeviceIo {
                name: name.to_owned(),
                read_bytes: u64::MAX,
                ..Default::default()
            })
            .to_vec(),
        hugepages: names
            .map(|name| proto::HugepageUsage {
                page_size: name.to_owned(),
                current_bytes: u64::MAX,
            })
            .to_vec(),
        ..Default::default()
    }
}
