// SPDX-License-Identifier: Apache-2.0
//! Limits of a pod's traffic. In Kubernetes they are annotations with quantities ("10M" means ten million bits per
//! second).
//!
//! Sources: Kubernetes' "Support traffic shaping" and the grammar of its resource quantities; CNI's CONVENTIONS.md for
//! the capability `bandwidth`.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::failure::NetworkError;

const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// The limits in bits per second that are accepted, the same as in kubelet.
const LEAST: u64 = 1_000;
const MOST: u64 = 1_000_000_000_000_000;
/// The size of a burst in bits. It is the most that the plugin accepts, as in containerd.
const BURST: u64 = u32::MAX as u64;
const SUFFIXES: [(&str, u128); 12] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("Ei", 1 << 60),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("P", 1_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000),
];

/// The capability, in the form for plugins. 0 means no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Bandwidth {
    ingress_rate: u64,
    ingress_burst: u64,
    egress_rate: u64,
    egress_burst: u64,
}

/// The limits in a pod's annotations. `None` if there are none.
pub fn of_annotations(
    annotations: &BTreeMap<String, String>,
) -> Result<Option<Bandwidth>, NetworkError> {
    let rate = |name: &'static str| {
        let Some(value) = annotations.get(name) else {
            return Ok(0);
        };
        let rate = quantity(value).filter(|rate| (LEAST..=MOST).contains(rate));
        rate.ok_or_else(|| NetworkError::Bandwidth {
            annotation: name,
            value: value.chars().take(64).collect(),
        })
    };
    let (ingress_rate, egress_rate) = (rate(INGRESS)?, rate(EGRESS)?);
    let burst = |rate| if rate == 0 { 0 } else { BURST };
    let bandwidth = Bandwidth {
        ingress_rate,
        ingress_burst: burst(ingress_rate),
        egress_rate,
        egress_burst: burst(egress_rate),
    };
    Ok(Some(bandwidth).filter(|bandwidth| *bandwidth != Bandwidth::default()))
}

/// Parses a quantity to a whole number, rounded up. `None` if it is not valid or out of range.
fn quantity(text: &str) -> Option<u64> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = format!("{whole}{fraction}");
    if digits.is_empty() || digits.len() > 18 {
        return None;
    }
    let divisor = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let value = digits.parse::<u128>().ok()?.checked_mul(factor(suffix)?)?;
    u64::try_from(value.div_ceil(divisor)).ok()
}

fn factor(suffix: &str) -> Option<u128> {
    if suffix.is_empty() {
        return Some(1);
    }
    if let Some((_, factor)) = SUFFIXES.iter().find(|(name, _)| *name == suffix) {
        return Some(*factor);
    }
    let exponent: u32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
    10_u128.checked_pow(exponent).filter(|_| exponent <= 18)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_numbers_with_suffixes() {
        for (text, expected) in [
            ("10M", Some(10_000_000)),
            ("1.5G", Some(1_500_000_000)),
            ("512Ki", Some(524_288)),
            ("1000", Some(1000)),
            ("2e3", Some(2000)),
            ("1E", Some(1_000_000_000_000_000_000)),
            ("0.0001k", Some(1)),
            ("", None),
            ("M", None),
            ("10m", None),
            ("-1k", None),
            ("1 k", None),
            ("1..5k", None),
            ("99E99", None),
            ("9999999999999999999999", None),
        ] {
            assert_eq!(quantity(text), expected, "{text:?}");
        }
    }

    #[test]
    fn annotations_become_the_capability_or_a_clear_error() {
        let of = |pairs: &[(&str, &str)]| {
            let pairs = pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
            of_annotations(&pairs.collect())
        };
        assert_eq!(of(&[("other", "x")]).unwrap(), None);
        let bandwidth = of(&[(INGRESS, "1M")]).unwrap();
        assert_eq!(
            serde_json::to_value(bandwidth).unwrap(),
            serde_json::json!({"ingressRate": 1_000_000, "ingressBurst": 4_294_967_295_u64,
                               "egressRate": 0, "egressBurst": 0})
        );
        for value in ["999", "2P", "much"] {
            let error = of(&[(EGRESS, value)]).unwrap_err().to_string();
            assert!(error.contains(EGRESS) && error.contains(value), "{error}");
        }
    }
}
