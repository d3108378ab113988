// SPDX-License-Identifier: Apache-2.0
//! A device thread: waits for queue notifications and host descriptors of its devices and gives each
//! device its turn. A turn is bounded, so no device starves another.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::mmio::{MmioTransport, SharedDevice, lock};
use super::ring::{Interrupt, Turn};

/// The source number of the host descriptor. All other numbers are queues.
const HOST: usize = 0xff;
const SOURCE_BITS: u32 = 8;

/// A device as a worker sees it.
#[allow(missing_debug_implementations)]
struct Station {
    device: SharedDevice,
    interrupt: Arc<Interrupt>,
    notifiers: Arc<[EventFd]>,
}

/// Devices that share a thread. Not `Debug`: devices are not.
#[allow(missing_debug_implementations)]
pub struct Worker {
    epoll: Epoll,
    stations: Vec<Station>,
}

/// A source of events: (station, source).
type Token = (usize, usize);

impl Worker {
    pub fn new<'a>(transports: impl Iterator<Item = &'a MmioTransport>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let mut stations = Vec::new();
        for transport in transports {
            let station = Station {
                device: transport.device(),
                interrupt: transport.interrupt(),
                notifiers: transport.notifiers(),
            };
            let number = stations.len();
            for (queue, notifier) in station.notifiers.iter().enumerate() {
                let event = EpollEvent::new(EventSet::IN, token((number, queue)));
                epoll.ctl(ControlOperation::Add, notifier.as_raw_fd(), event)?;
            }
            let source = lock(&station.device).host_source();
            if let Some(fd) = source {
                let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
                let event = EpollEvent::new(events, token((number, HOST)));
                epoll.ctl(ControlOperation::Add, fd, event)?;
            }
            stations.push(station);
        }
        Ok(Self { epoll, stations })
    }

    /// Serves until the process ends. Returns only if epoll itself fails.
    pub fn run(self) -> io::Error {
        let mut events = [EpollEvent::default(); 16];
        let mut again: Vec<Token> = Vec::new();
        loop {
            let timeout = if again.is_empty() { -1 } else { 0 };
            let count = match self.epoll.wait(timeout, &mut events) {
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return e,
            };
            // One turn for each source that was not finished in the last round or has a new event.
            let mut todo = std::mem::take(&mut again);
            for event in events.iter().take(count) {
                let token = parse(event.data());
                self.drain_notifier(token);
                if !todo.contains(&token) {
                    todo.push(token);
                }
            }
            again.extend(todo.into_iter().filter(|&t| self.serve(t) == Turn::More));
        }
    }

    fn drain_notifier(&self, (station, source): Token) {
        let station = self.stations.get(station);
        if let Some(notifier) = station.and_then(|s| s.notifiers.get(source)) {
            let _ = notifier.read();
        }
    }

    fn serve(&self, (station, source): Token) -> Turn {
        let Some(station) = self.stations.get(station) else {
            return Turn::Idle;
        };
        let mut device = lock(&station.device);
        let result = if source == HOST {
            device.host_ready()
        } else {
            device.queue_ready(source)
        };
        result.unwrap_or_else(|_broken| {
            // This device does nothing until its driver resets it. The others go on.
            device.deactivate();
            station.interrupt.needs_reset();
            Turn::Idle
        })
    }
}

fn token((station, source): Token) -> u64 {
    // Both numbers are small: a station is a device, a source is a queue.
    let station = u64::try_from(station).unwrap_or(0);
    station << SOURCE_BITS | u64::try_from(source).unwrap_or(0)
}

fn parse(token: u64) -> Token {
    let source = usize::try_from(token & 0xff).unwrap_or(HOST);
    (usize::try_from(token >> SOURCE_BITS).unwrap_or(0), source)
}

#[cfg(test)]
#[allow(clippy::arithmetic_side_effects)]
mod tests {
    use std::sync::Mutex;
    use std::time::{Duration, Instant};

    use virtio_queue::desc::split::Descriptor;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::devices::driver::{WRITE, bring_up};
    use crate::devices::mmio::QUEUE_NOTIFY;
    use crate::devices::registers::RegisterPage;
    use crate::devices::rng::Rng;
    use crate::memory::Memory;

    const TABLE: u32 = 0x1000;
    const AVAILABLE: u32 = 0x2000;
    const USED: u32 = 0x3000;
    const DATA: u64 = 0x4000;

    /// Brings the device up with one chain of a kilobyte on its queue, and notifies it.
    fn begin(transport: &mut MmioTransport, memory: &Memory) {
        let chain = Descriptor::new(DATA, 1024, WRITE, 0);
        memory.write_obj(chain, GuestAddress(TABLE.into())).unwrap();
        for address in [AVAILABLE, USED].map(u64::from) {
            memory.write_slice(&[0; 64], GuestAddress(address)).unwrap();
        }
        memory
            .write_obj(1u16, GuestAddress(u64::from(AVAILABLE) + 2))
            .unwrap();
        bring_up(transport, [TABLE, AVAILABLE, USED]);
        transport.write(QUEUE_NOTIFY, &0u32.to_le_bytes());
    }

    #[test]
    fn after_a_reset_the_worker_writes_nothing_more() {
        const ROUNDS: u64 = 300;
        let memory = Arc::new(crate::memory::create(1 << 20).unwrap());
        let device: SharedDevice = Arc::new(Mutex::new(Rng::new(io::repeat(7), Arc::default())));
        let transport = MmioTransport::new(device, Arc::clone(&memory), RegisterPage::alone());
        let mut transport = transport.unwrap();
        let worker = Worker::new(std::iter::once(&transport)).unwrap();
        // It ends with the process.
        std::thread::spawn(move || worker.run());
        let mut served = 0;
        for round in 0..ROUNDS {
            begin(&mut transport, &memory);
            // The reset comes sooner or later, so that it meets the worker in all of its steps.
            let until = Instant::now() + Duration::from_micros(round);
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            transport.write(0x70, &0u32.to_le_bytes());
            let used: u16 = memory.read_obj(GuestAddress(u64::from(USED) + 2)).unwrap();
            served += u64::from(used);
            for address in [u64::from(USED), DATA] {
                memory
                    .write_slice(&[0; 1024], GuestAddress(address))
                    .unwrap();
            }
            std::thread::sleep(Duration::from_micros(50));
            for address in [u64::from(USED), DATA] {
                let mut bytes = [1; 1024];
                memory
                    .read_slice(&mut bytes, GuestAddress(address))
                    .unwrap();
                assert_eq!(bytes, [0; 1024], "round {round}");
            }
        }
        assert!(served > 0, "the worker was never in time");
    }

    #[test]
    fn for_all_stations_and_sources_a_token_is_read_as_it_was_made() {
        for made in (0..64).flat_map(|station| (0..=HOST).map(move |source| (station, source))) {
            assert_eq!(parse(token(made)), made);
        }
    }
}
