// SPDX-License-Identifier: Apache-2.0
//! What an attempt can do: system calls, with what the VMM holds and with what an attacker knows of the host.
//!
//! Every call of an attempt goes through [`World::call`]. It says beforehand whether the list of the thread has the call,
//! so that what a filter did can be compared with what its list says. In a rehearsal it makes no call and notes it.

use std::cell::RefCell;
use std::ffi::CStr;
use std::marker::PhantomData;

use bulkhead_jail::syscalls::{List, Rule, When};
use bulkhead_vmm::inherited::Inherited;
use syscalls::x86_64::Sysno;

use crate::facts::Facts;
use crate::sys;

/// Whether an attempt found what it was looking for, or the number of errno(3).
pub type Tried = Result<bool, i32>;

/// What a call of a program of 32 bits is called here.
pub const CALL_OF_32_BITS: &str = "a call of 32 bits";

/// The number of a call, and its arguments.
pub type Call = (Sysno, [usize; 6]);

/// One argument of a system call. What it points to lives as long as it.
#[derive(Clone, Copy, Debug)]
pub struct Word<'a>(usize, PhantomData<&'a [u8]>);

impl Word<'_> {
    const fn of(word: usize) -> Self {
        Self(word, PhantomData)
    }

    /// The word as it stands in a structure that has an address in it.
    pub fn bits(self) -> usize {
        self.0
    }
}

impl From<i32> for Word<'_> {
    fn from(number: i32) -> Self {
        Self::of((number as isize).cast_unsigned())
    }
}

impl From<u32> for Word<'_> {
    fn from(number: u32) -> Self {
        Self::of(number as usize)
    }
}

impl From<u64> for Word<'_> {
    fn from(number: u64) -> Self {
        Self::of(usize::try_from(number).unwrap_or(usize::MAX))
    }
}

impl From<i64> for Word<'_> {
    fn from(number: i64) -> Self {
        Self::from(number.cast_unsigned())
    }
}

impl From<usize> for Word<'_> {
    fn from(number: usize) -> Self {
        Self::of(number)
    }
}

impl<'a> From<&'a CStr> for Word<'a> {
    fn from(text: &'a CStr) -> Self {
        Self::of(text.as_ptr() as usize)
    }
}

impl<'a, T> From<&'a [T]> for Word<'a> {
    fn from(read: &'a [T]) -> Self {
        Self::of(read.as_ptr() as usize)
    }
}

impl<'a, T> From<&'a mut [T]> for Word<'a> {
    fn from(written: &'a mut [T]) -> Self {
        Self::of(written.as_mut_ptr() as usize)
    }
}

impl<'a, T, const N: usize> From<&'a [T; N]> for Word<'a> {
    fn from(read: &'a [T; N]) -> Self {
        Self::from(read.as_slice())
    }
}

impl<'a, T, const N: usize> From<&'a mut [T; N]> for Word<'a> {
    fn from(written: &'a mut [T; N]) -> Self {
        Self::from(written.as_mut_slice())
    }
}

/// Makes the system call of this name. A macro, because arguments are of many types.
macro_rules! call {
    ($world:expr, $name:ident $(, $argument:expr)* $(,)?) => {
        $world.call(::syscalls::x86_64::Sysno::$name, &[$($crate::world::Word::from($argument)),*])
    };
}
pub(crate) use call;

/// Descriptors that the VMM holds, by number.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    pub input: i32,
    pub log: i32,
    pub report: i32,
    pub kvm: i32,
    pub kernel: i32,
    pub initramfs: i32,
    pub console: i32,
    pub control: i32,
    pub vsock: i32,
    pub ready: i32,
    pub tap: i32,
    pub scratch: i32,
    /// The modules of the guest's kernel.
    pub modules: i32,
    /// A layer of an image, as the daemon attaches one.
    pub layer: i32,
    /// The VM and its only vCPU.
    pub vm: i32,
    pub vcpu: i32,
}

impl Held {
    /// What is inherited, without what comes later.
    pub fn inherited() -> Self {
        Self {
            input: 0,
            log: 2,
            report: Inherited::ExitReport.number(),
            kvm: Inherited::Kvm.number(),
            kernel: Inherited::Kernel.number(),
            initramfs: Inherited::Initramfs.number(),
            console: Inherited::Console.number(),
            control: Inherited::Control.number(),
            vsock: Inherited::Vsock.number(),
            ready: Inherited::Ready.number(),
            tap: Inherited::Tap.number(),
            scratch: Inherited::Scratch.number(),
            modules: Inherited::Modules.number(),
            layer: -1,
            vm: -1,
            vcpu: -1,
        }
    }
}

