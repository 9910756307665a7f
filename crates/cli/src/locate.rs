//! Where in a YAML text a field is, so that an error that names a field can name its line.
//!
//! YAML parsers that keep positions keep them for every value; one wrong field needs one position. This walks the
//! text by its indentation. What it cannot follow (flow style, anchors) has no line, never a wrong value.

/// One step of a field path such as `spec.derivation.inputSrcs[3]`.
#[derive(PartialEq, Eq, Debug)]
enum Step<'a> {
    Key(&'a str),
    Item(usize),
}

/// The line of `field` in `text`, from 1, or that of the nearest field around it. None if not even the first step is
/// found.
pub(crate) fn line_of(text: &str, field: &str) -> Option<usize> {
    let lines: Vec<&str> = text.lines().collect();
    let mut range = 0..lines.len();
    let mut found = None;
    for step in steps(field) {
        let Some((line, inside)) = descend(&lines, range.clone(), &step) else {
            break;
        };
        found = Some(line + 1);
        range = inside;
    }
    found
}

/// Splits at dots and brackets. Keys that have dots themselves end the walk early, at the field around them.
fn steps(field: &str) -> Vec<Step<'_>> {
    let mut steps = Vec::new();
    for part in field.split('.') {
        let (key, items) = part.split_once('[').unwrap_or((part, ""));
        // A list's items may also come as plain numbers.
        match key.parse() {
            Ok(index) => steps.push(Step::Item(index)),
            Err(_) => steps.push(Step::Key(key)),
        }
        steps.extend(items.split(['[', ']']).filter_map(|item| item.parse().ok()).map(Step::Item));
    }
    steps
}

/// The line of one step among the lines `range`, and the lines inside it.
fn descend(
    lines: &[&str],
    range: std::ops::Range<usize>,
    step: &Step<'_>,
) -> Option<(usize, std::ops::Range<usize>)> {
    let indent = range.clone().filter_map(|i| indent_of(lines[i])).next()?;
    let mut seen = 0;
    for i in range.clone() {
        if indent_of(lines[i]) != Some(indent) {
            continue;
        }
        let content = &lines[i][indent..];
        let hit = match step {
            Step::Key(key) => is_key(content, key),
            Step::Item(index) => {
                let is_item = content.starts_with("- ") || content == "-";
                seen += usize::from(is_item);
                is_item && seen == index + 1
            }
        };
        if hit {
            let belongs = |j: &usize| match indent_of(lines[*j]) {
                None => true,
                // The items of a list may stand as far left as its key.
                Some(other) => {
                    other > indent
                        || (other == indent
                            && lines[*j][indent..].starts_with('-')
                            && matches!(step, Step::Key(_)))
                }
            };
            let end = (i + 1..range.end).take_while(belongs).last().map_or(i + 1, |last| last + 1);
            return Some((i, i + 1..end));
        }
    }
    None
}

/// Columns before the content; None for lines without any.
fn indent_of(line: &str) -> Option<usize> {
    let content = line.trim_start_matches(' ');
    let empty = content.is_empty() || content.starts_with('#') || content.starts_with("---");
    (!empty).then(|| line.len() - content.len())
}

fn is_key(content: &str, key: &str) -> bool {
    let rest = content
        .strip_prefix(key)
        .or_else(|| content.strip_prefix(&format!("\"{key}\"")))
        .or_else(|| content.strip_prefix(&format!("'{key}'")));
    rest.is_some_and(|rest| rest == ":" || rest.starts_with(": "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# a comment
apiVersion: drover.build/v1alpha1
spec:
  derivation:
    name: x
    inputSrcs:
    - /nix/store/a
    - /nix/store/b
    env:
      name: |
        spec:
          derivation:
      other: y
    outputs:
      out:
        path: /nix/store/c
  class: z
";

    #[test]
    fn fields_have_lines() {
        for (field, line) in [
            ("apiVersion", 2),
            ("spec", 3),
            ("spec.derivation.name", 5),
            ("spec.derivation.inputSrcs[1]", 8),
            ("spec.derivation.inputSrcs.0", 7),
            ("spec.derivation.env.other", 13),
            ("spec.derivation.outputs.out.path", 16),
            ("spec.class", 17),
            // The nearest field around it.
            ("spec.derivation.outputs.dev.path", 14),
            ("spec.derivation.inputSrcs[7]", 6),
        ] {
            assert_eq!(line_of(TEXT, field), Some(line), "{field}");
        }
        assert_eq!(line_of(TEXT, "metadata"), None);
        assert_eq!(line_of("", "spec"), None);
        assert_eq!(line_of("spec: {class: x}", "spec.class"), Some(1));
    }
}
