//! `builtin:buildenv`: one tree of symlinks to what several packages hold (Nix: builtins/buildenv.cc). Where two have the
//! same file the lower priority number wins, and equal ones are an error; directories are merged.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::Job;

/// Names below a package that no environment shows: of use to nobody there, or in every package.
const HIDDEN: [&[u8]; 7] = [
    b"/propagated-build-inputs",
    b"/nix-support",
    b"/perllocal.pod",
    b"/info/dir",
    b"/log",
    b"/manifest.nix",
    b"/manifest.json",
];
/// Priority of the first package that another one asks for; each further one's is one higher.
const FIRST_PROPAGATED: i64 = 1000;
/// Directories in directories, which are merged recursively.
const MAX_DEPTH: usize = 256;

pub(super) fn run(job: &Job) -> Result<()> {
    let out = job.out()?;
    fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let packages = packages(job.attribute("derivations")?)?;
    build(out, packages)?;
    link(Path::new(job.attribute("manifest")?), &out.join("manifest.nix"))
}

/// A directory to show. Ordered as they are taken: what wins comes first, as a rule.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Package {
    priority: i64,
    path: PathBuf,
}

/// Reads `active priority count path…`, again and again. Inactive packages are left out.
fn packages(text: &OsStr) -> Result<Vec<Package>> {
    let mut words = text.as_bytes().split(|byte| b" \t\n\r".contains(byte)).filter(|word| !word.is_empty());
    let mut packages = Vec::new();
    while let Some(active) = words.next() {
        let mut number = |what: &str| {
            let word = words.next().with_context(|| format!("'derivations' ends before {what}"))?;
            let number = std::str::from_utf8(word).ok().and_then(|word| word.parse::<i64>().ok());
            number.with_context(|| {
                format!("{what} in 'derivations' is no number: {:?}", OsStr::from_bytes(word))
            })
        };
        let (priority, count) = (number("a priority")?, number("a number of outputs")?);
        for _ in 0..count {
            let path = words.next().context("'derivations' ends before all of its outputs")?;
            if active != b"false" {
                packages.push(Package { priority, path: OsStr::from_bytes(path).into() });
            }
        }
    }
    Ok(packages)
}

fn build(out: &Path, mut packages: Vec<Package>) -> Result<()> {
    packages.sort();
    let mut done = BTreeSet::new();
    let mut tree = Tree::default();
    let mut priority = FIRST_PROPAGATED;
    while !packages.is_empty() {
        let mut propagated = BTreeSet::new();
        for package in packages {
            if done.insert(package.path.clone()) {
                tree.add(&package.path, out, package.priority, 0)?;
                propagated.extend(propagates(&package.path)?.into_iter().filter(|path| !done.contains(path)));
            }
        }
        // They stand behind all that was asked for, each in a place of its own.
        packages = propagated
            .into_iter()
            .map(|path| {
                priority += 1;
                Package { priority: priority - 1, path }
            })
            .collect();
    }
    Ok(())
}

/// What else a package wants to have in the environment.
fn propagates(package: &Path) -> Result<Vec<PathBuf>> {
    let list = package.join("nix-support/propagated-user-env-packages");
    let text = match fs::read(&list) {
        Ok(text) => text,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", list.display())),
    };
    let words = text.split(|byte| b" \n".contains(byte)).filter(|word| !word.is_empty());
    Ok(words.map(|word| OsStr::from_bytes(word).into()).collect())
}

/// The environment as far as it is made.
#[derive(Default)]
struct Tree {
    /// Of each symlink.
    priorities: BTreeMap<PathBuf, i64>,
}

