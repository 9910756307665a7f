//! The list of mutants: what `tests/mutants/*.yaml` say, and where in the sources that applies. Reads files, changes none.

use std::collections::BTreeSet;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

/// Where the lists are, from the checkout.
pub const DIR: &str = "tests/mutants";

/// The invariants of the design document. Each has a mutant; a mutant may also guard something else, by its own word.
pub const INVARIANTS: [&str; 17] =
    ["S1", "S2", "S3", "S4", "S5", "S6", "S7", "S8", "S9", "S10", "S11", "S12", "L1", "L2", "L3", "L4", "L5"];

/// A guard taken away, and the test that must notice.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mutant {
    /// What goes wrong with it, in words joined by hyphens.
    pub name: String,
    /// The invariant, or `sandbox`, `store`, `protocol`.
    pub guards: String,
    /// From the checkout.
    pub file: String,
    /// What stands there, exactly once. A run of white space stands for any other, so that a line may be wrapped anew.
    pub old: String,
    /// What stands there instead.
    pub new: String,
    pub test: Test,
}

/// One test, as `PACKAGE TARGET NAME`: `drover-operator lib plan::tests::a`, `drover-tests test:peers hostile::b`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct Test {
    pub program: Program,
    /// The whole name, as the test program prints it.
    pub name: String,
}

/// A program of tests.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Program {
    pub package: String,
    pub target: Target,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Target {
    Lib,
    Bin(String),
    Test(String),
}

/// All mutants of a checkout, in the order of the files' names. Names are unique.
pub fn read(checkout: &Path) -> Result<Vec<Mutant>> {
    let dir = checkout.join(DIR);
    let entries = std::fs::read_dir(&dir).with_context(|| format!("could not read {}", dir.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    let mut all: Vec<Mutant> = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file)?;
        all.extend(parse(&text).with_context(|| format!("in {}", file.display()))?);
    }
    let mut names = BTreeSet::new();
    for mutant in &all {
        ensure!(names.insert(&mutant.name), "two mutants have the name {}", mutant.name);
    }
    ensure!(!all.is_empty(), "there are no mutants in {}", dir.display());
    Ok(all)
}

fn parse(text: &str) -> Result<Vec<Mutant>> {
    Ok(serde_yaml::from_str(text)?)
}

impl Mutant {
    /// By a part of its name, by what it guards, or by its test's package or program.
    pub fn is_meant_by(&self, word: &str) -> bool {
        self.name.contains(word)
            || self.guards == word
            || self.test.program.package == word
            || self.test.program.target == Target::Test(word.to_owned())
    }

    /// The file's text with the mutant in it.
    pub fn apply(&self, text: &str) -> Result<String> {
        let found = find(text, &self.old);
        let [found] = found.as_slice() else {
            bail!("its old text is {} times in {}, and must be there once", found.len(), self.file);
        };
        let mutated = [&text[..found.start], &self.new, &text[found.end..]].concat();
        ensure!(mutated != text, "its new text is the old one");
        Ok(mutated)
    }
}

/// Where `wanted` occurs in `text`, any run of white space standing for any other. What overlaps counts as well.
fn find(text: &str, wanted: &str) -> Vec<std::ops::Range<usize>> {
    let words: Vec<&str> = wanted.split_whitespace().collect();
    let Some((first, rest)) = words.split_first() else { return vec![] };
    let mut found = Vec::new();
    for (start, _) in text.match_indices(first) {
        let end = rest.iter().try_fold(start + first.len(), |end, word| {
            let behind = &text[end..];
            let trimmed = behind.trim_start();
            let space = behind.len() - trimmed.len();
            (space > 0 && trimmed.starts_with(word)).then(|| end + space + word.len())
        });
        found.extend(end.map(|end| start..end));
    }
    found
}

impl TryFrom<String> for Test {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl FromStr for Test {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let [package, target, name] = words.as_slice() else {
            bail!("a test is `PACKAGE TARGET NAME`, and not {text:?}");
        };
        let target = match target.split_once(':') {
            None if *target == "lib" => Target::Lib,
            Some(("bin", name)) => Target::Bin(name.to_owned()),
            Some(("test", name)) => Target::Test(name.to_owned()),
            _ => bail!("a target is `lib`, `bin:NAME` or `test:NAME`, and not {target:?}"),
        };
        Ok(Self { program: Program { package: (*package).to_owned(), target }, name: (*name).to_owned() })
    }
}

