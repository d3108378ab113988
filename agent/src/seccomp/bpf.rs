// SPDX-License-Identifier: Apache-2.0
//! Compiles a [`Filter`] to classic BPF.
//!
//! The program checks the architecture, then finds the system call by a binary search over ranges of numbers
//! with the same rules, then tests arguments. It is written from its end to its start, so that every jump target
//! exists already when it is needed. A conditional jump reaches only 255 instructions. If its target is farther
//! away, a return is written again, and anything else is reached through an unconditional jump.

use std::collections::HashMap;

use super::{Action, Comparison, Condition, Filter, Rule, SeccompError};

const MAX_INSTRUCTIONS: usize = 4096;
/// A little less than a jump field holds, because reaching one target may push the other one further away.
const REACH: usize = 250;

pub(super) const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// System call numbers from here on belong to the x32 ABI.
const X32_BIT: u32 = 0x4000_0000;
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGUMENTS: u32 = 16;

pub(super) const LOAD: u16 = 0x20;
pub(super) const AND: u16 = 0x54;
pub(super) const JUMP: u16 = 0x05;
pub(super) const JUMP_EQUAL: u16 = 0x15;
pub(super) const JUMP_GREATER: u16 = 0x25;
pub(super) const JUMP_GREATER_EQUAL: u16 = 0x35;
pub(super) const RETURN: u16 = 0x06;

impl Action {
    fn return_value(self) -> u32 {
        match self {
            Self::KillProcess => 0x8000_0000,
            Self::KillThread => 0,
            Self::Trap => 0x0003_0000,
            Self::Errno(errno) => 0x0005_0000 | u32::from(errno),
            Self::Trace(message) => 0x7ff0_0000 | u32::from(message),
            Self::Log => 0x7ffc_0000,
            Self::Allow => 0x7fff_0000,
        }
    }
}

pub fn compile(filter: &Filter) -> Result<Vec<u64>, SeccompError> {
    let mut code = Code::default();
    let ranges = ranges(filter);
    let search = code.search(&ranges, filter.default);
    let foreign = code.give(Action::Errno(errno(libc::EPERM)));
    let number = code.branch(JUMP_GREATER_EQUAL, X32_BIT, foreign, search);
    let number = code.load(OFFSET_NUMBER, number);
    let killed = code.give(Action::KillProcess);
    let arch = code.branch(JUMP_EQUAL, AUDIT_ARCH_X86_64, number, killed);
    code.load(OFFSET_ARCH, arch);
    code.finish()
}

pub fn errno(number: i32) -> u16 {
    u16::try_from(number).unwrap_or(1)
}

/// The numbers from `start` to the start of the next range, which have the same rules.
struct Range<'a> {
    start: u32,
    rules: &'a [Rule],
}

fn ranges(filter: &Filter) -> Vec<Range<'_>> {
    let mut ranges = vec![Range {
        start: 0,
        rules: &[],
    }];
    let mut push = |start: u32, rules| match ranges.last_mut() {
        Some(last) if last.rules == rules => {}
        Some(last) if last.start == start => last.rules = rules,
        _ => ranges.push(Range { start, rules }),
    };
    for (number, rules) in &filter.rules {
        push(*number, rules.as_slice());
        if !filter.rules.contains_key(&(number + 1)) {
            push(number + 1, &[]);
        }
    }
    ranges
}

/// An instruction that has been written already, counted from the end of the program.
type Node = usize;

/// The program in reverse order: the last instruction comes first.
#[derive(Default)]
struct Code {
    reversed: Vec<u64>,
    returns: HashMap<u32, Node>,
}

