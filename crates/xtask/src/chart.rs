//! What is made from the chart and kept in the checkout: renderings for a handful of values files, so that a change shows all
//! that it changes, and the table of values in the chart's README. Helm renders; nothing here knows what a template does.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::parts::go;
use crate::run;

/// The chart, from the checkout.
pub const CHART: &str = "charts/drover";
/// Values files `NAME.values.yaml`, and beside each what the chart makes of it, `NAME.yaml`.
const GOLDEN: &str = "tests/golden/chart";
const VALUES: &str = ".values.yaml";
/// What a values file may begin with: further options for `helm template`.
const OPTIONS: &str = "# helm template ";
/// Release and namespace of the renderings.
const RELEASE: [&str; 3] = ["drover", "--namespace", "drover-system"];
/// Where the written part of the chart's README ends.
const MARK: &str =
    "<!-- What follows is written by `cargo xtask chart`, from the comments in values.yaml. -->\n";
/// Of a definition, what stands in a rendering: the rest is `crds/`, byte for byte.
const DEFINITIONS: &str = "# Source: drover/templates/crds.yaml";

/// A values file that the chart is rendered with.
pub struct Case {
    pub name: String,
    pub values: PathBuf,
    /// Further options for `helm template`.
    pub options: Vec<String>,
}

/// Writes what the chart makes of the values files, and the table of its values.
pub fn write() -> Result<()> {
    let wanted = generate()?;
    for file in read()?.into_keys().filter(|file| !wanted.contains_key(file)) {
        fs::remove_file(crate::checkout().join(file))?;
    }
    for (file, text) in wanted {
        fs::write(crate::checkout().join(&file), text).with_context(|| format!("could not write {file}"))?;
        println!("{file}");
    }
    Ok(())
}

/// Fails, with the difference, where a file is not what the chart gives.
pub fn check() -> Result<()> {
    let (wanted, found) = (generate()?, read()?);
    if wanted == found {
        println!("{GOLDEN} and {CHART}/README.md are what the chart gives");
        return Ok(());
    }
    let scratch = tempfile::tempdir()?;
    for (name, files) in [("is", &found), ("should-be", &wanted)] {
        for (file, text) in files {
            let path = scratch.path().join(name).join(file);
            fs::create_dir_all(path.parent().context("a file in a folder")?)?;
            fs::write(path, text)?;
        }
    }
    let mut diff = Command::new("diff");
    let diff = run::output(diff.args(["-ruN", "is", "should-be"]).current_dir(scratch.path()))?;
    print!("{}", String::from_utf8_lossy(&diff.stdout));
    bail!("renderings of the chart, or its README, are not what the chart gives; run: cargo xtask chart")
}

/// The values files, by name.
pub fn cases() -> Result<Vec<Case>> {
    let dir = crate::checkout().join(GOLDEN);
    let mut cases = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("could not list {}", dir.display()))? {
        let values = entry?.path();
        let file = values.file_name().unwrap_or_default().to_string_lossy();
        let Some(name) = file.strip_suffix(VALUES) else { continue };
        let text = fs::read_to_string(&values)?;
        let options = text.lines().next().and_then(|line| line.strip_prefix(OPTIONS)).unwrap_or_default();
        let options = options.split_whitespace().map(str::to_owned).collect();
        cases.push(Case { name: name.to_owned(), values: values.clone(), options });
    }
    if cases.is_empty() {
        bail!("{} has no file NAME{VALUES}", dir.display());
    }
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(cases)
}

impl Case {
    /// All that Helm gives to the API server, hooks as well.
    pub fn render(&self) -> Result<String> {
        let mut helm = Command::new(go::helm()?);
        helm.arg("template").args(RELEASE).arg(crate::checkout().join(CHART));
        run::stdout(helm.arg("--values").arg(&self.values).args(&self.options))
    }
}

fn generate() -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for case in cases()? {
        files.insert(format!("{GOLDEN}/{}.yaml", case.name), shorten(&case.render()?));
    }
    let chart = crate::checkout().join(CHART);
    let page = fs::read_to_string(chart.join("README.md"))?;
    let (written, _) =
        page.split_once(MARK).with_context(|| format!("{CHART}/README.md has no line {MARK:?}"))?;
    let table = table(&fs::read_to_string(chart.join("values.yaml"))?);
    files.insert(format!("{CHART}/README.md"), format!("{written}{MARK}\n{table}"));
    Ok(files)
}

