// SPDX-License-Identifier: Apache-2.0
//! The gate: where a pod without a memory limit has to stop before it gets more memory; and the thread that moves it.
//!
//! The gate is `memory.high` of the pod's cgroup. When the containers reach it, the kernel first reclaims page cache.
//! Containers that go further are slowed down but not killed, and the kernel reports it in `memory.events.local`.
//! Then this thread checks what the memory is used for. If the containers need more, it adds memory to the guest and
//! moves the gate up. For page cache alone it adds nothing: otherwise a container that reads a large disk would take
//! all memory of the node.
//!
//! `memory.max` is the final limit. When the containers reach it, the kernel kills a process of the pod, instead of one
//! of the whole guest.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::Path;
use std::time::Duration;

use bulkhead_text::chain;
use rustix::event::{PollFd, PollFlags, poll};

use super::Hotplug;
use crate::cgroup::POD;

/// The pause after a failed attempt to add memory.
const PAUSE_AFTER_ERROR: Duration = Duration::from_secs(1);
/// The pause between two checks while page cache keeps reaching the gate.
const PAUSE_AFTER_CACHE: Duration = Duration::from_millis(50);
/// Memory pressure: the share of the last ten seconds in which something waited for memory. Above this, page cache is
/// needed, too.
const PRESSING_PERCENT: f64 = 10.0;

/// What the pod's memory is used for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Use {
    current: u64,
    /// Page cache, which the kernel can reclaim.
    cache: u64,
    pressure_percent: f64,
}

impl Use {
    /// Whether the pod needs more memory. Counts everything but page cache, and a quarter of the page cache, as needed.
    /// True if that is more than three quarters of the gate, or if the pod waits for memory.
    fn needs_more(&self, gate: u64) -> bool {
        let needed = self.current.saturating_sub(self.cache / 4 * 3);
        needed > gate / 4 * 3 || self.pressure_percent > PRESSING_PERCENT
    }

    fn read(pod: &Path) -> io::Result<Self> {
        let read = |file: &str| fs::read_to_string(pod.join(file));
        let statistics = read("memory.stat")?;
        let of = |name: &str| field(&statistics, name).unwrap_or(0);
        Ok(Self {
            current: read("memory.current")?.trim().parse().unwrap_or(0),
            cache: of("active_file ") + of("inactive_file "),
            pressure_percent: read("memory.pressure")
                .ok()
                .and_then(|text| average(&text))
                .unwrap_or(0.0),
        })
    }
}

/// Sets the gate, and the most memory that the pod can ever use.
pub fn set(gate_bytes: u64, most_bytes: u64) -> io::Result<()> {
    let gate = if gate_bytes < most_bytes {
        gate_bytes.to_string()
    } else {
        "max".to_owned()
    };
    write("memory.max", &most_bytes.to_string())?;
    write("memory.high", &gate)
}

/// Removes the gate.
pub fn lift() -> io::Result<()> {
    write("memory.high", "max")
}

fn write(file: &str, value: &str) -> io::Result<()> {
    fs::write(Path::new(POD).join(file), value)
}

/// Starts the thread that moves the gate. It runs as long as the guest.
pub fn watch(hotplug: Hotplug) -> io::Result<()> {
    let mut events = File::open(Path::new(POD).join("memory.events.local"))?;
    let builder = std::thread::Builder::new().name("memory".to_owned());
    builder.spawn(move || {
        loop {
            if let Err(error) = wait(&mut events) {
                complain(&error);
                return;
            }
            std::thread::sleep(hotplug.at_the_gate());
        }
    })?;
    Ok(())
}

/// Returns when an event has happened since the last call.
fn wait(events: &mut File) -> io::Result<()> {
    // Reading the file makes the next poll report only later changes (kernfs).
    let mut read = String::new();
    events.rewind()?;
    events.read_to_string(&mut read)?;
    let mut waiting = [PollFd::new(events, PollFlags::PRI)];
    loop {
        match poll(&mut waiting, None) {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.map(drop).map_err(io::Error::from),
        }
    }
}

impl Hotplug {
    /// Moves the gate if the containers need it. Returns how long to wait before the next check.
    fn at_the_gate(&self) -> Duration {
        let mut state = self.state();
        if !state.grows {
            return Duration::ZERO;
        }
        let Some(memory) = state.memory.as_mut().filter(|memory| !memory.is_full()) else {
            return PAUSE_AFTER_CACHE;
        };
        let gate = super::containers_share(memory.present());
        match Use::read(Path::new(POD)) {
            Ok(found) if !found.needs_more(gate) => return PAUSE_AFTER_CACHE,
            Ok(_) => {}
            Err(error) => {
                complain(&error);
                return PAUSE_AFTER_ERROR;
            }
        }
        let grown = memory.grow();
        // Move the gate even after an error, because some memory may have been added.
        let moved = state.set_gate();
        match (grown, moved) {
            (Ok(()), Ok(())) => Duration::ZERO,
            (Err(error), _) => {
                complain(&error);
                PAUSE_AFTER_ERROR
            }
            (_, Err(error)) => {
                complain(&error);
                PAUSE_AFTER_ERROR
            }
        }
    }
}

/// Reports an error on the console, which the daemon logs.
fn complain(error: &dyn std::error::Error) {
    eprintln!("bulkhead-agent: add memory for the pod: {}", chain(error));
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// The number in `some avg10=1.23 avg60=...` of a pressure file.
fn average(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let word = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("avg10="))?;
    word.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn programs_get_more_memory_and_page_cache_does_not() {
        let used = |current: u64, cache: u64, pressure_percent| Use {
            current: current * MIB,
            cache: cache * MIB,
            pressure_percent,
        };
        for (used, expected) in [
            (used(400, 0, 0.0), true),
            (used(400, 100, 0.0), true),
            (used(400, 200, 0.0), false),
            (used(400, 390, 0.0), false),
            (used(400, 390, 11.0), true),
            (used(290, 0, 0.0), false),
            (used(0, 500, 0.0), false),
        ] {
            assert_eq!(used.needs_more(400 * MIB), expected, "{used:?}");
        }
    }

    #[test]
    fn the_kernels_files_are_read() {
        let pod = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("memory.current", "5000\n"),
            (
                "memory.stat",
                "anon 1\nactive_file 30\ninactive_file 4\nfile 9\n",
            ),
            (
                "memory.pressure",
                "some avg10=12.50 avg60=0.00 avg300=0.00 total=7\nfull avg10=1.00\n",
            ),
        ] {
            fs::write(pod.path().join(file), text).unwrap();
        }
        let expected = Use {
            current: 5000,
            cache: 34,
            pressure_percent: 12.5,
        };
        assert_eq!(Use::read(pod.path()).unwrap(), expected);
        fs::remove_file(pod.path().join("memory.pressure")).unwrap();
        assert_eq!(Use::read(pod.path()).unwrap().pressure_percent, 0.0);
    }
}