impl Code {
    fn search(&mut self, ranges: &[Range<'_>], default: Action) -> Node {
        match ranges {
            [] => self.give(default),
            [range] => self.decide(range.rules, default),
            _ => {
                let (low, high) = ranges.split_at(ranges.len() / 2);
                let middle = high.first().map_or(0, |range| range.start);
                let high = self.search(high, default);
                let low = self.search(low, default);
                self.branch(JUMP_GREATER_EQUAL, middle, high, low)
            }
        }
    }

    /// Writes the rules of one call. A rule without conditions applies when no rule with conditions does.
    fn decide(&mut self, rules: &[Rule], default: Action) -> Node {
        let plain = rules.iter().find(|rule| rule.conditions.is_empty());
        let last = plain.map_or(default, |rule| rule.action);
        let mut next = self.give(last);
        for rule in rules
            .iter()
            .rev()
            .filter(|rule| !rule.conditions.is_empty())
        {
            // Write the action again for each rule, so that it stays within reach.
            let mut matched = self.give(rule.action);
            for condition in &rule.conditions {
                matched = self.test(condition, matched, next);
            }
            next = matched;
        }
        next
    }

    /// Writes the test of an argument. BPF has 32 bits, so the halves are compared, the upper one first.
    fn test(&mut self, condition: &Condition, yes: Node, no: Node) -> Node {
        let [l0, l1, l2, l3, h0, h1, h2, h3] = condition.value.to_le_bytes();
        let low = u32::from_le_bytes([l0, l1, l2, l3]);
        let high = u32::from_le_bytes([h0, h1, h2, h3]);
        let at = OFFSET_ARGUMENTS + 8 * u32::from(condition.argument);
        match condition.comparison {
            Comparison::Equal => self.equal(at, None, (high, low), yes, no),
            Comparison::NotEqual => self.equal(at, None, (high, low), no, yes),
            Comparison::MaskedEqual(mask) => self.equal(at, Some(mask), (high, low), yes, no),
            Comparison::Greater => self.ordered(at, JUMP_GREATER, (high, low), yes, no),
            Comparison::GreaterOrEqual => {
                self.ordered(at, JUMP_GREATER_EQUAL, (high, low), yes, no)
            }
            Comparison::LessOrEqual => self.ordered(at, JUMP_GREATER, (high, low), no, yes),
            Comparison::Less => self.ordered(at, JUMP_GREATER_EQUAL, (high, low), no, yes),
        }
    }

    fn equal(
        &mut self,
        at: u32,
        mask: Option<u64>,
        (high, low): (u32, u32),
        yes: Node,
        no: Node,
    ) -> Node {
        let [l0, l1, l2, l3, h0, h1, h2, h3] = mask.unwrap_or(u64::MAX).to_le_bytes();
        let (mask_low, mask_high) = (
            u32::from_le_bytes([l0, l1, l2, l3]),
            u32::from_le_bytes([h0, h1, h2, h3]),
        );
        let compare_low = self.branch(JUMP_EQUAL, low, yes, no);
        let load_low = self.load_masked(at, mask_low, compare_low);
        let compare_high = self.branch(JUMP_EQUAL, high, load_low, no);
        self.load_masked(at + 4, mask_high, compare_high)
    }

    fn ordered(
        &mut self,
        at: u32,
        comparison: u16,
        (high, low): (u32, u32),
        yes: Node,
        no: Node,
    ) -> Node {
        let compare_low = self.branch(comparison, low, yes, no);
        let load_low = self.load(at, compare_low);
        let same_high = self.branch(JUMP_EQUAL, high, load_low, no);
        let compare_high = self.branch(JUMP_GREATER, high, yes, same_high);
        self.load(at + 4, compare_high)
    }

    fn load_masked(&mut self, at: u32, mask: u32, next: Node) -> Node {
        let next = if mask == u32::MAX {
            next
        } else {
            self.then(AND, mask, next)
        };
        self.load(at, next)
    }

    fn load(&mut self, offset: u32, next: Node) -> Node {
        self.then(LOAD, offset, next)
    }

    /// Writes an instruction that continues with `next`.
    fn then(&mut self, code: u16, k: u32, next: Node) -> Node {
        if next + 1 != self.reversed.len() {
            self.jump(next);
        }
        self.push(code, 0, 0, k)
    }

    fn branch(&mut self, code: u16, k: u32, yes: Node, no: Node) -> Node {
        let yes = self.within_reach(yes);
        let no = self.within_reach(no);
        // Both are at most REACH + 1 away, which fits one byte.
        let distance = |len: usize, node: Node| u8::try_from(len - node - 1).unwrap_or(u8::MAX);
        let len = self.reversed.len();
        self.push(code, distance(len, yes), distance(len, no), k)
    }

    fn within_reach(&mut self, node: Node) -> Node {
        if self.reversed.len() - node > REACH {
            self.jump(node)
        } else {
            node
        }
    }

    fn jump(&mut self, to: Node) -> Node {
        let distance = u32::try_from(self.reversed.len() - to - 1).unwrap_or(u32::MAX);
        self.push(JUMP, 0, 0, distance)
    }

    fn give(&mut self, action: Action) -> Node {
        let value = action.return_value();
        if let Some(node) = self.returns.get(&value)
            && self.reversed.len() - node < REACH / 2
        {
            return *node;
        }
        let node = self.push(RETURN, 0, 0, value);
        self.returns.insert(value, node);
        node
    }

    fn push(&mut self, code: u16, jt: u8, jf: u8, k: u32) -> Node {
        let [c0, c1] = code.to_le_bytes();
        let [k0, k1, k2, k3] = k.to_le_bytes();
        self.reversed
            .push(u64::from_le_bytes([c0, c1, jt, jf, k0, k1, k2, k3]));
        self.reversed.len() - 1
    }

    fn finish(self) -> Result<Vec<u64>, SeccompError> {
        if self.reversed.len() > MAX_INSTRUCTIONS {
            return Err(SeccompError::TooLong(self.reversed.len()));
        }
        Ok(self.reversed.into_iter().rev().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seccomp::machine::{ALLOWED, DENIED, run, verdict};

    fn rule(conditions: &[(u8, Comparison, u64)], action: Action) -> Rule {
        let conditions = conditions
            .iter()
            .map(|(argument, comparison, value)| Condition {
                argument: *argument,
                comparison: *comparison,
                value: *value,
            })
            .collect();
        Rule { conditions, action }
    }

    #[test]
    fn foreign_architectures_do_not_pass() {
        let program = compile(&Filter::new(Action::Allow)).unwrap();
        assert_eq!(run(&program, 0x4000_0003, 1, [0; 6]), 0x8000_0000);
        assert_eq!(verdict(&program, X32_BIT | 1, [0; 6]), DENIED);
        assert_eq!(verdict(&program, 1, [0; 6]), ALLOWED);
    }

    #[test]
    fn every_number_gets_its_own_answer() {
        let mut filter = Filter::new(Action::Errno(1));
        // Alternating actions: no ranges can be merged, so jumps become long.
        for number in (0..900).step_by(2) {
            filter.rules.insert(
                number,
                vec![rule(&[], Action::Errno(100 + (number % 7) as u16))],
            );
        }
        let program = compile(&filter).unwrap();
        for number in 0..1000 {
            let expected = if number % 2 == 0 && number < 900 {
                0x0005_0000 | (100 + number % 7)
            } else {
                DENIED
            };
            assert_eq!(verdict(&program, number, [0; 6]), expected, "{number}");
        }
    }

    #[test]
    fn arguments_are_compared_as_64_bits() {
        use Comparison::*;
        const V: u64 = 0x1_0000_0005;
        let samples = [
            0,
            5,
            V - 1,
            V,
            V + 1,
            0x2_0000_0000,
            0x1_0000_0000,
            u64::MAX,
        ];
        type Holds = fn(u64) -> bool;
        let cases: [(Comparison, Holds); 7] = [
            (Equal, |x| x == V),
            (NotEqual, |x| x != V),
            (Less, |x| x < V),
            (LessOrEqual, |x| x <= V),
            (Greater, |x| x > V),
            (GreaterOrEqual, |x| x >= V),
            (MaskedEqual(0xf_0000_000f), |x| x & 0xf_0000_000f == V),
        ];
        for (comparison, holds) in cases {
            let mut filter = Filter::new(Action::Errno(1));
            filter
                .rules
                .insert(7, vec![rule(&[(2, comparison, V)], Action::Allow)]);
            let program = compile(&filter).unwrap();
            for x in samples {
                let expected = if holds(x) { ALLOWED } else { DENIED };
                assert_eq!(
                    verdict(&program, 7, [9, 9, x, 9, 9, 9]),
                    expected,
                    "{comparison:?} {x:#x}"
                );
            }
        }
    }

    #[test]
    fn conditions_are_anded_rules_are_ored_and_a_plain_rule_takes_the_rest() {
        let mut filter = Filter::new(Action::KillProcess);
        let both = rule(
            &[(0, Comparison::Equal, 1), (1, Comparison::Equal, 2)],
            Action::Allow,
        );
        let third = rule(&[(0, Comparison::Equal, 3)], Action::Allow);
        filter
            .rules
            .insert(1, vec![both, third, rule(&[], Action::Errno(1))]);
        let program = compile(&filter).unwrap();
        let table = [
            ([1, 2], ALLOWED),
            ([1, 1], DENIED),
            ([3, 9], ALLOWED),
            ([2, 2], DENIED),
        ];
        for ([a, b], expected) in table {
            assert_eq!(
                verdict(&program, 1, [a, b, 0, 0, 0, 0]),
                expected,
                "{a} {b}"
            );
        }
        assert_eq!(verdict(&program, 2, [0; 6]), 0x8000_0000);
    }
}
