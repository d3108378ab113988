// SPDX-License-Identifier: Apache-2.0
//! Profiles of users: OCI `linux.seccomp` objects. A profile that cannot be fulfilled completely is an error, so
//! that it never protects less than it says.

use serde::Deserialize;

use super::bpf::errno;
use super::{Action, Comparison, Condition, Filter, Rule, SeccompError};

const MAX_PROFILE_BYTES: usize = 1 << 20;
/// Go's name of this architecture.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: &str = "amd64";
const FLAG_LOG: u32 = 1 << 1;
const FLAG_SPEC_ALLOW: u32 = 1 << 2;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawProfile {
    default_action: String,
    default_errno_ret: Option<u16>,
    #[serde(default)]
    flags: Vec<String>,
    #[serde(default)]
    listener_path: String,
    #[serde(default)]
    syscalls: Vec<RawRule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawRule {
    names: Vec<String>,
    action: String,
    errno_ret: Option<u16>,
    #[serde(default)]
    args: Option<Vec<RawCondition>>,
    /// Only Docker's format has these: rules that depend on where they are used.
    includes: Option<Circumstances>,
    excludes: Option<Circumstances>,
}

/// A word that is not known is refused: a rule that applied all the same could allow what it must not.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Circumstances {
    caps: Vec<String>,
    /// By Go's names.
    arches: Vec<String>,
    /// Such as `4.8`.
    min_kernel: String,
}

/// Where a profile is used.
#[derive(Debug)]
pub struct Place<'a> {
    /// The capabilities of the container.
    pub capabilities: &'a [String],
    /// Major and minor version.
    pub kernel: (u32, u32),
}

impl RawRule {
    /// Whether the rule applies in `place`.
    fn applies(&self, place: &Place<'_>) -> Result<bool, SeccompError> {
        let has = |name: &String| place.capabilities.contains(name);
        if let Some(needs) = &self.includes {
            let is_here = needs.arches.is_empty() || needs.names_this_machine();
            if !is_here || !needs.caps.iter().all(has) || needs.is_newer_than(place)? == Some(true)
            {
                return Ok(false);
            }
        }
        let Some(unless) = &self.excludes else {
            return Ok(true);
        };
        let is_here = unless.names_this_machine() || unless.caps.iter().any(has);
        Ok(!is_here && unless.is_newer_than(place)? != Some(false))
    }
}

impl Circumstances {
    fn names_this_machine(&self) -> bool {
        self.arches.iter().any(|name| name == ARCHITECTURE)
    }

    /// Whether it names a newer kernel than that of `place`. `None` if it names none.
    fn is_newer_than(&self, place: &Place<'_>) -> Result<Option<bool>, SeccompError> {
        let text = self.min_kernel.as_str();
        if text.is_empty() {
            return Ok(None);
        }
        let wanted = version(text);
        let wanted = wanted.ok_or_else(|| SeccompError::Unsupported(format!("kernel {text}")))?;
        Ok(Some(wanted > place.kernel))
    }
}

