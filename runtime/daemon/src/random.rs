// SPDX-License-Identifier: Apache-2.0
//! Random bytes, and random ids for pods and containers.

/// Bytes from the kernel's random number generator, which does not fail after the host has booted.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        filled += rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
    }
    bytes
}

/// The id of a pod or a container: 64 hexadecimal digits.
pub fn new_id() -> String {
    bulkhead_text::hex(&random::<32>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_64_hex_digits_and_differ() {
        let (one, two) = (new_id(), new_id());
        assert_eq!(one.len(), 64);
        assert!(one.bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert_ne!(one, two);
    }
}