/// What is there of that.
fn read() -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    let checkout = crate::checkout();
    for entry in fs::read_dir(checkout.join(GOLDEN))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".yaml") && !name.ends_with(VALUES) {
            let file = format!("{GOLDEN}/{name}");
            files.insert(file.clone(), fs::read_to_string(checkout.join(file))?);
        }
    }
    let readme = format!("{CHART}/README.md");
    files.insert(readme.clone(), fs::read_to_string(checkout.join(readme))?);
    Ok(files)
}

/// A rendering without what `crds/` has already.
fn shorten(rendered: &str) -> String {
    let shorten = |document: &str| match document.split_once("\nspec:\n") {
        Some((head, _)) if document.starts_with(DEFINITIONS) => format!("{head}\n# spec: as in crds/\n"),
        _ => document.to_owned(),
    };
    // Helm ends lines of templates where it finds them; in a file that is kept, blanks at the end only disturb.
    let documents: Vec<_> = rendered.split("---\n").map(shorten).collect();
    documents.join("---\n").lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// One row a value: its name, its default and the comment above it. A value whose own values stand below it has a row if it
/// has a comment.
fn table(values: &str) -> String {
    let lines: Vec<&str> = values.lines().collect();
    let mut rows = vec!["| value | default | |".to_owned(), "|---|---|---|".to_owned()];
    let mut path: Vec<(usize, &str)> = Vec::new();
    let mut comment = String::new();
    let mut next = 0; // behind the list that was the last value
    for (at, line) in lines.iter().enumerate() {
        if at < next {
            continue;
        }
        let text = line.trim_start();
        let indent = line.len() - text.len();
        if let Some(more) = text.strip_prefix('#') {
            comment.push_str(more);
            continue;
        }
        let Some((key, value)) = text.split_once(':').filter(|_| !text.starts_with('-')) else {
            comment.clear();
            continue;
        };
        path.retain(|(outer, _)| *outer < indent);
        path.push((indent, key));
        let below = |line: &&&str| line.len() - line.trim_start().len() > indent;
        let items: Vec<_> = lines[at + 1..].iter().take_while(below).map(|line| line.trim_start()).collect();
        let is_list = items.first().is_some_and(|item| item.starts_with('-'));
        next = if is_list { at + 1 + items.len() } else { next };
        let default = match value.trim() {
            "" if is_list => format!("`{}`", items.join(" ")),
            "" => String::new(),
            value => format!("`{value}`"),
        };
        if !(default.is_empty() && comment.is_empty()) {
            let name = path.iter().map(|(_, key)| *key).collect::<Vec<_>>().join(".");
            let cell = |text: &str| text.trim().replace('|', "\\|");
            rows.push(format!("| `{name}` | {} | {} |", cell(&default), cell(&comment)));
        }
        comment.clear();
    }
    rows.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_has_its_comment_and_its_default() {
        let values = "# Of what.\nimage:\n  # Which.\n  tag: \"\"\n  more:\n    deep: 1\n\n# Many |\n# lines.\nlist:\n  - a: 1\n    b: 2\nmap: {}\n";
        let rows: Vec<_> = table(values).lines().skip(2).map(str::to_owned).collect();
        assert_eq!(
            rows,
            [
                "| `image` |  | Of what. |",
                "| `image.tag` | `\"\"` | Which. |",
                "| `image.more.deep` | `1` |  |",
                "| `list` | `- a: 1 b: 2` | Many \\| lines. |",
                "| `map` | `{}` |  |",
            ]
        );
    }

    #[test]
    fn a_definition_is_shortened_and_nothing_else() {
        let text = format!(
            "---\n{DEFINITIONS}\nkind: A\nspec:\n  long: 1\n---\n# Source: drover/templates/b.yaml\nspec:\n  b: 1 \n"
        );
        let short = shorten(&text);
        assert!(!short.contains("long") && short.contains("kind: A\n# spec: as in crds/\n---\n"), "{short}");
        assert!(short.ends_with("spec:\n  b: 1\n"), "{short}");
    }
}
