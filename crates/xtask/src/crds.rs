//! `crds/*.yaml`: what `drover crds` prints, one file a resource; and the check that the files are what the code says.
//! The chart has a copy, because a chart is complete in itself: in `files/`, from which a template takes it. What lies in a
//! chart's `crds/`, Helm would never upgrade.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{development, run};

/// Where the files are, below the checkout.
const DIRS: [&str; 2] = ["crds", "charts/drover/files/crds"];

/// Writes the files, and removes those that the code knows no more.
pub fn write() -> Result<()> {
    let wanted = generate()?;
    for folder in DIRS {
        let dir = crate::checkout().join(folder);
        fs::create_dir_all(&dir)?;
        for name in read(&dir)?.keys().filter(|name| !wanted.contains_key(*name)) {
            fs::remove_file(dir.join(name))?;
        }
        for (name, text) in &wanted {
            fs::write(dir.join(name), text)?;
            println!("{folder}/{name}");
        }
    }
    Ok(())
}

/// Fails, with the difference, where the files are not what the code generates.
pub fn check() -> Result<()> {
    let wanted = generate()?;
    let dirs = DIRS.map(|folder| crate::checkout().join(folder));
    let Some(dir) = dirs.iter().find(|dir| read(dir).unwrap_or_default() != wanted) else {
        println!("crds/ and its copy in the chart are what the code generates");
        return Ok(());
    };
    let fresh = tempfile::tempdir()?;
    for (name, text) in &wanted {
        fs::write(fresh.path().join(name), text)?;
    }
    let diff = run::output(Command::new("diff").args(["-ruN"]).arg(dir).arg(fresh.path()))?;
    print!("{}", String::from_utf8_lossy(&diff.stdout));
    bail!("{} is not what the code generates; run: cargo xtask crds", dir.display())
}

fn generate() -> Result<BTreeMap<String, String>> {
    split(&run::stdout(Command::new(development::compile()?.join("drover")).arg("crds"))?)
}

/// The documents of a YAML stream, named by the resource: `builds.example.com` is `builds.yaml`.
fn split(stream: &str) -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for document in stream.split("---\n").filter(|document| !document.trim().is_empty()) {
        let value: serde_yaml::Value =
            serde_yaml::from_str(document).context("`drover crds` prints what is not YAML")?;
        let name = value["metadata"]["name"].as_str().context("a document without metadata.name")?;
        let plural = name.split('.').next().unwrap_or(name);
        files.insert(format!("{plural}.yaml"), format!("{}\n", document.trim_end()));
    }
    if files.is_empty() {
        bail!("`drover crds` prints nothing");
    }
    Ok(files)
}

fn read(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).with_context(|| format!("could not list {}", dir.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".yaml") {
            files.insert(name, fs::read_to_string(entry.path())?);
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_document_is_a_file_named_by_its_plural() {
        let files = split("---\nmetadata:\n  name: as.example.com\n---\nmetadata:\n  name: bs.example.com\n")
            .unwrap();
        assert_eq!(files.keys().collect::<Vec<_>>(), ["as.yaml", "bs.yaml"]);
        assert_eq!(files["as.yaml"], "metadata:\n  name: as.example.com\n");
        assert!(split("").is_err());
    }
}
