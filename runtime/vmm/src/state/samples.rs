// SPDX-License-Identifier: Apache-2.0
//! States for tests of the format, with any content.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES};
use serde::de::DeserializeOwned;

use super::cpuid::Leaf;
use super::machine::VmState;
use super::msrs::Msr;
use super::origin::Origin;
use super::vcpu::{MOST_XSAVE_WORDS, VcpuState};
use super::{MOST_VCPUS, State};
use crate::bus::DeviceStates;
use crate::devices::saved::TransportState;
use crate::devices::serial::SerialRegisters;

/// How much a state has of what may be more or less.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub vcpus: usize,
    pub words: usize,
    pub leaves: usize,
    pub msrs: usize,
    pub devices: usize,
}

impl Shape {
    pub const SMALL: Self = Self {
        vcpus: 1,
        words: 4,
        leaves: 2,
        msrs: 2,
        devices: 1,
    };
}

/// Numbers that follow from a seed.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        // Knuth's MMIX generator. Its high bits are the good ones.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        self.0 ^ self.0 >> 33
    }

    fn word(&mut self) -> u32 {
        u32::try_from(self.next() >> 32).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    /// A structure of KVM with any bytes.
    fn structure<T: DeserializeOwned>(&mut self) -> T {
        let bytes: Vec<u8> = (0..size_of::<T>()).map(|_| self.byte()).collect();
        let spelled = postcard::to_allocvec(&bytes).unwrap();
        postcard::from_bytes(&spelled).unwrap()
    }

    fn leaf(&mut self) -> Leaf {
        Leaf {
            function: self.word(),
            index: self.word(),
            flags: self.word(),
            registers: std::array::from_fn(|_| self.word()),
        }
    }

    fn vcpu(&mut self, shape: Shape) -> VcpuState {
        VcpuState {
            run_state: self.structure(),
            registers: self.structure(),
            special: self.structure(),
            xsave: (0..shape.words).map(|_| self.word()).collect(),
            xcrs: self.structure(),
            debug: self.structure(),
            apic: self.structure(),
            tsc_khz: self.word(),
            tsc_offset: self.next(),
            leaves: (0..shape.leaves).map(|_| self.leaf()).collect(),
            msrs: (0..shape.msrs)
                .map(|_| Msr {
                    index: self.word(),
                    data: self.next(),
                })
                .collect(),
            events: self.structure(),
        }
    }
}

/// A state that follows from a seed.
pub fn sample(seed: u64, shape: Shape) -> State {
    let mut numbers = Numbers(seed);
    let kernel = std::array::from_fn(|_| numbers.byte());
    let leaves = (0..shape.leaves).map(|_| numbers.leaf()).collect();
    State {
        origin: Origin::new("0.1.0", kernel, leaves),
        vm: VmState {
            clock: numbers.next(),
            chips: std::array::from_fn(|_| numbers.structure()),
        },
        vcpus: (0..shape.vcpus).map(|_| numbers.vcpu(shape)).collect(),
        devices: DeviceStates {
            serial: SerialRegisters::default(),
            transports: (0..shape.devices)
                .map(|_| TransportState::sample(|| numbers.next()))
                .collect(),
        },
    }
}

/// A state with as much of everything as there may be, and `more` vCPUs.
pub fn largest(more: usize) -> State {
    let shape = Shape {
        vcpus: MOST_VCPUS.saturating_add(more),
        words: MOST_XSAVE_WORDS,
        leaves: KVM_MAX_CPUID_ENTRIES,
        msrs: KVM_MAX_MSR_ENTRIES,
        devices: 8,
    };
    sample(1, shape)
}
