//! JSON text byte for byte as the library that Nix uses writes it (nlohmann/json, `dump`): structured attributes are part of a
//! derivation as such text, and a build that keeps its attributes has it in its output. It differs from serde_json's in how
//! numbers with a fraction are spelt. Pure.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde::Serialize as _;
use serde_json::Value;
use serde_json::ser::{Formatter, Serializer};

/// Exponents from which on a number is written with one: 1e15 is, 1e14 is not.
const MAX_PLAIN: i32 = 15;
/// And below zero: 1e-5 is, 1e-4 is not.
const MIN_PLAIN: i32 = -4;

/// Compact, with the keys of every object in the order of their bytes. Recursion is bounded by the parser's limit.
pub fn to_string(value: &Value) -> String {
    let mut text = Vec::new();
    // Writing to memory cannot fail, nor can a value, whose keys are strings.
    let written = sorted(value).serialize(&mut Serializer::with_formatter(&mut text, Nlohmann));
    debug_assert!(written.is_ok());
    String::from_utf8_lossy(&text).into_owned()
}

/// Whether serde_json keeps the order of keys is up to whoever else is compiled with it.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            let object: BTreeMap<&String, Value> =
                object.iter().map(|(key, value)| (key, sorted(value))).collect();
            Value::Object(object.into_iter().map(|(key, value)| (key.clone(), value)).collect())
        }
        Value::Array(array) => Value::Array(array.iter().map(sorted).collect()),
        other => other.clone(),
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
    use serde_json::json;

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

    /// By default serde_json may be off by one in the last digit, which then stands in a build's output.
    #[test]
    fn numbers_are_read_to_the_last_digit() {
        for text in ["92.98818095784233", "9290046655113.605", "9.228795328685415", "962148252.7102413"] {
            assert_eq!(to_string(&serde_json::from_str(text).unwrap()), text);
        }
    }
}
