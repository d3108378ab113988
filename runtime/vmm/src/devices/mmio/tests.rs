// SPDX-License-Identifier: Apache-2.0
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::driver::{WRITE, bring_up};
use crate::devices::ring::INTERRUPT_STATUS;
use crate::devices::rng::Rng;
use crate::devices::{RingError, Turn};

#[derive(Default)]
struct Probe {
    rings: Option<usize>,
    config: [u8; 4],
}

impl VirtioDevice for Probe {
    fn device_id(&self) -> u32 {
        4
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[8, 16]
    }
    fn config(&self) -> Vec<u8> {
        self.config.to_vec()
    }
    fn write_config(&mut self, _offset: u64, data: &[u8]) {
        self.config = data.try_into().unwrap();
    }
    fn activate(&mut self, active: Active) {
        self.rings = Some(active.rings.len());
    }
    fn deactivate(&mut self) {
        self.rings = None;
    }
    fn active(&self) -> Option<&Active> {
        None
    }
    fn queue_ready(&mut self, _index: usize) -> Result<Turn, RingError> {
        Ok(Turn::Idle)
    }
}

struct Driver(MmioTransport, Arc<Mutex<Probe>>);

impl Driver {
    fn new() -> Self {
        let probe = Arc::new(Mutex::new(Probe::default()));
        let memory = Arc::new(crate::memory::create(32 << 20).unwrap());
        let device: SharedDevice = probe.clone();
        let transport = MmioTransport::new(device, memory, RegisterPage::alone());
        Self(transport.unwrap(), probe)
    }
    fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.0.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
    fn write(&mut self, offset: u64, value: u32) {
        self.0.write(offset, &value.to_le_bytes());
    }
    fn negotiate(&mut self, low: u32, high: u32) -> u32 {
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.write(0x24, 0);
        self.write(0x20, low);
        self.write(0x24, 1);
        self.write(0x20, high);
        self.write(0x70, 11);
        self.read(0x70)
    }
    fn set_up_queue(&mut self, index: u32, base: u32) {
        self.write(0x30, index);
        self.write(0x38, 8);
        self.write(0x80, base);
        self.write(0x90, base + 0x1000);
        self.write(0xa0, base + 0x2000);
        self.write(0x44, 1);
    }
    fn is_active(&self) -> bool {
        self.1.lock().unwrap().rings.is_some()
    }
}

#[test]
fn a_driver_brings_the_device_up_and_down() {
    let mut driver = Driver::new();
    assert_eq!(driver.read(0), 0x7472_6976);
    assert_eq!(driver.read(4), 2);
    assert_eq!(driver.read(8), 4);
    driver.write(0x14, 1);
    assert_eq!(driver.read(0x10), 1);
    driver.write(0x30, 1);
    assert_eq!(driver.read(0x34), 16);
    driver.write(0x30, 2);
    assert_eq!(driver.read(0x34), 0);
    driver.write(0x30, u32::MAX);
    assert_eq!(driver.read(0x44), 0);

    assert_eq!(driver.negotiate(1 << 5, 1), 11);
    driver.set_up_queue(0, 0x10_0000);
    driver.set_up_queue(1, 0x20_0000);
    assert_eq!(driver.read(0x44), 1);
    driver.write(0x70, 15);
    assert!(driver.is_active());
    assert_eq!(driver.read(0x70), 15);
    assert_eq!(driver.1.lock().unwrap().rings, Some(2));

    driver.0.interrupt().used_ring();
    assert_eq!(driver.read(0x60), 1);
    driver.write(INTERRUPT_ACK, 1);
    assert_eq!(driver.read(INTERRUPT_STATUS), 1, "stays");
    driver.0.interrupt().config_changed(&[5, 0, 0, 0]);
    assert_eq!(driver.read(INTERRUPT_STATUS), 3);
    assert_eq!((driver.read(0xfc), driver.read(0x100)), (1, 5));
    driver.write(INTERRUPT_ACK, 3);
    assert_eq!(driver.read(INTERRUPT_STATUS), 1);

    driver.write(0x70, 0);
    assert!(!driver.is_active());
    assert_eq!(driver.read(0x70), 0);
    assert_eq!(driver.read(0x60), 0);
    driver.write(0x30, 0);
    assert_eq!(driver.read(0x44), 0);
    assert_eq!(driver.negotiate(0, 1), 11);
    driver.write(0x70, 15);
    assert!(driver.is_active());
}

