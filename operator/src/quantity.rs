//! Kubernetes' quantities, `500m`, `1.5Gi`, `1e3`, as numbers that can be compared (Kubernetes: apimachinery, quantity.go).
//!
//! Pure. Kubernetes stores quantities as text and has no comparison on its side of the API.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// The quantity in units of 10⁻⁹, rounded down. None for what is no quantity, or one beyond 10²⁰.
pub fn nanos(quantity: &Quantity) -> Option<i128> {
    let text = quantity.0.trim();
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || number.len() > 40 {
        return None;
    }
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let mut places = i32::try_from(fraction.len()).ok()?;
    let mut factor: i128 = 1;
    match suffix {
        "" => {}
        "n" => places += 9,
        "u" => places += 6,
        "m" => places += 3,
        "k" => places -= 3,
        "M" => places -= 6,
        "G" => places -= 9,
        "T" => places -= 12,
        "P" => places -= 15,
        "E" => places -= 18,
        "Ki" => factor = 1 << 10,
        "Mi" => factor = 1 << 20,
        "Gi" => factor = 1 << 30,
        "Ti" => factor = 1 << 40,
        "Pi" => factor = 1 << 50,
        "Ei" => factor = 1 << 60,
        exponent => {
            let exponent = exponent.strip_prefix(['e', 'E'])?;
            places -= exponent.parse::<i32>().ok().filter(|e| e.abs() <= 30)?;
        }
    }
    let scaled = digits.checked_mul(factor)?;
    let shift = 9 - places;
    let power = 10i128.checked_pow(shift.unsigned_abs())?;
    let nanos = if shift >= 0 { scaled.checked_mul(power)? } else { scaled / power };
    Some(if negative { -nanos } else { nanos })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Option<i128> {
        nanos(&Quantity(text.into()))
    }

    #[test]
    fn equal_quantities() {
        const UNIT: i128 = 1_000_000_000;
        for (text, value) in [
            ("0", 0),
            ("1", UNIT),
            ("500m", UNIT / 2),
            (".5", UNIT / 2),
            ("1.5Gi", 3 * (UNIT << 30) / 2),
            ("1Ki", UNIT << 10),
            ("1k", 1000 * UNIT),
            ("1e3", 1000 * UNIT),
            ("1E3", 1000 * UNIT),
            ("2E", 2_000_000_000_000_000_000 * UNIT),
            ("5n", 5),
            ("7u", 7000),
            ("0.1n", 0),
            ("-1", -UNIT),
            ("+1", UNIT),
        ] {
            assert_eq!(of(text), Some(value), "{text}");
        }
    }

    #[test]
    fn what_is_no_quantity() {
        for text in ["", ".", "Gi", "1.2.3", "1gi", "1e", "1e99", "x", "1 Gi", "1e3k", &"9".repeat(60)] {
            assert_eq!(of(text), None, "{text}");
        }
    }
}
