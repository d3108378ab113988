// SPDX-License-Identifier: Apache-2.0
//! Profiles of users: OCI `linux.seccomp` objects. A profile that cannot be fulfilled completely is an error, so
//! that it never protects less than it says.

use serde::Deserialize;

use super::bpf::errno;
use super::{Action, Comparison, Condition, Filter, Rule, SeccompError};

const MAX_PROFILE_BYTES: usize = 1 << 20;
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
    /// Only Docker's format has these: rules that depend on capabilities or on the kernel's version.
    includes: Option<serde_json::Map<String, serde_json::Value>>,
    excludes: Option<serde_json::Map<String, serde_json::Value>>,
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
pub fn parse(json: &[u8]) -> Result<(Filter, u32), SeccompError> {
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
        let conditional = [&rule.includes, &rule.excludes];
        if conditional.into_iter().flatten().any(|map| !map.is_empty()) {
            return Err(SeccompError::Unsupported(
                "a rule with includes or excludes".to_owned(),
            ));
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
    use super::parse;
    use crate::seccomp::bpf::compile;
    use crate::seccomp::machine::{ALLOWED, DENIED, verdict};

    #[test]
    fn a_profile_decides_as_it_says() {
        let json = br#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [{"names": ["mkdir", "no_such_call"], "action": "SCMP_ACT_ERRNO"},
                {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38,
                 "args": [{"index": 1, "value": 511, "op": "SCMP_CMP_EQ"}]}]}"#;
        let (filter, flags) = parse(json).unwrap();
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
                "includes": {"caps": ["CAP_SYS_ADMIN"]}}]}"#,
        ];
        for json in bad {
            assert!(parse(json.as_bytes()).is_err(), "{json}");
        }
    }
}