/// Major and minor number of a version of Linux, such as `6.12.3-x`.
pub fn version(text: &str) -> Option<(u32, u32)> {
    let (major, rest) = text.split_once('.')?;
    let digits = rest.find(|c: char| !c.is_ascii_digit());
    let minor = rest.get(..digits.unwrap_or(rest.len()))?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawCondition {
    index: u8,
    value: u64,
    #[serde(default)]
    value_two: u64,
    op: String,
}

/// Parses a profile. Returns the filter and the flags for `seccomp(2)`.
pub fn parse(json: &[u8], place: &Place<'_>) -> Result<(Filter, u32), SeccompError> {
    if json.len() > MAX_PROFILE_BYTES {
        return Err(SeccompError::TooLarge);
    }
    let raw: RawProfile = serde_json::from_slice(json).map_err(SeccompError::Parse)?;
    if !raw.listener_path.is_empty() {
        return Err(SeccompError::Unsupported("listenerPath".to_owned()));
    }
    let flags = raw
        .flags
        .iter()
        .try_fold(0, |flags, name| Ok(flags | flag(name)?))?;
    let default_errno = raw.default_errno_ret;
    let mut filter = Filter::new(action(&raw.default_action, default_errno)?);
    for rule in &raw.syscalls {
        if !rule.applies(place)? {
            continue;
        }
        let action = action(&rule.action, rule.errno_ret)?;
        let conditions = rule
            .args
            .iter()
            .flatten()
            .map(condition)
            .collect::<Result<Vec<_>, _>>()?;
        for name in &rule.names {
            filter.add(
                name,
                Rule {
                    conditions: conditions.clone(),
                    action,
                },
            );
        }
    }
    Ok((filter, flags))
}

fn flag(name: &str) -> Result<u32, SeccompError> {
    match name {
        // There is only one thread when the filter is loaded, so there is nothing to synchronize.
        "SECCOMP_FILTER_FLAG_TSYNC" => Ok(0),
        "SECCOMP_FILTER_FLAG_LOG" => Ok(FLAG_LOG),
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(FLAG_SPEC_ALLOW),
        _ => Err(SeccompError::Unsupported(format!("flag {name}"))),
    }
}

fn action(name: &str, value: Option<u16>) -> Result<Action, SeccompError> {
    Ok(match name {
        "SCMP_ACT_ALLOW" => Action::Allow,
        "SCMP_ACT_ERRNO" => Action::Errno(value.unwrap_or(errno(libc::EPERM)).min(4095)),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => Action::KillThread,
        "SCMP_ACT_KILL_PROCESS" => Action::KillProcess,
        "SCMP_ACT_TRAP" => Action::Trap,
        "SCMP_ACT_TRACE" => Action::Trace(value.unwrap_or(errno(libc::EPERM))),
        "SCMP_ACT_LOG" => Action::Log,
        _ => return Err(SeccompError::Unsupported(format!("action {name}"))),
    })
}

fn condition(raw: &RawCondition) -> Result<Condition, SeccompError> {
    if raw.index > 5 {
        return Err(SeccompError::Unsupported(format!("argument {}", raw.index)));
    }
    let (comparison, value) = match raw.op.as_str() {
        "SCMP_CMP_EQ" => (Comparison::Equal, raw.value),
        "SCMP_CMP_NE" => (Comparison::NotEqual, raw.value),
        "SCMP_CMP_LT" => (Comparison::Less, raw.value),
        "SCMP_CMP_LE" => (Comparison::LessOrEqual, raw.value),
        "SCMP_CMP_GT" => (Comparison::Greater, raw.value),
        "SCMP_CMP_GE" => (Comparison::GreaterOrEqual, raw.value),
        "SCMP_CMP_MASKED_EQ" => (Comparison::MaskedEqual(raw.value), raw.value_two),
        op => return Err(SeccompError::Unsupported(format!("comparison {op}"))),
    };
    Ok(Condition {
        argument: raw.index,
        comparison,
        value,
    })
}

#[cfg(test)]
mod tests {
    use super::{Place, parse, version};
    use crate::seccomp::bpf::compile;
    use crate::seccomp::machine::{ALLOWED, DENIED, verdict};

    const PLACE: Place<'static> = Place {
        capabilities: &[],
        kernel: (6, 12),
    };

    #[test]
    fn a_rule_applies_where_it_says() {
        let admin = ["CAP_SYS_ADMIN".to_owned()];
        let applies = |words: &str, capabilities: &[String]| {
            let json = format!(
                r#"{{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{{"names": ["mkdir"],
                    "action": "SCMP_ACT_ALLOW", {words}}}]}}"#
            );
            let place = Place {
                capabilities,
                ..PLACE
            };
            let (filter, _) = parse(json.as_bytes(), &place).unwrap();
            !filter.rules.is_empty()
        };
        for (words, plain, as_admin) in [
            (r#""includes": {}, "excludes": {}"#, true, true),
            (r#""includes": null"#, true, true),
            (r#""includes": {"caps": ["CAP_SYS_ADMIN"]}"#, false, true),
            (r#""excludes": {"caps": ["CAP_SYS_ADMIN"]}"#, true, false),
            (r#""includes": {"arches": ["amd64"]}"#, true, true),
            (r#""includes": {"arches": ["s390x", "s390"]}"#, false, false),
            (r#""excludes": {"arches": ["amd64"]}"#, false, false),
            (r#""excludes": {"arches": ["s390x"]}"#, true, true),
            (r#""includes": {"minKernel": "4.8"}"#, true, true),
            (r#""includes": {"minKernel": "6.13"}"#, false, false),
            (r#""excludes": {"minKernel": "6.12"}"#, false, false),
            (r#""excludes": {"minKernel": "7.0"}"#, true, true),
            (
                r#""includes": {"caps": ["CAP_SYS_ADMIN"]}, "excludes": {"arches": ["amd64"]}"#,
                false,
                false,
            ),
        ] {
            assert_eq!(applies(words, &[]), plain, "{words}");
            assert_eq!(applies(words, &admin), as_admin, "{words} as admin");
        }
    }

    #[test]
    fn versions_of_linux_are_read() {
        assert_eq!(version("6.12.3-x"), Some((6, 12)));
        assert_eq!(version("4.8"), Some((4, 8)));
        assert_eq!(version("6"), None);
        assert_eq!(version("new.er"), None);
    }

    #[test]
    fn a_profile_decides_as_it_says() {
        let json = br#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [{"names": ["mkdir", "no_such_call"], "action": "SCMP_ACT_ERRNO"},
                {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38,
                 "args": [{"index": 1, "value": 511, "op": "SCMP_CMP_EQ"}]}]}"#;
        let (filter, flags) = parse(json, &PLACE).unwrap();
        assert_eq!(flags, 2);
        let program = compile(&filter).unwrap();
        assert_eq!(verdict(&program, 83, [0; 6]), DENIED);
        assert_eq!(verdict(&program, 90, [0, 511, 0, 0, 0, 0]), 0x0005_0026);
        assert_eq!(verdict(&program, 90, [0, 510, 0, 0, 0, 0]), ALLOWED);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        let bad = [
            r#"not json"#,
            r#"{}"#,
            r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#,
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_NEW_LISTENER"]}"#,
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}"#,
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}"#,
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                "includes": {"moon": ["full"]}}]}"#,
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                "includes": {"minKernel": "new"}}]}"#,
        ];
        for json in bad {
            assert!(parse(json.as_bytes(), &PLACE).is_err(), "{json}");
        }
    }
}