/// How calls are made.
#[derive(Debug)]
enum Mode {
    /// In a thread that has this list, if any.
    Real {
        list: Option<&'static List>,
        /// Learns which call the list does not have, before the call is made.
        before_refusal: fn(&str),
    },
    /// Not at all: each is noted, and succeeds.
    Rehearsal(RefCell<Vec<Call>>),
}

#[derive(Debug)]
pub struct World {
    pub held: Held,
    pub facts: Facts,
    mode: Mode,
}

impl World {
    /// The world of a process whose only thread has this list.
    pub fn real(
        held: Held,
        facts: Facts,
        list: Option<&'static List>,
        before_refusal: fn(&str),
    ) -> Self {
        let mode = Mode::Real {
            list,
            before_refusal,
        };
        Self { held, facts, mode }
    }

    /// A world in which nothing happens.
    pub fn rehearsal() -> Self {
        Self {
            held: Held::inherited(),
            facts: Facts::default(),
            mode: Mode::Rehearsal(RefCell::default()),
        }
    }

    /// The calls of a rehearsal.
    pub fn rehearsed(self) -> Vec<Call> {
        match self.mode {
            Mode::Rehearsal(calls) => calls.into_inner(),
            Mode::Real { .. } => Vec::new(),
        }
    }

    /// Whether calls are really made.
    pub fn is_real(&self) -> bool {
        matches!(self.mode, Mode::Real { .. })
    }

    pub fn call(&self, call: Sysno, words: &[Word<'_>]) -> Result<usize, i32> {
        let mut arguments = [0; 6];
        for (argument, word) in arguments.iter_mut().zip(words) {
            *argument = word.bits();
        }
        match &self.mode {
            Mode::Real {
                list,
                before_refusal,
            } => {
                if list.is_some_and(|list| !allows(list, call, &arguments)) {
                    before_refusal(call.name());
                }
                sys::call(usize::try_from(call.id()).unwrap_or(usize::MAX), arguments)
            }
            Mode::Rehearsal(calls) => {
                calls.borrow_mut().push((call, arguments));
                // A descriptor or a process number that does no harm.
                Ok(1)
            }
        }
    }

    /// Makes a call without arguments as a program of 32 bits does. No list has any.
    pub fn call_of_32_bits(&self, number: i32) -> Result<i32, i32> {
        match &self.mode {
            Mode::Real {
                list,
                before_refusal,
            } => {
                if list.is_some() {
                    before_refusal(CALL_OF_32_BITS);
                }
                match sys::call_of_32_bits(number) {
                    refused if refused < 0 => Err(-refused),
                    result => Ok(result),
                }
            }
            Mode::Rehearsal(calls) => {
                calls.borrow_mut().push((Sysno::uselib, [0; 6]));
                Ok(1)
            }
        }
    }

    /// As [`Self::call`], for a result that is a descriptor.
    pub fn descriptor(&self, call: Sysno, words: &[Word<'_>]) -> Result<i32, i32> {
        let fd = self.call(call, words)?;
        Ok(i32::try_from(fd).unwrap_or(-1))
    }

    /// Ends a child that an attempt has made.
    pub fn exit(&self, code: i32) -> bool {
        let _ = call!(self, exit_group, code);
        true
    }

    /// Runs a part in a child. Returns its wait status.
    pub fn in_child(&self, part: impl FnOnce(&Self)) -> Result<i32, i32> {
        let child = call!(self, fork)?;
        if child == 0 {
            part(self);
            self.exit(0);
        }
        let mut status = [0i32];
        call!(self, wait4, child, &mut status, 0, 0)?;
        Ok(status[0])
    }
}

/// Whether a list has a call with these arguments. Every list has `exit_group`, by which a process ends after a forbidden
/// call; `clone3` is answered to all, and ends nothing.
pub fn allows(list: &List, call: Sysno, arguments: &[usize; 6]) -> bool {
    matches!(call, Sysno::exit_group | Sysno::clone3)
        || list
            .all()
            .any(|rule| rule.call == call && has(rule, arguments))
}

fn has(rule: &Rule, arguments: &[usize; 6]) -> bool {
    let argument = |number: u8| arguments.get(usize::from(number)).copied().unwrap_or(0) as u64;
    match rule.when {
        When::Always => true,
        When::OneOf(number, values) => {
            let low = argument(number) & u64::from(u32::MAX);
            values.iter().any(|&value| u64::from(value) == low)
        }
        When::Without(number, bits) => argument(number) & bits == 0,
    }
}
