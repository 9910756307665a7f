//! JSON text byte for byte as the library that Nix uses writes it (nlohmann/json, `dump`): a build that keeps its
//! attributes has their text in its output. It differs from serde_json's in how numbers with a fraction are spelt. Pure.

use std::io::{self, Write};

use serde::Serialize as _;
use serde_json::Value;
use serde_json::ser::{Formatter, Serializer};

/// Exponents from which on a number is written with one: 1e15 is, 1e14 is not.
const MAX_PLAIN: i32 = 15;
/// And below zero: 1e-5 is, 1e-4 is not.
const MIN_PLAIN: i32 = -4;

/// Compact, keys in the order that they have.
pub(super) fn to_string(value: &Value) -> String {
    let mut text = Vec::new();
    // Writing to memory cannot fail, nor can a value, whose keys are strings.
    let written = value.serialize(&mut Serializer::with_formatter(&mut text, Nlohmann));
    debug_assert!(written.is_ok());
    String::from_utf8_lossy(&text).into_owned()
}

/// An integer as Nix puts it into the shell's file: through C's `int`. Only x86 is so definite about numbers with a
/// fraction that do not fit; there they become the least `int`. None if it is no integer for a `float`, with which
/// Nix asks (Nix: parsed-derivations.cc).
pub(super) fn shell_integer(number: &serde_json::Number) -> Option<i32> {
    #[allow(clippy::cast_possible_truncation)] // all of this is about what truncation makes of it
    if let Some(number) = number.as_i64() {
        Some(number as i32)
    } else if let Some(number) = number.as_u64() {
        Some(number as i32)
    } else {
        let float = number.as_f64()?;
        let single = float as f32;
        let fits = float > f64::from(i32::MIN) - 1.0 && float < f64::from(i32::MAX) + 1.0;
        (single.ceil() == single).then_some(if fits { float as i32 } else { i32::MIN })
    }
}

struct Nlohmann;

impl Formatter for Nlohmann {
    fn write_f64<W: ?Sized + Write>(&mut self, writer: &mut W, value: f64) -> io::Result<()> {
        writer.write_all(float(value).as_bytes())
    }
}

/// The fewest digits that give the same number again, and where the point is in them.
fn float(value: f64) -> String {
    let text = format!("{:e}", value.abs());
    let sign = if value.is_sign_negative() { "-" } else { "" };
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let digits = mantissa.replace('.', "");
    // The value is 0.DIGITS times ten to the power of `point`.
    let point = exponent.parse::<i32>().unwrap_or(0) + 1;
    let length = i32::try_from(digits.len()).unwrap_or(i32::MAX);
    let zeros = |count: i32| "0".repeat(usize::try_from(count).unwrap_or(0));
    let plain = if value == 0.0 {
        "0.0".to_owned()
    } else if length <= point && point <= MAX_PLAIN {
        format!("{digits}{}.0", zeros(point - length))
    } else if 0 < point && point <= MAX_PLAIN {
        let (whole, rest) = digits.split_at(usize::try_from(point).unwrap_or(0));
        format!("{whole}.{rest}")
    } else if MIN_PLAIN < point && point <= 0 {
        format!("0.{}{digits}", zeros(-point))
    } else {
        let (first, rest) = digits.split_at(1);
        let dot = if rest.is_empty() { "" } else { "." };
        let exponent = point - 1;
        let exponent_sign = if exponent < 0 { '-' } else { '+' };
        format!("{first}{dot}{rest}e{exponent_sign}{:02}", exponent.abs())
    };
    format!("{sign}{plain}")
}

#[cfg(test)]
mod tests {
    use serde_json::{Number, json};

    use super::*;

    #[test]
    fn numbers_are_spelt_as_nix_spells_them() {
        for (value, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (2.0, "2.0"),
            (-1.25, "-1.25"),
            (1_000_000.0, "1000000.0"),
            (123_456_789_012_345.0, "123456789012345.0"),
            (1e14, "100000000000000.0"),
            (1e15, "1e+15"),
            (1.5e15, "1.5e+15"),
            (1e100, "1e+100"),
            (0.001, "0.001"),
            (0.000_1, "0.0001"),
            (0.000_01, "1e-05"),
            (1e-7, "1e-07"),
            (1.25e-300, "1.25e-300"),
            (0.1, "0.1"),
            (1.0 / 3.0, "0.3333333333333333"),
        ] {
            assert_eq!(to_string(&json!(value)), text);
        }
        assert_eq!(
            to_string(&json!({"a": [1, -2, "é\u{1}\n", null], "b": {}})),
            r#"{"a":[1,-2,"é\u0001\n",null],"b":{}}"#
        );
    }

    #[test]
    fn integers_for_the_shell_go_through_an_int() {
        let integer = |text: &str| shell_integer(&text.parse::<Number>().unwrap());
        for (text, expected) in [
            ("3", Some(3)),
            ("2147483648", Some(i32::MIN)),
            ("9223372036854775807", Some(-1)),
            ("-9223372036854775808", Some(0)),
            ("18446744073709551615", Some(-1)),
            ("2.0", Some(2)),
            ("0.5", None),
            ("-3.0", Some(-3)),
            // What a `float` cannot tell from an integer is one.
            ("16777216.5", Some(16_777_216)),
            ("1e-60", Some(0)),
            ("1e+100", Some(i32::MIN)),
            ("3000000000.0", Some(i32::MIN)),
        ] {
            assert_eq!(integer(text), expected, "{text}");
        }
    }
}