#[test]
fn a_driver_is_told_of_a_change_between_its_reading_and_its_start() {
    let mut driver = Driver::new();
    driver.1.lock().unwrap().config = [1, 0, 0, 0];
    driver.negotiate(0, 1);
    assert_eq!(driver.read(0x100), 1);
    driver.1.lock().unwrap().config = [2, 0, 0, 0];
    driver.write(0x70, 15);
    assert_eq!(driver.read(0x100), 2);
    assert_eq!(
        (driver.read(INTERRUPT_STATUS), driver.read(0xfc)),
        (2, 1),
        "read before"
    );
}

#[test]
fn bad_features_are_not_accepted() {
    let mut driver = Driver::new();
    assert_eq!(driver.negotiate(1 << 5, 0), 3, "no VERSION_1");
    driver.write(0x70, 0);
    assert_eq!(driver.negotiate(1 << 6, 1), 3, "a feature never offered");
    driver.write(0x70, 15);
    assert!(!driver.is_active());
}

#[test]
fn bad_queues_make_the_device_need_a_reset() {
    let mut driver = Driver::new();
    driver.negotiate(0, 1);
    driver.set_up_queue(0, 0xff00_0000);
    driver.write(0x70, 15);
    assert!(!driver.is_active());
    assert_eq!(driver.read(0x70), 15 | 0x40);
    assert_eq!(driver.read(0x60), 2);
    driver.write(0x70, 0);
    assert_eq!(driver.read(0x70), 0);
}

#[test]
fn odd_accesses_are_harmless() {
    let mut driver = Driver::new();
    let mut data = [1; 8];
    driver.0.read(0, &mut data);
    assert_eq!(&data, b"virt\x02\0\0\0");
    driver.0.read(u64::MAX, &mut data);
    driver.0.write(0x70, &[1]);
    assert_eq!(driver.read(0x70), 0);
    driver.set_up_queue(0, 0x1000);
    assert_eq!(driver.read(0x44), 0, "no queue before FEATURES_OK");
    driver.write(0x100, 0x0403_0201);
    assert_eq!(driver.read(0x100), 0x0403_0201);
    assert_eq!(driver.read(0x102), 0x0403);
    driver.write(QUEUE_NOTIFY, 9);
    driver.write(QUEUE_NOTIFY, 1);
    assert_eq!(driver.0.notifiers()[1].read().unwrap(), 1);
}

#[test]
fn for_all_pairs_of_status_writes_the_handshake_has_its_order() {
    let mut driver = Driver::new();
    for [first, second] in (0..=u16::MAX).map(u16::to_le_bytes) {
        driver.write(0x70, 0);
        // VERSION_1 can be accepted once the driver has shown itself.
        driver.write(0x70, u32::from(first));
        driver.write(0x24, 1);
        driver.write(0x20, 1);
        driver.write(0x70, u32::from(second));
        let status = driver.read(0x70);
        let is = |bit: u32| status & bit != 0;
        let case = format!("{first:#x} {second:#x}: {status:#x}");
        assert_eq!(status & !status::KNOWN, 0, "{case}");
        let before = is(status::ACKNOWLEDGE) && is(status::DRIVER) && is(status::FEATURES_OK);
        assert!(!is(status::DRIVER_OK) || before, "{case}");
        assert_eq!(driver.is_active(), is(status::DRIVER_OK), "{case}");
        if second == 0 {
            assert_eq!(status, 0, "{case}");
        }
    }
}

fn saved(transport: &MmioTransport) -> TransportState {
    let device = transport.device();
    let device = lock(&device);
    transport.save(&*device, Purpose::Template).unwrap()
}

/// A device with a queue of 16 entries.
fn rng(memory: &Arc<Memory>) -> MmioTransport {
    let device: SharedDevice = Arc::new(Mutex::new(Rng::new(std::io::repeat(7), Arc::default())));
    MmioTransport::new(device, Arc::clone(memory), RegisterPage::alone()).unwrap()
}

const RING: [u32; 3] = [0x1000, 0x2000, 0x3000];

fn used(memory: &Memory) -> u16 {
    memory
        .read_obj(GuestAddress(u64::from(RING[2]) + 2))
        .unwrap()
}

/// Puts chain number `number` on the available ring.
fn offer(memory: &Memory, number: u16) {
    let chain = Descriptor::new(0x10_0000 + u64::from(number) * 0x1000, 1024, WRITE, 0);
    let at = u64::from(RING[0]) + u64::from(number) * 16;
    memory.write_obj(chain, GuestAddress(at)).unwrap();
    let ring = u64::from(RING[1]);
    let entry = GuestAddress(ring + 4 + u64::from(number) * 2);
    memory.write_obj(number, entry).unwrap();
    memory
        .write_obj(number + 1, GuestAddress(ring + 2))
        .unwrap();
}

