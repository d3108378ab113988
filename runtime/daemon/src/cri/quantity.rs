// SPDX-License-Identifier: Apache-2.0
//! Parses Kubernetes quantities of bytes: "10Gi", "1.5G", "500M", "1e9" (apimachinery, `resource.Quantity`). Pure.

/// Parses an amount of bytes. Fractions of a byte are rounded up. `None` if it is not a valid amount.
pub fn bytes(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
    let factor = match unit {
        "" => 1,
        "k" => 1000,
        "M" => 1000_u128.pow(2),
        "G" => 1000_u128.pow(3),
        "T" => 1000_u128.pow(4),
        "P" => 1000_u128.pow(5),
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        _ => exponent(unit)?,
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    // No real amount has more digits, and more could overflow below.
    if whole.len() + part.len() > 18 || (whole.is_empty() && part.is_empty()) {
        return None;
    }
    let scale = 10_u128.pow(u32::try_from(part.len()).ok()?);
    let number: u128 = format!("0{whole}{part}").parse().ok()?;
    u64::try_from((number.checked_mul(factor)?).div_ceil(scale)).ok()
}

/// The factor of an exponent such as "e9" or "E9".
fn exponent(unit: &str) -> Option<u128> {
    let digits = unit.strip_prefix(['e', 'E'])?;
    10_u128.checked_pow(digits.parse().ok().filter(|power| *power <= 18)?)
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn amounts_are_read_as_kubernetes_writes_them() {
        for (text, expected) in [
            ("0", 0),
            ("123", 123),
            ("10Gi", 10 << 30),
            ("1.5Gi", 3 << 29),
            ("500M", 500_000_000),
            ("2k", 2000),
            ("1e9", 1_000_000_000),
            ("0.5", 1),
            (".5Ki", 512),
            ("1Pi", 1 << 50),
        ] {
            assert_eq!(bytes(text), Some(expected), "{text}");
        }
        for bad in [
            "",
            "Gi",
            "-1",
            "1GB",
            "1 Gi",
            "1..5",
            "1.2.3",
            "99999P",
            "1e99",
            "9999999999999999999",
            "1m",
        ] {
            assert_eq!(bytes(bad), None, "{bad}");
        }
    }
}
