// SPDX-License-Identifier: Apache-2.0
//! Names of shares: a letter that says whether the host's mounts below it change while it is
//! shared, and a number that is used once. `p12`, `s3`.

use std::fmt;

/// Whether mounts and unmounts of the host below a share show in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Propagation {
    /// They do not; the guest may remember names and attributes for a while.
    Private,
    /// They do, and the guest asks each time.
    Slave,
}

/// The name of a share below [`super::SHARES`], and in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ShareName {
    pub propagation: Propagation,
    /// Not 0. Never used again as long as its server lives.
    pub number: u16,
}

impl ShareName {
    /// Reads a name; only the one spelling of each is one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let propagation = match text.chars().next()? {
            'p' => Propagation::Private,
            's' => Propagation::Slave,
            _ => return None,
        };
        let number: u16 = text.get(1..)?.parse().ok()?;
        let name = Self {
            propagation,
            number,
        };
        (number != 0 && name.to_string() == text).then_some(name)
    }
}

impl fmt::Display for ShareName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self.propagation {
            Propagation::Private => 'p',
            Propagation::Slave => 's',
        };
        write!(f, "{letter}{}", self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_spelling() {
        for (text, propagation, number) in [
            ("p1", Propagation::Private, 1),
            ("s65535", Propagation::Slave, u16::MAX),
        ] {
            let name = ShareName {
                propagation,
                number,
            };
            assert_eq!(ShareName::parse(text), Some(name));
            assert_eq!(name.to_string(), text);
        }
        for text in [
            "", "p", "p0", "p01", "p+1", "p65536", "x1", "p1 ", "..", "é1",
        ] {
            assert_eq!(ShareName::parse(text), None, "{text:?}");
        }
    }
}