impl Tree {
    /// Shows in `to`, a directory, what `from` holds.
    fn add(&mut self, from: &Path, to: &Path, priority: i64, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            bail!("{} lies more than {MAX_DEPTH} directories deep", from.display());
        }
        let entries = match fs::read_dir(from) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotADirectory => {
                eprintln!("leaving out {}: it is not a directory", from.display());
                return Ok(());
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read the directory {}", from.display()));
            }
        };
        let names =
            entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<BTreeSet<_>, _>>();
        for name in names.with_context(|| format!("cannot read the directory {}", from.display()))? {
            if name.as_bytes().starts_with(b".") {
                continue;
            }
            self.add_entry(&from.join(&name), &to.join(&name), priority, depth)?;
        }
        Ok(())
    }

    fn add_entry(&mut self, from: &Path, to: &Path, priority: i64, depth: usize) -> Result<()> {
        let Some(source) = look(from, |path| fs::metadata(path))? else {
            eprintln!("leaving out {}: it is a symlink to nothing", from.display());
            return Ok(());
        };
        if HIDDEN.iter().any(|name| from.as_os_str().as_bytes().ends_with(name)) {
            return Ok(());
        }
        if let Some(present) = look(to, |path| fs::symlink_metadata(path))? {
            match (source.is_dir(), present.is_dir()) {
                (true, true) => return self.add(from, to, priority, depth + 1),
                (true, false) if present.is_symlink() => return self.merge(from, to, priority, depth),
                (false, false) if present.is_symlink() => {
                    let before = self.priority(to);
                    if before == priority {
                        let other = fs::read_link(to).unwrap_or_default();
                        bail!(
                            "two packages of priority {priority} have the same file:\n  {}\n  {}\nGive one of them \
                             another priority, or take it out of the environment",
                            other.display(),
                            from.display()
                        );
                    }
                    if before < priority {
                        return Ok(());
                    }
                    remove(to)?;
                }
                (false, true) => {
                    bail!("{} is a file and {} a directory: both cannot be had", from.display(), to.display())
                }
                _ => {}
            }
        }
        link(from, to)?;
        self.priorities.insert(to.to_owned(), priority);
        Ok(())
    }

    /// Makes a directory of the symlink `to`, which has to lead to one, and shows both in it.
    fn merge(&mut self, from: &Path, to: &Path, priority: i64, depth: usize) -> Result<()> {
        let target = fs::canonicalize(to).with_context(|| format!("cannot resolve {}", to.display()))?;
        if !target.is_dir() {
            bail!("{} is a directory and {} none: both cannot be had", from.display(), target.display());
        }
        remove(to)?;
        fs::create_dir(to).with_context(|| format!("cannot create {}", to.display()))?;
        self.add(&target, to, self.priority(to), depth + 1)?;
        self.add(from, to, priority, depth + 1)
    }

    fn priority(&self, of: &Path) -> i64 {
        self.priorities.get(of).copied().unwrap_or(0)
    }
}

fn look(path: &Path, how: impl Fn(&Path) -> std::io::Result<Metadata>) -> Result<Option<Metadata>> {
    match how(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot examine {}", path.display())),
    }
}

fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
}

