// SPDX-License-Identifier: Apache-2.0
//! Which images this machine can run: operating system, architecture, and how much of it the CPU has (`variant` of
//! OCI's image index). An x86-64 CPU has one of the levels v1 to v4 of the psABI.

use std::fmt;

use serde::Deserialize;

const OS: &str = "linux";
/// The level of an image that does not name one. Each CPU has it.
const BASELINE: u8 = 1;

/// What an image is for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Platform {
    architecture: String,
    os: String,
    variant: Option<String>,
}

impl Platform {
    /// What an image's configuration says.
    pub fn new(os: Option<String>, architecture: Option<String>) -> Self {
        Self {
            architecture: architecture.unwrap_or_default(),
            os: os.unwrap_or_default(),
            variant: None,
        }
    }

    /// Whether it is for machines like this one, as far as it says what it is for.
    pub fn suits_this_machine(&self) -> bool {
        let machine = Machine::this();
        let same = |said: &str, own: &str| said.is_empty() || said == own;
        same(&self.os, OS) && same(&self.architecture, machine.architecture)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant
            .iter()
            .try_for_each(|variant| write!(f, "/{variant}"))
    }
}

/// A machine that runs images.
#[derive(Debug)]
pub struct Machine {
    /// By Go's name.
    architecture: &'static str,
    /// The highest level of this architecture that the CPU has.
    level: u8,
}

impl Machine {
    pub fn this() -> Self {
        match std::env::consts::ARCH {
            "x86_64" => Self::new("amd64", cpu_level()),
            "aarch64" => Self::new("arm64", BASELINE),
            other => Self::new(other, BASELINE),
        }
    }

    pub fn new(architecture: &'static str, level: u8) -> Self {
        Self {
            architecture,
            level,
        }
    }

    /// How much of the CPU an image of this platform uses, if the machine can run it.
    pub fn suits(&self, platform: &Platform) -> Option<u8> {
        if platform.os != OS || platform.architecture != self.architecture {
            return None;
        }
        let variant = platform.variant.as_deref().unwrap_or_default();
        let level = match (self.architecture, variant) {
            (_, "") | ("amd64", "v1") | ("arm64", "v8") => BASELINE,
            ("amd64", "v2") => 2,
            ("amd64", "v3") => 3,
            ("amd64", "v4") => 4,
            _ => return None,
        };
        (level <= self.level).then_some(level)
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{OS}/{}", self.architecture)
    }
}

/// The level of this CPU (x86-64 psABI, table "Micro-Architecture Levels").
#[cfg(target_arch = "x86_64")]
fn cpu_level() -> u8 {
    use std::arch::is_x86_feature_detected as has;
    let v2 = has!("cmpxchg16b")
        && has!("popcnt")
        && has!("sse3")
        && has!("ssse3")
        && has!("sse4.1")
        && has!("sse4.2");
    let v3 = has!("avx")
        && has!("avx2")
        && has!("bmi1")
        && has!("bmi2")
        && has!("f16c")
        && has!("fma")
        && has!("lzcnt")
        && has!("movbe");
    let v4 = has!("avx512f")
        && has!("avx512bw")
        && has!("avx512cd")
        && has!("avx512dq")
        && has!("avx512vl");
    match (v2, v3, v4) {
        (true, true, true) => 4,
        (true, true, false) => 3,
        (true, false, _) => 2,
        (false, ..) => BASELINE,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_level() -> u8 {
    BASELINE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        let mut parts = text.split('/').map(str::to_owned);
        Platform {
            os: parts.next().unwrap(),
            architecture: parts.next().unwrap(),
            variant: parts.next(),
        }
    }

    #[test]
    fn a_machine_runs_images_of_its_own_kind_only() {
        let amd64 = Machine::new("amd64", 3);
        let arm64 = Machine::new("arm64", BASELINE);
        for (machine, text, level) in [
            (&amd64, "linux/amd64", Some(1)),
            (&amd64, "linux/amd64/v3", Some(3)),
            (&amd64, "linux/amd64/v4", None),
            (&amd64, "linux/amd64/v8", None),
            (&amd64, "windows/amd64", None),
            (&amd64, "unknown/unknown", None),
            (&arm64, "linux/arm64/v8", Some(1)),
            (&arm64, "linux/arm64/v9", None),
            (&arm64, "linux/arm/v7", None),
        ] {
            assert_eq!(machine.suits(&platform(text)), level, "{text}");
        }
    }

    #[test]
    fn a_configuration_that_says_nothing_is_believed() {
        assert!(Platform::default().suits_this_machine());
        let this = Machine::this();
        assert!(platform(&this.to_string()).suits_this_machine());
        assert!(!platform("linux/pdp11").suits_this_machine());
        assert!(!platform(&format!("plan9/{}", this.architecture)).suits_this_machine());
    }
}
