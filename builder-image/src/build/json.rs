//! Numbers of structured attributes as Nix gives them to a shell. How they are spelt in JSON: [`drover_nix::json`]. Pure.

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

#[cfg(test)]
mod tests {
    use serde_json::Number;

    use super::*;

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