fn link(target: &Path, name: &Path) -> Result<()> {
    std::os::unix::fs::symlink(target, name)
        .with_context(|| format!("cannot make the symlink {} to {}", name.display(), target.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builtin::testing;

    /// Packages in a directory of their own: `package/file` each, with its name for contents.
    struct Packages(tempfile::TempDir);

    impl Packages {
        fn new(files: &[&str]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            for file in files {
                let path = dir.path().join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, file).unwrap();
            }
            Self(dir)
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        /// `active priority package` each.
        fn build(&self, packages: &[(bool, i64, &str)]) -> Result<()> {
            let entry = |(active, priority, name): &(bool, i64, &str)| {
                format!("{active} {priority} 1 {}", self.path(name).display())
            };
            let text: Vec<String> = packages.iter().map(entry).collect();
            let out = self.path("out");
            run(&testing::job(&[("derivations", &text.join(" ")), ("manifest", "/m")], &out))
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.path("out").join(name)).unwrap_or_else(|error| error.kind().to_string())
        }

        fn is_link(&self, name: &str) -> bool {
            self.path("out").join(name).is_symlink()
        }
    }

    #[test]
    fn directories_are_linked_whole_until_they_have_to_be_merged() {
        let packages = Packages::new(&["a/bin/a", "a/share/doc/a", "b/bin/b", "b/.hidden", "b/log"]);
        packages.build(&[(true, 5, "a"), (true, 5, "b")]).unwrap();
        assert_eq!((packages.read("bin/a"), packages.read("bin/b")), ("a/bin/a".into(), "b/bin/b".into()));
        assert!(!packages.is_link("bin") && packages.is_link("bin/a") && packages.is_link("share"));
        let names: BTreeSet<_> =
            fs::read_dir(packages.path("out")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["bin", "manifest.nix", "share"].map(Into::into).into());
        assert_eq!(fs::read_link(packages.path("out/manifest.nix")).unwrap(), Path::new("/m"));
    }

    #[test]
    fn the_lower_priority_number_wins_whatever_the_order() {
        let packages = Packages::new(&["a/f", "a/d/f", "b/f", "b/d/f", "c/f"]);
        packages.build(&[(true, 9, "a"), (true, 3, "b"), (false, 1, "c")]).unwrap();
        assert_eq!((packages.read("f"), packages.read("d/f")), ("b/f".into(), "b/d/f".into()));
    }

    #[test]
    fn collisions() {
        let packages = Packages::new(&["a/f", "b/f", "c/f/x"]);
        let error = packages.build(&[(true, 5, "b"), (true, 5, "a")]).unwrap_err().to_string();
        assert!(
            error.contains("priority 5") && error.contains("/a/f\n") && error.contains("/b/f\n"),
            "{error}"
        );
        for (a, c) in [(1, 2), (2, 1)] {
            let packages = Packages::new(&["a/f", "c/f/x", "d/f/y"]);
            let error =
                packages.build(&[(true, a, "a"), (true, c, "c"), (true, c, "d")]).unwrap_err().to_string();
            assert!(error.contains("both cannot be had"), "{error}");
        }
    }

    #[test]
    fn what_packages_propagate_comes_last() {
        let packages = Packages::new(&["a/f", "b/f", "b/g", "c/g", "c/h"]);
        let propagate = |name: &str, list: &str| {
            fs::create_dir(packages.path(name).join("nix-support")).unwrap();
            fs::write(packages.path(name).join("nix-support/propagated-user-env-packages"), list).unwrap();
        };
        let (b, c) = (packages.path("b"), packages.path("c"));
        propagate("a", &format!("{} {}\n", c.display(), b.display()));
        propagate("c", &format!("{}\n", packages.path("a").display()));
        packages.build(&[(true, 2000, "a")]).unwrap();
        // In order of their names, and before `a` by their numbers: 1000 and 1001 against 2000.
        assert_eq!([packages.read("f"), packages.read("g"), packages.read("h")], ["b/f", "b/g", "c/h"]);
    }

    #[test]
    fn oddities() {
        let packages = Packages::new(&["a/f", "file"]);
        std::os::unix::fs::symlink("nowhere", packages.path("a/dangling")).unwrap();
        packages.build(&[(true, 5, "a"), (true, 5, "a"), (true, 6, "file")]).unwrap();
        assert!(!packages.is_link("dangling") && packages.is_link("f"));
        let other = Packages::new(&[]);
        assert!(
            other
                .build(&[(true, 5, "absent")])
                .unwrap_err()
                .to_string()
                .contains("cannot read the directory")
        );
        for text in ["true", "true x 1 /p", "true 1 2 /p", "true 1"] {
            assert!(super::packages(OsStr::new(text)).is_err(), "{text}");
        }
        assert_eq!(
            super::packages(OsStr::new(" true -1\n1 /p false 2 1 /q ")).unwrap(),
            [Package { priority: -1, path: "/p".into() }]
        );
    }
}
