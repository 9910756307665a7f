//! Which crates a program is linked with: cargo's own answer, for the target and with the features of the images.
//!
//! Reads what cargo prints and the sources in cargo's registry; compiles nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::programs::FEATURES;
use crate::platform::Platform;
use crate::run;

/// Name and version.
pub(super) type Id = (String, String);

/// A crate.
pub(super) struct Crate {
    /// An SPDX expression.
    pub(super) licence: String,
    /// SHA-256 of the published archive; `None` for one of this workspace.
    pub(super) checksum: Option<String>,
    /// Where its sources are.
    pub(super) dir: PathBuf,
}

/// The crates of the programs, and which is linked with which.
pub(super) struct Crates {
    pub(super) all: BTreeMap<Id, Crate>,
    pub(super) links: BTreeMap<Id, BTreeSet<Id>>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    manifest_path: PathBuf,
}

#[derive(Deserialize)]
struct Locked {
    name: String,
    version: String,
    checksum: Option<String>,
}

/// Asks cargo what these packages of the workspace are linked with when they are built together for a platform.
pub(super) fn of(programs: &[&str], platform: Platform) -> Result<Crates> {
    let mut tree = run::cargo();
    tree.args([
        "tree",
        "--locked",
        "--edges",
        "normal,no-proc-macro",
        "--prefix",
        "depth",
        "--target",
        platform.target(),
        "--features",
        FEATURES,
    ]);
    tree.args(programs.iter().flat_map(|program| ["-p", program]));
    let links = links(&run::stdout(&mut tree)?)?;
    let metadata = run::stdout(run::cargo().args(["metadata", "--locked", "--format-version=1"]))?;
    let metadata: Metadata = serde_json::from_str(&metadata).context("cargo's metadata")?;
    let lock = crate::checkout().join("Cargo.lock");
    let checksums = checksums(&fs::read_to_string(lock).context("could not read Cargo.lock")?);
    let mut all = BTreeMap::new();
    for package in metadata.packages {
        let id = (package.name, package.version);
        if !links.contains_key(&id) {
            continue;
        }
        let licence = package.license.with_context(|| format!("{} {} names no licence", id.0, id.1))?;
        let dir = package.manifest_path.parent().context("a manifest lies in a directory")?.to_owned();
        let checksum = checksums.get(&id).cloned().flatten();
        // `MIT/Apache-2.0` is how crates wrote `or` before SPDX expressions were asked for.
        all.insert(id, Crate { licence: licence.replace(" / ", "/").replace('/', " OR "), checksum, dir });
    }
    ensure!(all.len() == links.len(), "cargo tree names crates that cargo metadata does not");
    Ok(Crates { all, links })
}

impl Crates {
    /// The crate of this name, of which there is one.
    pub(super) fn id(&self, name: &str) -> Result<Id> {
        let mut found = self.all.keys().filter(|id| id.0 == name);
        match (found.next(), found.next()) {
            (Some(id), None) => Ok(id.clone()),
            _ => bail!("there is not one crate {name}"),
        }
    }

    /// This crate and all that it is linked with.
    pub(super) fn closure(&self, root: &Id) -> BTreeSet<Id> {
        let (mut seen, mut next) = (BTreeSet::from([root.clone()]), vec![root]);
        while let Some(id) = next.pop() {
            next.extend(self.links.get(id).into_iter().flatten().filter(|id| seen.insert((*id).clone())));
        }
        seen
    }

    /// The licence texts of these crates, each once, after the names of the crates that have it.
    pub(super) fn licences(&self, ids: &BTreeSet<Id>) -> Result<String> {
        let mut texts = BTreeMap::<String, BTreeSet<String>>::new();
        let mut list = String::from("What this program is linked with, and under which licences:\n\n");
        for id in ids {
            let Some(one) = self.all.get(id) else { continue };
            list += &format!("{} {}: {}\n", id.0, id.1, one.licence);
            if one.checksum.is_none() {
                continue; // Drover's own
            }
            for text in texts_in(&one.dir)? {
                texts.entry(text).or_default().insert(format!("{} {}", id.0, id.1));
            }
        }
        for (text, names) in texts {
            let names: Vec<_> = names.into_iter().collect();
            list += &format!("\n{}\n{}:\n\n{text}\n", "=".repeat(80), names.join(", "));
        }
        Ok(list)
    }
}

