//! Output paths and `.drv` files against a corpus that real Nix instantiates, and lies about them.

mod builder;
mod clients;
mod closures;
mod generator;
mod lies;
mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use drover_nix::derivation::proof::{ProofError, Proven, prove_alone};
use drover_nix::derivation::{DerivationType, aterm, json, modulo, placeholder};
use drover_nix::{Derivation, DerivationOutput, StoreDir, StorePath};
use drover_tests::{Nix, Peer};
use serde_json::Value;

use self::generator::Knows;

const SEED: u64 = 7;

/// What Nix has to be told before it knows everything that is in the corpus.
const FEATURES: &str =
    "experimental-features = nix-command ca-derivations impure-derivations dynamic-derivations git-hashing";
const FEATURES_2_8: &str = "experimental-features = nix-command ca-derivations impure-derivations";

/// What Nix says of one derivation: paths, or placeholders where it does not know them.
struct Said {
    drv: String,
    outputs: BTreeMap<String, String>,
}

impl Said {
    fn parse(value: &Value) -> Option<Self> {
        let outputs = value["outputs"].as_object()?.iter();
        let outputs = outputs.map(|(name, path)| Some((name.clone(), path.as_str()?.to_owned())));
        Some(Self { drv: value["drv"].as_str()?.to_owned(), outputs: outputs.collect::<Option<_>>()? })
    }
}

/// A store that real Nix has instantiated the corpus into.
struct Corpus {
    dir: tempfile::TempDir,
    peer: Peer,
    said: Vec<Said>,
    /// Every `.drv` file.
    files: BTreeMap<StorePath, Vec<u8>>,
}

impl Corpus {
    fn new(nix: Nix) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let store = dir.path().join("nix");
        std::fs::create_dir(&store)?;
        let knows = Knows { git: nix != Nix::V2_8, text: nix != Nix::V2_8 };
        let sources = dir.path().join("sources");
        generator::sources(&sources)?;
        let expression = dir.path().join("corpus.nix");
        std::fs::write(&expression, generator::expression(SEED, knows, &sources))?;
        let peer = Peer::new(nix)?.with_at(&store, "/nix");
        let mut this = Self { dir, peer, said: Vec::new(), files: BTreeMap::new() };
        let path = expression.to_str().context("temporary directories are UTF-8")?;
        let said =
            this.nix("nix-instantiate", &["--eval", "--strict", "--json", "--read-write-mode", path])?;
        let said: Vec<Value> = serde_json::from_str(&said)?;
        this.said = said.iter().map(Said::parse).collect::<Option<_>>().context("a path for each output")?;
        for entry in std::fs::read_dir(this.store())? {
            let entry = entry?;
            if let Some(path) = entry.file_name().to_str().and_then(|name| name.parse::<StorePath>().ok())
                && path.is_derivation()
            {
                this.files.insert(path, std::fs::read(entry.path())?);
            }
        }
        Ok(this)
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("nix/store")
    }

    fn nix(&self, program: &str, args: &[&str]) -> Result<String> {
        let features = if self.peer.version() == Nix::V2_8 { FEATURES_2_8 } else { FEATURES };
        xtask::run::stdout(self.peer.command(program)?.args(args).env("NIX_CONFIG", features))
    }

    fn drv(&self, path: &StorePath) -> Result<Derivation> {
        let text = self.files.get(path).with_context(|| format!("there is no {path}"))?;
        let name = path.derivation_name().context("a .drv")?;
        Ok(aterm::parse(&StoreDir::default(), name, text)?)
    }
}

impl Drop for Corpus {
    fn drop(&mut self) {
        let _ = drover_store::fs::delete(&self.dir.path().join("nix"));
    }
}

fn prove(
    proven: &mut Proven,
    files: &BTreeMap<StorePath, Vec<u8>>,
    root: &StorePath,
) -> Result<(), ProofError<Infallible>> {
    proven.prove(&StoreDir::default(), root, &mut |path| Ok(files.get(path).cloned()))
}

/// How many derivations there are of what kind, and how far some of their shapes go.
#[derive(Default, Debug)]
struct Count {
    all: usize,
    fixed: BTreeSet<String>,
    floating: usize,
    impure: usize,
    deferred: usize,
    input_addressed: usize,
    alone: usize,
    structured: usize,
    most_outputs: usize,
    not_text: usize,
    resolved: usize,
}

#[test]
fn files_and_paths_are_those_that_every_real_nix_computes() -> Result<()> {
    for nix in Nix::ALL {
        let corpus = Corpus::new(nix)?;
        let count = compare(&corpus).with_context(|| format!("{nix:?}"))?;
        compare_shown(&corpus).with_context(|| format!("what {nix:?} shows"))?;
        ensure!(count.all >= 500 && corpus.files.len() >= 500, "{nix:?}: {count:?}");
        let fixed = if nix == Nix::V2_8 { 8 } else { 10 };
        ensure!(count.fixed.len() == fixed, "{nix:?}: every method with every hash: {count:?}");
        let Count { floating, impure, deferred, structured, alone, most_outputs, not_text, resolved, .. } =
            count;
        let few = floating.min(impure).min(deferred).min(structured).min(alone).min(not_text);
        ensure!(few >= 5 && most_outputs == 20 && resolved >= 300, "{nix:?}: {count:?}");
        // The same content fetched in three ways, and one path above.
        let above: Vec<_> =
            corpus.said.iter().filter(|said| said.drv.ends_with("-above-fetched.drv")).collect();
        let paths: BTreeSet<_> = above.iter().map(|said| &said.outputs).collect();
        ensure!(above.len() == 3 && paths.len() == 1, "{nix:?}: {paths:?}");
    }
    Ok(())
}

