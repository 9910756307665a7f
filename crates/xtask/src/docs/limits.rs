//! The table of limits: every constant of the product that names one, with its value and what its comment says of it.
//!
//! The names are the convention: `MAX_…`, `LONGEST_…`, `MOST_…`, `…_LIMIT`. What is only tests' is left out.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Where the product is, and what each part is called in the table.
const PARTS: [(&str, &str); 9] = [
    ("operator/src", "Operator"),
    ("builder-image/src", "Builder"),
    ("crates/session/src", "One build over one connection"),
    ("crates/api/src", "Requests and classes"),
    ("crates/cache/src", "Binary caches"),
    ("crates/serve/src", "The serve protocol"),
    ("crates/nix/src", "Nix's formats"),
    ("crates/store/src", "The builder's store"),
    ("crates/cli/src", "The command line"),
];

#[derive(Debug, PartialEq, Eq)]
struct Limit {
    name: String,
    value: String,
    about: String,
}

/// Sections with a table each.
pub(super) fn table(checkout: &Path) -> Result<String> {
    let mut text = String::new();
    for (dir, title) in PARTS {
        let mut files = Vec::new();
        find(&checkout.join(dir), &mut files)?;
        files.sort();
        let mut rows = String::new();
        for file in files {
            let source =
                fs::read_to_string(&file).with_context(|| format!("could not read {}", file.display()))?;
            let shown = file.strip_prefix(checkout.join(dir))?.display().to_string();
            for limit in limits(&source) {
                // Writing to a String cannot fail.
                let _ =
                    writeln!(rows, "| {} | `{}` in `{shown}` | {} |", limit.value, limit.name, limit.about);
            }
        }
        ensure!(!rows.is_empty(), "{dir} has no limit: its constants are called otherwise by now");
        let _ = write!(
            text,
            "## {title}\n\nIn `{dir}`:\n\n| limit | constant | what it bounds |\n|---|---|---|\n{rows}\n"
        );
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    Ok(text)
}

fn find(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("could not read {}", dir.display()))? {
        let path = entry?.path();
        let is_tests = path.file_stem().is_some_and(|name| name == "tests" || name == "testing");
        if path.is_dir() && !is_tests {
            find(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") && !is_tests {
            files.push(path);
        }
    }
    Ok(())
}

/// The limits of a file, above its tests. Constants right below each other may share the first one's comment.
fn limits(source: &str) -> Vec<Limit> {
    let mut found = Vec::new();
    let (mut about, mut shared) = (Vec::new(), String::new());
    let lines = source.lines().map(str::trim).take_while(|line| !line.starts_with("mod tests {"));
    for line in lines {
        if let Some(comment) = line.strip_prefix("///") {
            about.push(comment.trim());
            continue;
        }
        let constant = constant(line);
        if !about.is_empty() || constant.is_none() {
            shared = about.join(" ").replace('|', "\\|").replace("[`", "`").replace("`]", "`");
        }
        // A version or another limit is no number.
        if let Some((name, value)) =
            constant.filter(|(name, value)| is_limit(name) && !value.contains("Self"))
        {
            let about = shared.clone();
            found.push(Limit { name: name.to_owned(), value: shown(value, name), about });
        }
        if !line.starts_with("#[") {
            about.clear();
        }
    }
    found
}

fn is_limit(name: &str) -> bool {
    ["MAX_", "LONGEST_", "MOST_"].iter().any(|begin| name.starts_with(begin)) || name.ends_with("_LIMIT")
}

/// Name and expression.
fn constant(line: &str) -> Option<(&str, &str)> {
    let (before, rest) = line.split_once("const ")?;
    let is_plain = before.is_empty() || (before.starts_with("pub") && before.ends_with(' '));
    let (name, rest) = rest.split_once(':')?;
    let (_, value) = rest.split_once(" = ")?;
    is_plain.then(|| (name, value.trim_end_matches(';')))
}

/// As a person reads it: bytes in binary units where they come out even, seconds in larger ones.
fn shown(expression: &str, name: &str) -> String {
    let seconds = expression.strip_prefix("Duration::from_secs(").and_then(|rest| rest.strip_suffix(')'));
    if let Some(seconds) = seconds.and_then(number) {
        let (count, unit) = match seconds {
            s if s % 86_400 == 0 => (s / 86_400, "d"),
            s if s % 3600 == 0 => (s / 3600, "h"),
            s if s % 60 == 0 && s > 60 => (s / 60, "min"),
            s => (s, "s"),
        };
        return format!("{count} {unit}");
    }
    match number(expression) {
        Some(value) if expression.contains("<<") && is_bytes(name) => {
            let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
            let unit = units.iter().find(|(bits, _)| value >> bits << bits == value);
            unit.map_or_else(|| value.to_string(), |(bits, unit)| format!("{} {unit}", value >> bits))
        }
        Some(value) => grouped(value),
        None => format!("`{expression}`"),
    }
}

/// Counts are not measured in bytes, even where they are powers of two.
fn is_bytes(name: &str) -> bool {
    !["PATHS", "VALUES", "IMPORTED"].iter().any(|what| name.contains(what))
}

/// Products and shifts of numbers.
fn number(expression: &str) -> Option<u64> {
    if let Some((left, right)) = expression.split_once("<<") {
        return number(left)?.checked_shl(u32::try_from(number(right)?).ok()?);
    }
    if let Some((left, right)) = expression.split_once('*') {
        return number(left)?.checked_mul(number(right)?);
    }
    expression.trim().trim_matches('"').replace('_', "").parse().ok()
}

fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_found_with_their_comments() {
        let source = "\
/// The longest\n/// name.\n#[allow(x)]\npub(crate) const MAX_NAME: usize = 12_345;\n\
const MAX_PATHS: u64 = 1 << 20;\n\nconst MAX_BARE: u8 = 1;\n/// Not a limit.\nconst PAUSE: u32 = 3;\n\
/// A | b.\nconst LONGEST_WAIT: Duration = Duration::from_secs(7 * 24 * 3600);\n\
let x = \"const MAX_X: u8 = 1\";\nmod tests {\nconst MAX_Y: u8 = 1;\n";
        let limit = |name: &str, value: &str, about: &str| Limit {
            name: name.into(),
            value: value.into(),
            about: about.into(),
        };
        assert_eq!(
            limits(source),
            [
                limit("MAX_NAME", "12,345", "The longest name."),
                limit("MAX_PATHS", "1,048,576", "The longest name."),
                limit("MAX_BARE", "1", ""),
                limit("LONGEST_WAIT", "7 d", "A \\| b."),
            ]
        );
    }

    #[test]
    fn values_are_as_people_write_them() {
        for (expression, text) in [
            ("64 << 20", "64 MiB"),
            ("5 << 30", "5 GiB"),
            ("300", "300"),
            ("100_000", "100,000"),
            ("Duration::from_secs(300)", "5 min"),
            ("Duration::from_secs(60)", "60 s"),
            ("OTHER + 2", "`OTHER + 2`"),
        ] {
            assert_eq!(shown(expression, "MAX_X"), text, "{expression}");
        }
    }
}
