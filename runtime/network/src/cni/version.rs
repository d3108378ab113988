// SPDX-License-Identifier: Apache-2.0
//! The versions of the CNI protocol, and which of them a chain is run with.
//!
//! Source: the CNI specification 1.1.0, "Version considerations" and "VERSION". If a configuration lists several
//! versions, the highest one is used that we and all its plugins support. If it names one version, that is used.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The supported versions, oldest first. Before 0.3.0 the results had another format, and there were no chains of
/// plugins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Version {
    #[serde(rename = "0.3.0")]
    V0_3_0,
    #[serde(rename = "0.3.1")]
    V0_3_1,
    #[serde(rename = "0.4.0")]
    V0_4_0,
    #[serde(rename = "1.0.0")]
    V1_0_0,
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl Version {
    const ALL: [(Self, &'static str); 5] = [
        (Self::V0_3_0, "0.3.0"),
        (Self::V0_3_1, "0.3.1"),
        (Self::V0_4_0, "0.4.0"),
        (Self::V1_0_0, "1.0.0"),
        (Self::V1_1_0, "1.1.0"),
    ];
    /// The version for a configuration that names none. It is the oldest one that has `prevResult` in `DEL`, so that
    /// old plugins support it too.
    pub const UNSAID: Self = Self::V0_4_0;

    pub fn parse(text: &str) -> Option<Self> {
        let found = Self::ALL.iter().find(|(_, name)| *name == text);
        found.map(|(version, _)| *version)
    }

    pub fn name(self) -> &'static str {
        let found = Self::ALL.iter().find(|(version, _)| *version == self);
        found.map_or("", |(_, name)| name)
    }

    /// Parses a plugin's answer to `VERSION`. Versions that we do not know are left out.
    pub fn supported(answer: &Value) -> Option<Vec<Self>> {
        let listed = answer.get("supportedVersions")?.as_array()?;
        let known = listed.iter().filter_map(|text| Self::parse(text.as_str()?));
        Some(known.collect())
    }

    /// The versions that a configuration allows, newest first and at least one. The error says why there is none.
    pub fn allowed(one: Option<&Value>, several: Option<&Value>) -> Result<Vec<Self>, String> {
        let text = |value: &Value| match value.as_str() {
            Some(text) => Ok(text.to_owned()),
            None => Err(format!("{value} is not a version")),
        };
        let mut names = one.map(text).transpose()?.into_iter().collect::<Vec<_>>();
        if let Some(several) = several {
            let list = several
                .as_array()
                .ok_or_else(|| "cniVersions is not a list".to_owned())?;
            for value in list {
                names.push(text(value)?);
            }
        }
        names.retain(|name| !name.is_empty());
        if names.is_empty() {
            return Ok(vec![Self::UNSAID]);
        }
        let mut known: Vec<_> = names.iter().filter_map(|name| Self::parse(name)).collect();
        known.sort_unstable_by(|a, b| b.cmp(a));
        known.dedup();
        if known.is_empty() {
            return Err(format!(
                "cniVersion {} is none of {}",
                names.join(", "),
                Self::ALL.map(|(_, name)| name).join(", ")
            ));
        }
        Ok(known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_allows_the_versions_that_we_know() {
        let allowed = |one: Value, several: Value| {
            let there = |value: &Value| !value.is_null();
            Version::allowed(
                Some(&one).filter(|v| there(v)),
                Some(&several).filter(|v| there(v)),
            )
        };
        let json = serde_json::json!(["1.0.0", "9.0.0", "1.1.0"]);
        assert_eq!(
            allowed("1.0.0".into(), json).unwrap(),
            [Version::V1_1_0, Version::V1_0_0]
        );
        assert_eq!(
            allowed(Value::Null, Value::Null).unwrap(),
            [Version::UNSAID]
        );
        assert_eq!(
            allowed("0.3.1".into(), Value::Null).unwrap(),
            [Version::V0_3_1]
        );
        for (one, several) in [
            ("0.2.0".into(), Value::Null),
            (3.into(), Value::Null),
            ("1.0.0".into(), "1.1.0".into()),
        ] {
            assert!(allowed(one, several).is_err());
        }
    }

    #[test]
    fn versions_are_stored_by_their_names() {
        for (version, name) in Version::ALL {
            assert_eq!(version.name(), name);
            assert_eq!(serde_json::to_value(version).unwrap(), name);
        }
    }
}