/// Every derivation of the corpus against what Nix says of it.
fn compare(corpus: &Corpus) -> Result<Count> {
    let dir = StoreDir::default();
    let (mut count, mut proven) = (Count::default(), Proven::default());
    for said in &corpus.said {
        let path = dir.parse(said.drv.as_bytes())?;
        one(corpus, said, &path, &mut proven, &mut count).with_context(|| path.to_string())?;
    }
    Ok(count)
}

fn one(corpus: &Corpus, said: &Said, path: &StorePath, proven: &mut Proven, count: &mut Count) -> Result<()> {
    let dir = StoreDir::default();
    let drv = corpus.drv(path)?;
    let text = &corpus.files[path];
    ensure!(aterm::print(&dir, &drv)? == *text, "it is printed otherwise");
    ensure!(modulo::drv_path(&dir, &drv)? == *path, "its path is another one");
    prove(proven, &corpus.files, path)?;

    // Nix and we say the same of every output.
    let kind = drv.basic.kind()?;
    let paths = drv.basic.output_paths(&dir)?;
    ensure!(paths.len() == said.outputs.len());
    for (output, path_of) in &paths {
        let expected = match path_of {
            Some(known) => dir.full(known),
            None => placeholder::of_input(path, output).context("a .drv")?,
        };
        ensure!(
            said.outputs.get(output.as_str()) == Some(&expected),
            "{output}: {expected}, not {:?}",
            said.outputs
        );
    }
    count.all += 1;
    count.structured += usize::from(drv.basic.env("__json").is_some());
    count.not_text += usize::from(std::str::from_utf8(text).is_err());
    count.most_outputs = count.most_outputs.max(paths.len());
    match kind {
        DerivationType::CaFixed => {
            if let Some(DerivationOutput::CaFixed(ca)) = drv.basic.outputs.values().next() {
                count.fixed.insert(format!("{}{}", ca.method.prefix(), ca.hash.algo));
            }
        }
        DerivationType::CaFloating => count.floating += 1,
        DerivationType::Impure => count.impure += 1,
        DerivationType::Deferred => count.deferred += 1,
        DerivationType::InputAddressed => count.input_addressed += 1,
    }

    // What a request for it says: the paths are proven from the closure, and from itself where there is none.
    let Ok(request) = proven.resolve(&dir, path) else {
        let floats = |input: &StorePath| {
            Ok::<_, anyhow::Error>(corpus.drv(input)?.basic.output_paths(&dir)?.values().any(Option::is_none))
        };
        let below = drv.input_drvs.keys().map(floats).collect::<Result<Vec<_>>>()?;
        ensure!(below.contains(&true), "all of its inputs are known, and yet it is not resolved");
        return Ok(());
    };
    count.resolved += 1;
    proven.entitles(&dir, path, &request, &BTreeSet::new())?;
    let alone = prove_alone(&dir, &request);
    match (kind, drv.input_drvs.is_empty()) {
        (DerivationType::InputAddressed, false) => {
            ensure!(matches!(alone, Err(ProofError::Path { .. })), "{alone:?}");
        }
        _ => alone?,
    }
    if kind == DerivationType::InputAddressed && drv.input_drvs.is_empty() {
        count.alone += 1;
        // With its paths left out, and with their variables.
        let mut blank = request.clone();
        for output in request.outputs.keys() {
            blank.outputs.insert(output.clone(), DerivationOutput::Deferred);
            blank.env.remove(output.as_str().as_bytes());
        }
        modulo::fill_output_paths(&dir, &mut blank)?;
        ensure!(blank == request, "filled in otherwise");
    }
    Ok(())
}

/// What Nix shows of the whole corpus as JSON is read to the same derivations, where JSON can hold them.
fn compare_shown(corpus: &Corpus) -> Result<()> {
    let (dir, nix) = (StoreDir::default(), corpus.peer.version());
    let texts = corpus.files.iter().filter(|(_, text)| std::str::from_utf8(text).is_ok());
    let paths: Vec<String> = texts.map(|(path, _)| dir.full(path)).collect();
    let show = if nix == Nix::V2_8 { &["show-derivation"][..] } else { &["derivation", "show"] };
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    let shown = corpus.nix("nix", &[show, &paths].concat())?;
    let shown = json::parse(&dir, shown.as_bytes())?;
    ensure!(shown.len() == paths.len() && shown.len() >= 450, "{}", shown.len());
    for (path, drv) in shown {
        ensure!(drv == corpus.drv(&path)?, "{path}");
    }
    Ok(())
}
