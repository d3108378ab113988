// SPDX-License-Identifier: Apache-2.0
//! Names of devices, `vendor.com/class=device`, and of kinds, `vendor.com/class`.

use std::fmt;

/// Why a text is not a name. The parts of names are ASCII; the specification says which characters they may have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    #[error("{0:?} is not the name of a CDI device: it must be VENDOR/CLASS=DEVICE")]
    Unqualified(String),
    #[error(
        "{part:?} cannot be in the name of a CDI {what}: it must be made of letters, digits and {others:?}, begin with \
         {first} and end with a letter or digit"
    )]
    Characters {
        what: &'static str,
        part: String,
        others: &'static str,
        first: &'static str,
    },
    #[error("{0:?} is not a kind of CDI devices: it must be VENDOR/CLASS")]
    Kind(String),
}

/// The name of one device, checked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceName {
    kind: String,
    device: String,
}

impl DeviceName {
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let unqualified = || NameError::Unqualified(text.to_owned());
        let (kind, device) = text.split_once('=').ok_or_else(unqualified)?;
        check_kind(kind).map_err(|_| unqualified())?;
        check_device(device)?;
        Ok(Self {
            kind: kind.to_owned(),
            device: device.to_owned(),
        })
    }

    /// Vendor and class.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The name among the devices of its kind.
    pub fn device(&self) -> &str {
        &self.device
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.kind, self.device)
    }
}

/// Checks a kind and returns its class.
pub fn check_kind(kind: &str) -> Result<&str, NameError> {
    let parts = kind.split_once('/');
    let (vendor, class) = parts.ok_or_else(|| NameError::Kind(kind.to_owned()))?;
    let letter = |c: char| c.is_ascii_alphabetic();
    for part in [vendor, class] {
        if !is_made_of(part, letter, "_-.") {
            return Err(NameError::Characters {
                what: "kind",
                part: part.to_owned(),
                others: "_-.",
                first: "a letter",
            });
        }
    }
    Ok(class)
}

/// Checks the name of a device among those of its kind.
pub fn check_device(device: &str) -> Result<(), NameError> {
    let first = |c: char| c.is_ascii_alphanumeric();
    if is_made_of(device, first, "_-.:") {
        return Ok(());
    }
    Err(NameError::Characters {
        what: "device",
        part: device.to_owned(),
        others: "_-.:",
        first: "a letter or digit",
    })
}

fn is_made_of(text: &str, first: impl Fn(char) -> bool, others: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || others.contains(c);
    text.starts_with(first)
        && text.ends_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_a_vendor_a_class_and_a_device() {
        for text in [
            "vendor.com/class=device",
            "v/c=0",
            "nvidia.com/gpu=all",
            "nvidia.com/mig-x=GPU-5e:1.2_3",
            "a/b.c=x",
        ] {
            assert_eq!(DeviceName::parse(text).unwrap().to_string(), text);
        }
        for text in [
            "",
            "device",
            "/dev/null",
            "vendor.com/class",
            "vendor.com=device",
            "vendor.com/class=",
            "vendor.com/=device",
            "/class=device",
            "1vendor/class=device",
            "vendor/class.=device",
            "vendor/cl/ass=device",
            "vendor/class=de=vice",
            "vendor/class=-device",
            "vendor/class=device-",
            "vendor/class=de vice",
            "vendor/class=d\u{e4}d",
        ] {
            assert!(DeviceName::parse(text).is_err(), "{text}");
        }
    }
}
