//! A copy of the sources that may be broken: `target/mutants/src`, and beside it a directory for what is compiled of it.
//!
//! Cargo knows a workspace's crates by their paths from its root: a copy that shared the checkout's own target directory
//! would leave mutated crates there that pass for the checkout's. So it has one of its own, and of the checkout's only what
//! came from registries, linked and not copied. A link that is missing costs time, never truth.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{parts, run};

pub(super) struct Copy {
    /// The copied checkout.
    pub(super) sources: PathBuf,
    target: PathBuf,
    /// Two runs at once would put their mutants into the same copy.
    _lock: fs::File,
}

impl Copy {
    /// Brings the copy up to date. What did not change is not touched, so that it is not compiled again either.
    pub(super) fn make(checkout: &Path) -> Result<Self> {
        let home = checkout.join("target/mutants");
        let (sources, target) = (home.join("src"), home.join("target"));
        let lock = parts::lock(&home, "mutants")?;
        let mut git = Command::new("git");
        git.current_dir(checkout).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
        let listed = run::stdout(&mut git).context("git lists the sources")?;
        let mut wanted = BTreeSet::new();
        for name in listed.split('\0').filter(|name| !name.is_empty()) {
            let from = checkout.join(name);
            // Deleted, and git has not been told.
            let Ok(metadata) = fs::symlink_metadata(&from) else { continue };
            if metadata.is_file() {
                copy_file(&from, &sources.join(name))?;
                wanted.insert(sources.join(name));
            }
        }
        remove_others(&sources, &wanted)?;
        let copy = Self { sources, target, _lock: lock };
        let compiled = checkout.join("target/debug");
        if !copy.target.exists() && compiled.exists() {
            copy.link_registries(&compiled)?;
        }
        Ok(copy)
    }

    /// Cargo, in the copy.
    pub(super) fn cargo(&self) -> Command {
        let mut cargo = run::cargo();
        cargo.current_dir(&self.sources).env("CARGO_TARGET_DIR", &self.target);
        // A mutant changes one crate: what the last one left is most of what the next one needs. Nobody reads backtraces.
        cargo.env("CARGO_INCREMENTAL", "1").env("CARGO_PROFILE_DEV_DEBUG", "0");
        cargo
    }

    /// Links what `compiled` has of crates that are not the workspace's.
    fn link_registries(&self, compiled: &Path) -> Result<()> {
        let mut metadata = self.cargo();
        metadata.args(["metadata", "--format-version=1", "--no-deps", "--offline"]);
        let metadata: serde_json::Value = serde_json::from_str(&run::stdout(&mut metadata)?)?;
        let packages = metadata["packages"].as_array().into_iter().flatten();
        let ours: BTreeSet<&str> = packages.filter_map(|package| package["name"].as_str()).collect();
        let ours = |unit: &str| unit.rsplit_once('-').is_none_or(|(package, _)| ours.contains(package));
        let mut hashes = BTreeSet::new();
        for kind in [".fingerprint", "build"] {
            for unit in names(&compiled.join(kind))?.into_iter().filter(|unit| !ours(unit)) {
                hashes.extend(unit.rsplit_once('-').map(|(_, hash)| hash.to_owned()));
                link_tree(&compiled.join(kind).join(&unit), &self.debug().join(kind).join(&unit))?;
            }
        }
        let (from, to) = (compiled.join("deps"), self.debug().join("deps"));
        fs::create_dir_all(&to)?;
        for name in names(&from)? {
            let stem = name.split('.').next().unwrap_or_default();
            if stem.rsplit_once('-').is_some_and(|(_, hash)| hashes.contains(hash)) {
                link(&from.join(&name), &to.join(&name))?;
            }
        }
        Ok(())
    }

    fn debug(&self) -> PathBuf {
        self.target.join("debug")
    }
}

fn copy_file(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from)?;
    if fs::read(to).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    if let Some(dir) = to.parent() {
        fs::create_dir_all(dir)?;
    }
    // With its permissions: some of these are programs.
    fs::copy(from, to).with_context(|| format!("could not copy {}", from.display())).map(drop)
}

/// Removes every file below `dir` that is not wanted; directories may stay.
fn remove_others(dir: &Path, wanted: &BTreeSet<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_others(&path, wanted)?;
        } else if !wanted.contains(&path) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// The names in a directory; none if there is no such directory.
fn names(dir: &Path) -> Result<Vec<String>> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(vec![]) };
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

fn link_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for name in names(from)? {
        let (from, to) = (from.join(&name), to.join(&name));
        if fs::symlink_metadata(&from).is_ok_and(|metadata| metadata.is_dir()) {
            link_tree(&from, &to)?;
        } else {
            link(&from, &to)?;
        }
    }
    Ok(())
}

/// A file that goes away meanwhile is another cargo's doing, and compiled again here.
fn link(from: &Path, to: &Path) -> Result<()> {
    match fs::hard_link(from, to) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("could not link {}", from.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_did_not_change_is_not_touched_and_what_is_gone_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to/below"));
        fs::write(&from, "one").unwrap();
        copy_file(&from, &to).unwrap();
        let written = || fs::metadata(&to).unwrap().modified().unwrap();
        let before = written();
        copy_file(&from, &to).unwrap();
        assert_eq!(written(), before);
        fs::write(&from, "two").unwrap();
        copy_file(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "two");
        fs::write(dir.path().join("to/other"), "").unwrap();
        remove_others(&dir.path().join("to"), &BTreeSet::from([to.clone()])).unwrap();
        assert_eq!(names(&dir.path().join("to")).unwrap(), ["below"]);
    }
}
