//! Proof by comparison: every derivation of `tests/derivations/corpus`, instantiated by real Nix, is built by real Nix 2.34
//! and by Drover. The same status, output paths, archives, references, content addresses, derivers and files have to come
//! out; where they do not by intention, the case and the reason are listed here, and a list that is no longer true fails.

mod command_line;
mod leg;
mod outcome;
mod report;
mod visible;

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Result, anyhow, ensure};
use drover_nix::StorePath;
use drover_nix::hash_modulo::SelfReferenceHash;
use drover_store::{Access, LocalStore};
use drover_tests::corpus::{self, Case};
use drover_tests::{Nix, Peer};

use self::leg::{Leg, User};
use self::outcome::Outcomes;
use crate::store_parts::{Root, no_leftovers, verify};

/// The corpus, instantiated into a store where nothing is built.
struct Corpus {
    cases: Vec<Case>,
    source: Root,
    tools: tempfile::TempDir,
    peer: Peer,
}

impl Corpus {
    fn new() -> Result<Self> {
        let tools = tempfile::tempdir()?;
        corpus::tools(tools.path())?;
        let (peer, source) = (Peer::new(Nix::V2_34)?, Root::new()?);
        let cases = corpus::instantiate(&peer, tools.path(), &["--store", &source.text()])?;
        Ok(Self { cases, source, tools, peer })
    }

    /// The shell of all sandboxes.
    fn shell(&self) -> PathBuf {
        self.tools.path().join("bin/busybox")
    }

    fn store(&self) -> Result<LocalStore> {
        self.source.store(Access::ReadOnly)
    }

    /// Has each leg build its cases, all legs at a time.
    fn build<const N: usize>(&self, legs: [(Leg, &[&Case]); N]) -> Result<[Outcomes; N]> {
        let outcomes: Vec<Outcomes> = std::thread::scope(|scope| {
            let build = |(leg, cases)| scope.spawn(move || Leg::build_all(leg, &self.store()?, cases));
            let threads = legs.map(build);
            threads
                .into_iter()
                .map(|thread| thread.join().map_err(|_| anyhow!("a leg panicked"))?)
                .collect::<Result<_>>()
        })?;
        outcomes.try_into().map_err(|_| anyhow!("as many outcomes as legs"))
    }
}

/// How Nix 2.34 makes the paths of content that refers to itself.
const WITHOUT_OFFSETS: [&str; 2] = ["--self-reference-hash", "without-offsets"];

#[test]
fn drover_builds_what_nix_builds() -> Result<()> {
    let corpus = Corpus::new()?;
    let tools = corpus.tools.path();
    let all: Vec<&Case> = corpus.cases.iter().collect();
    let itself: Vec<&Case> =
        all.iter().copied().filter(|case| report::SELF_REFERENCES.contains(&case.name.as_str())).collect();
    ensure!(all.len() >= 60 && itself.len() == report::SELF_REFERENCES.len());

    let [theirs, ours, older, users] = [Root::new()?, Root::new()?, Root::new()?, Root::new()?];
    let [nix, drover, without_offsets, ordinary] = corpus.build([
        (Leg::nix(&corpus.peer, &theirs, &corpus.shell(), User::Root)?, &all),
        (Leg::drover(&ours, tools, User::Root, &[])?, &all),
        (Leg::drover(&older, tools, User::Root, &WITHOUT_OFFSETS)?, &itself),
        (Leg::drover(&users, tools, User::Ordinary, &[])?, &all),
    ])?;

    let with = SelfReferenceHash::WithOffsets;
    let compared = [
        report::compare("as root", &all, &nix, &drover, with),
        report::compare(
            "as root, --self-reference-hash without-offsets",
            &itself,
            &nix,
            &without_offsets,
            SelfReferenceHash::WithoutOffsets,
        ),
        report::compare("as an ordinary user", &all, &nix, &ordinary, with),
    ];
    compared.into_iter().collect::<Result<Vec<()>>>()?;
    let expected = made(&corpus, &theirs)?;
    for root in [&ours, &users] {
        let made = made(&corpus, root)?;
        report::compare_stores(&expected, &made)?;
    }
    for root in [&ours, &older, &users] {
        verify(&corpus.peer, root)?;
        no_leftovers(root)?;
    }
    Ok(())
}

/// What builds have made valid in this store, outputs of failed ones included, but for cases that may differ.
fn made(corpus: &Corpus, root: &Root) -> Result<BTreeSet<StorePath>> {
    let mut paths = root.store(Access::ReadOnly)?.all_valid_paths()?;
    let sources = corpus.store()?.all_valid_paths()?;
    let differ: Vec<&str> =
        corpus.cases.iter().map(|case| case.name.as_str()).filter(|name| report::may_differ(name)).collect();
    paths.retain(|path| !sources.contains(path) && !differ.iter().any(|name| path.name().starts_with(name)));
    Ok(paths)
}