impl Program {
    /// What cargo is told to get it.
    pub fn arguments(&self) -> Vec<&str> {
        match &self.target {
            Target::Lib => vec!["-p", self.package.as_str(), "--lib"],
            // No two packages have one of the same name, and so nothing is compiled anew: see `development`.
            Target::Bin(name) => vec!["--workspace", "--bin", name],
            Target::Test(name) => vec!["--workspace", "--test", name],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mutant(old: &str, new: &str) -> Mutant {
        let text = "[{name: a, guards: S1, file: src/a.rs, old: x, new: '', test: p lib m::t}]";
        let [one] = <[_; 1]>::try_from(parse(text).unwrap()).unwrap();
        Mutant { old: old.into(), new: new.into(), ..one }
    }

    #[test]
    fn a_list_is_read() {
        let one = mutant("x", "");
        assert_eq!((one.guards.as_str(), one.test.name.as_str()), ("S1", "m::t"));
        assert_eq!(one.test.program.arguments(), ["-p", "p", "--lib"]);
        let arguments = |text: &str| {
            let program = text.parse::<Test>().map(|test| test.program);
            program.map(|program| program.arguments().join(" ")).map_err(|error| error.to_string())
        };
        assert_eq!(arguments("p test:peers a::b").unwrap(), "--workspace --test peers");
        assert_eq!(arguments("p bin:tool a").unwrap(), "--workspace --bin tool");
        assert!(arguments("p tests a").unwrap_err().contains("`lib`"));
        assert!(arguments("p lib").unwrap_err().contains("PACKAGE TARGET NAME"));
        assert!(parse("[{name: a, gaurds: S1}]").unwrap_err().to_string().contains("gaurds"));
    }

    #[test]
    fn the_old_text_is_there_once() {
        let text = "if a {\n    b(\n        c);\n}\nif d {}\n";
        assert_eq!(mutant("if d {}", "e").apply(text).unwrap(), "if a {\n    b(\n        c);\n}\ne\n");
        let times = |old| mutant(old, "e").apply(text).unwrap_err().to_string();
        assert!(times("if").contains("2 times"));
        assert!(times("nothing").contains("0 times"));
        assert!(times(" ").contains("0 times"));
        assert!(mutant("if d {}", "if d {}").apply(text).unwrap_err().to_string().contains("the old one"));
    }

    #[test]
    fn white_space_is_any_white_space_but_not_none() {
        let text = "if a {\n    b(c);\n}\n";
        assert_eq!(mutant("if a { b(c); }", "").apply(text).unwrap(), "\n");
        assert_eq!(mutant("a {\nb(", "x").apply(text).unwrap(), "if xc);\n}\n");
        assert!(mutant("b (c)", "").apply(text).is_err());
        assert_eq!(find("aa aa aa", "aa aa").len(), 2, "what overlaps is not hidden");
    }

    #[test]
    fn every_invariant_has_a_mutant() {
        let mutants = read(&crate::checkout()).unwrap();
        let guarded: BTreeSet<&str> = mutants.iter().map(|mutant| mutant.guards.as_str()).collect();
        let bare: Vec<&str> = INVARIANTS.into_iter().filter(|one| !guarded.contains(one)).collect();
        assert_eq!(bare, [""; 0]);
    }

    /// Without compiling anything: every mutant of this checkout has its place.
    #[test]
    fn no_mutant_is_stale() {
        let checkout = crate::checkout();
        let stale = read(&checkout).unwrap().into_iter().filter_map(|mutant| {
            let text = std::fs::read_to_string(checkout.join(&mutant.file)).unwrap_or_default();
            mutant.apply(&text).err().map(|error| format!("{}: {error}", mutant.name))
        });
        assert_eq!(stale.collect::<Vec<_>>(), [""; 0]);
    }
}