/// The licence files at the top of a crate.
fn texts_in(dir: &Path) -> Result<BTreeSet<String>> {
    let mut texts = BTreeSet::new();
    for entry in fs::read_dir(dir).with_context(|| format!("could not read {}", dir.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().to_uppercase();
        let is_licence = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"];
        if is_licence.iter().any(|prefix| name.starts_with(prefix)) && entry.path().is_file() {
            let text = fs::read(entry.path())?;
            texts.insert(String::from_utf8_lossy(&text).replace("\r\n", "\n").trim_end().to_owned());
        }
    }
    Ok(texts)
}

/// From lines such as `2memchr v2.8.3`, each below what is linked with it; ` (*)` says that what is below stands elsewhere.
fn links(tree: &str) -> Result<BTreeMap<Id, BTreeSet<Id>>> {
    let mut links = BTreeMap::<Id, BTreeSet<Id>>::new();
    let mut path = Vec::<Id>::new();
    for line in tree.lines().filter(|line| !line.is_empty()) {
        let digits = line.find(|c: char| !c.is_ascii_digit()).unwrap_or(line.len());
        let mut words = line[digits..].split(' ');
        let (Ok(depth), Some(name), Some(version)) = (
            line[..digits].parse::<usize>(),
            words.next(),
            words.next().and_then(|word| word.strip_prefix('v')),
        ) else {
            bail!("cargo tree says {line:?}, which is not understood");
        };
        let id = (name.to_owned(), version.to_owned());
        ensure!(depth <= path.len(), "cargo tree says {line:?} below nothing");
        path.truncate(depth);
        if let Some(parent) = path.last() {
            links.entry(parent.clone()).or_default().insert(id.clone());
        }
        links.entry(id.clone()).or_default();
        path.push(id);
    }
    Ok(links)
}

/// The checksums in a Cargo.lock.
fn checksums(lock: &str) -> BTreeMap<Id, Option<String>> {
    let value = |block: &str, key: &str| {
        block.lines().find_map(|line| {
            Some(line.strip_prefix(key)?.strip_prefix(" = \"")?.strip_suffix('"')?.to_owned())
        })
    };
    let locked = lock.split("[[package]]").filter_map(|block| {
        Some(Locked {
            name: value(block, "name")?,
            version: value(block, "version")?,
            checksum: value(block, "checksum"),
        })
    });
    locked.map(|package| ((package.name, package.version), package.checksum)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_read_with_what_stands_elsewhere() {
        let tree = "0a v1.0.0 (/x)\n1b v2.0.0\n2c v3.0.0\n1c v3.0.0\n\n0d v1.0.0 (/y)\n1b v2.0.0 (*)\n";
        let links = links(tree).unwrap();
        let id = |name: &str, version: &str| (name.to_owned(), version.to_owned());
        let crates = Crates { all: BTreeMap::new(), links };
        let closure = crates.closure(&id("d", "1.0.0"));
        assert_eq!(closure, [id("b", "2.0.0"), id("c", "3.0.0"), id("d", "1.0.0")].into());
        assert!(super::links("1b v2.0.0\n").is_err());
        assert!(super::links("0b\n").is_err());
    }

    #[test]
    fn checksums_are_read() {
        let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\nchecksum = \"00ff\"\n\n[[package]]\nname = \"b\"\nversion = \"0.1.0\"\n";
        let read = checksums(lock);
        assert_eq!(read[&("a".into(), "1.0.0".into())].as_deref(), Some("00ff"));
        assert_eq!(read[&("b".into(), "0.1.0".into())], None);
    }
}
