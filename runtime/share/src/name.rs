// SPDX-License-Identifier: Apache-2.0
//! Names of shares, such as `p12` or `s3`: a letter that says whether the host's mounts below the share
//! propagate into it, and a number that is used only once.

use std::fmt;

/// Whether the host's later mounts and unmounts below a share appear in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Propagation {
    /// They do not. The guest may cache names and attributes for a short time.
    Private,
    /// They do. The guest asks the server each time.
    Slave,
}

/// The name of a share, both below [`super::SHARES`] and in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ShareName {
    pub propagation: Propagation,
    /// Never 0, and never used again during the life of its server.
    pub number: u16,
}

impl ShareName {
    /// Reads a name. Only the canonical spelling is accepted, for example no leading zeroes.
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

    #[test]
    fn for_all_numbers_a_name_is_read_as_it_is_written() {
        for number in 0..=u16::MAX {
            for propagation in [Propagation::Private, Propagation::Slave] {
                let name = ShareName {
                    propagation,
                    number,
                };
                let read = ShareName::parse(&name.to_string());
                assert_eq!(read, Some(name).filter(|_| number != 0));
            }
        }
    }
}