#[test]
fn a_device_goes_on_in_its_queue_where_another_was() {
    let memory = Arc::new(crate::memory::create(4 << 20).unwrap());
    let mut first = rng(&memory);
    bring_up(&mut first, RING);
    offer(&memory, 0);
    lock(&first.device()).queue_ready(0).unwrap();
    assert_eq!(used(&memory), 1);
    // The driver has made a chain available and is not heard any more.
    offer(&memory, 1);
    let state = saved(&first);

    let mut second = rng(&memory);
    let line = second.interrupt();
    second.restore(&state).unwrap();
    for offset in (0..0x110).step_by(4) {
        let read = |transport: &MmioTransport| {
            let mut bytes = [0; 4];
            transport.read(offset, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        assert_eq!(read(&second), read(&first), "register {offset:#x}");
    }
    assert!(second.notifiers()[0].read().is_ok(), "the queue is served");
    assert!(line.line().read().is_ok(), "the driver may have missed one");
    lock(&second.device()).queue_ready(0).unwrap();
    assert_eq!(used(&memory), 2);
    let again = saved(&second);
    let mut third = rng(&memory);
    third.restore(&again).unwrap();
    lock(&third.device()).queue_ready(0).unwrap();
    assert_eq!(used(&memory), 2, "nothing is served twice");
    // A driver can reset it as any other.
    third.write(0x70, &0u32.to_le_bytes());
    assert!(lock(&third.device()).active().is_none());
}

#[test]
fn a_driver_in_the_midst_of_its_handshake_goes_on() {
    let mut first = Driver::new();
    assert_eq!(first.negotiate(1 << 5, 1), 11);
    first.write(0x30, 1);
    first.write(0x38, 8);
    let state = saved(&first.0);
    let mut second = Driver::new();
    second.0.restore(&state).unwrap();
    assert!(!second.is_active());
    assert_eq!(
        saved(&second.0),
        TransportState {
            // A spurious interrupt does no harm.
            interrupt_status: 1,
            ..state
        }
    );
    for (index, base) in [(0, 0x1_0000), (1, 0x2_0000)] {
        second.set_up_queue(index, base);
    }
    second.write(0x70, 15);
    assert!(second.is_active());
}

#[test]
fn a_device_that_is_not_as_it_was_tells_its_driver() {
    let mut first = Driver::new();
    first.negotiate(1 << 5, 1);
    first.set_up_queue(0, 0x1_0000);
    first.write(0x70, 15);
    let mut state = saved(&first.0);
    // The probe says that it is never active.
    state.is_active = true;
    let mut second = Driver::new();
    second.1.lock().unwrap().config = [1, 2, 3, 4];
    second.0.restore(&state).unwrap();
    assert!(second.is_active());
    assert_eq!(
        second.read(0x60),
        3,
        "used buffers, and a change of the configuration"
    );
    assert_eq!(second.read(0xfc), first.read(0xfc) + 1);
    assert_eq!(second.read(0x100), 0x0403_0201);
}

#[test]
fn states_that_no_driver_can_have_made_are_refused() {
    let memory = Arc::new(crate::memory::create(4 << 20).unwrap());
    let mut first = rng(&memory);
    bring_up(&mut first, RING);
    let good = saved(&first);
    rng(&memory).restore(&good).unwrap();
    let refused = |change: fn(&mut TransportState)| {
        let mut state = good.clone();
        change(&mut state);
        rng(&memory).restore(&state).unwrap_err()
    };
    for (what, error, expected) in [
        (
            "features",
            refused(|state| state.accepted |= 1 << 3),
            "features",
        ),
        (
            "no queue",
            refused(|state| state.queues.clear()),
            "0 queues",
        ),
        (
            "two queues",
            refused(|state| state.queues.extend_from_within(..)),
            "2 queues",
        ),
        (
            "outside",
            refused(|state| state.queues[0].move_to(1 << 40)),
            "queue 0",
        ),
        (
            "askew",
            refused(|state| state.queues[0].move_to(0x1001)),
            "queue 0",
        ),
        (
            "size",
            refused(|state| state.queues[0].resize(32)),
            "queue 0",
        ),
        (
            "odd size",
            refused(|state| state.queues[0].resize(3)),
            "queue 0",
        ),
    ] {
        assert!(error.to_string().contains(expected), "{what}: {error}");
    }
}
