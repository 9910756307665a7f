//! Nix's base 32: its own alphabet, and digits that run from the last byte to the first (Nix: base-nix-32.cc).

use crate::Error;

/// Digits in the order of their value: no `e`, `o`, `u`, `t`.
pub const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// Value of each byte as a digit, `0xff` for what is none.
const VALUES: [u8; 256] = {
    let mut values = [0xff; 256];
    let mut i = 0;
    while i < 32 {
        values[ALPHABET[i] as usize] = i as u8;
        i += 1;
    }
    values
};

/// How many digits `bytes` bytes take.
pub const fn encoded_len(bytes: usize) -> usize {
    (bytes * 8).div_ceil(5)
}

/// Whether `byte` is a digit.
pub const fn is_digit(byte: u8) -> bool {
    VALUES[byte as usize] != 0xff
}

pub fn encode(bytes: &[u8]) -> String {
    let digits = encoded_len(bytes.len());
    (0..digits)
        .rev()
        .map(|digit| {
            let (byte, shift) = (digit * 5 / 8, digit * 5 % 8);
            let low = u16::from(bytes[byte]);
            let high = u16::from(bytes.get(byte + 1).copied().unwrap_or(0));
            char::from(ALPHABET[usize::from((high << 8 | low) >> shift & 0x1f)])
        })
        .collect()
}

/// Decodes exactly `N` bytes. Fails on a wrong length, a foreign character, or set bits beyond the last byte.
pub fn decode<const N: usize>(text: &str) -> Result<[u8; N], Error> {
    let fail = |why| Err(Error::Base32 { text: text.chars().take(80).collect(), why });
    if text.len() != encoded_len(N) {
        return fail("wrong length");
    }
    let mut bytes = [0; N];
    for (digit, character) in text.bytes().rev().enumerate() {
        let value = VALUES[usize::from(character)];
        if value == 0xff {
            return fail("a character is not in Nix's alphabet (0-9a-z without e, o, t, u)");
        }
        let (byte, shift) = (digit * 5 / 8, digit * 5 % 8);
        let wide = u16::from(value) << shift;
        bytes[byte] |= wide.to_le_bytes()[0];
        let carry = wide.to_le_bytes()[1];
        match bytes.get_mut(byte + 1) {
            Some(next) => *next |= carry,
            None if carry != 0 => return fail("it encodes more bits than the value has"),
            None => {}
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::Sha256;

    #[test]
    fn known_value() {
        let digest = Sha256::of(b"hello\n");
        assert_eq!(encode(&digest.0), "00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq");
    }

    #[test]
    fn round_trips_and_rejects() {
        for seed in 0..=255u8 {
            let bytes: [u8; 20] = std::array::from_fn(|i| seed.wrapping_mul(31).wrapping_add(i as u8 * 7));
            assert_eq!(decode::<20>(&encode(&bytes)).unwrap(), bytes);
        }
        assert!(decode::<20>("e0000000000000000000000000000000").is_err());
        assert!(decode::<20>("0").is_err());
        // 52 digits hold 260 bits: the top four must be zero.
        assert!(decode::<32>("z0xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq").is_err());
    }
}
