//! The builder fetches what it is asked for from caches that real Nix wrote, over HTTP, for real Nix clients and for
//! Drover's own: the same content, signed or refused, from whichever cache is in order.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drover_nix::{StoreDir, StorePath};
use drover_serve::{BuildOptions, BuildTarget};
use drover_session::{Job, Trust};
use drover_tests::record::CHAIN;
use drover_tests::{HttpCache, Nix, Remote, program};

use crate::builds_fixture::{Reader, Session, Store};
use crate::session::{World, own_builder, session};

/// What the chain's last path requires: itself, a library and a source.
const CLOSURE: usize = 3;

/// A client's store in which the chain was built, and a cache that has it, signed.
struct Filled {
    remote: Remote,
    cache: HttpCache,
    out: String,
    /// Everything that `out` requires.
    paths: BTreeSet<StorePath>,
    /// Of the key that signed it.
    public_key: String,
    dir: tempfile::TempDir,
}

impl Filled {
    fn new(nix: Nix) -> Result<Self> {
        let (remote, dir) = (Remote::new(nix)?, tempfile::tempdir()?);
        let out = remote.run("nix-build", &["--no-out-link", "-A", "user", "-E", CHAIN])?;
        let out = out.lines().next().context("nix-build prints no path")?.to_owned();
        let text = remote.run("nix-store", &["-q", "--requisites", &out])?;
        let parse = |line: &str| StoreDir::default().parse(line.as_bytes());
        let paths = text.lines().map(parse).collect::<Result<BTreeSet<_>, _>>()?;
        ensure!(paths.len() == CLOSURE, "{paths:?}");
        let key = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        remote
            .run("nix-store", &["--generate-binary-cache-key", "test-1", &key("secret"), &key("public")])?;
        std::fs::create_dir(dir.path().join("signed"))?;
        let cache = HttpCache::start(&dir.path().join("signed"))?;
        let to = format!("{}?secret-key={}", cache.url(), key("secret"));
        remote.nix(&["copy", "--to", &to, &out])?;
        let public_key = std::fs::read_to_string(key("public"))?.trim().to_owned();
        Ok(Self { remote, cache, out, paths, public_key, dir })
    }

    /// A copy of the cache, under a URL of its own.
    fn copy(&self, name: &str) -> Result<HttpCache> {
        let to = self.dir.path().join(name);
        for dir in ["", "nar"] {
            let (from, to) = (self.cache.dir().join(dir), to.join(dir));
            std::fs::create_dir(&to)?;
            for entry in std::fs::read_dir(from)? {
                let entry = entry?;
                if entry.file_type()?.is_file() {
                    std::fs::copy(entry.path(), to.join(entry.file_name()))?;
                }
            }
        }
        HttpCache::start(&to)
    }

    /// What a new builder with these options has after it was asked to fetch everything, and what it says.
    fn fetched_with(&self, options: &[&str]) -> Result<(BTreeSet<StorePath>, String)> {
        let store = Store::new()?;
        let mut session = Session::start(store.drover(options)?, Reader::Follows)?;
        let valid = session.client()?.query_valid_paths(&self.paths, true, true)?;
        let said = session.end(true)?;
        store.expect_clean()?;
        Ok((valid, said))
    }
}

/// NARs that were asked of a cache.
fn nars(cache: &HttpCache) -> Result<usize> {
    Ok(cache
        .requests()?
        .iter()
        .filter(|(method, path, ..)| method == "GET" && path.contains("/nar/"))
        .count())
}

/// Changes a byte in the middle of every NAR.
fn spoil(cache: &Path) -> Result<()> {
    for entry in std::fs::read_dir(cache.join("nar"))? {
        let path = entry?.path();
        let mut bytes = std::fs::read(&path)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::remove_file(&path)?;
        std::fs::write(&path, bytes)?;
    }
    Ok(())
}

#[test]
fn every_real_client_has_the_builder_fetch() -> Result<()> {
    for nix in Nix::ALL {
        let filled = Filled::new(nix)?;
        let (remote, url, out) = (&filled.remote, filled.cache.url(), &filled.out);
        let options = ["--substituters", url, "--trusted-public-keys", &filled.public_key];
        for (name, expected) in [("told", CLOSURE), ("untold", 1)] {
            // Without the key only the source, which its content address proves, is there; the rest is copied.
            let options = if name == "told" { &options[..] } else { &options[..2] };
            let (uri, before) = (remote.server(name, options)?, nars(&filled.cache)?);
            remote.nix(&["copy", "--no-check-sigs", "--substitute-on-destination", "--to", &uri, out])?;
            let came = nars(&filled.cache)? - before;
            ensure!(came == expected, "{nix:?} {name}: {came} NARs were fetched");
            for path in &filled.paths {
                let at = remote.object(name, path.as_str());
                ensure!(at.exists(), "{nix:?} {name}: {path} is missing");
            }
            remote.verify(name)?;
        }
        // And its own program for copying.
        remote.server("closure", &options)?;
        let before = nars(&filled.cache)?;
        remote.install_as_nix_store("closure")?;
        remote.run("nix-copy-closure", &["--to", "--use-substitutes", "localhost", out])?;
        ensure!(nars(&filled.cache)? == before + CLOSURE, "{nix:?}: by nix-copy-closure");
        ensure!(remote.object("closure", out).exists(), "{nix:?}");
    }
    Ok(())
}

#[test]
fn caches_that_fail() -> Result<()> {
    let filled = Filled::new(Nix::V2_34)?;
    let (good, key) = (filled.cache.url().to_owned(), filled.public_key.as_str());
    let bad = filled.copy("bad")?;
    spoil(bad.dir())?;
    let none = BTreeSet::new();

    // Wrong bytes: said once, and had from another one.
    let both = format!("{} {good}", bad.url());
    let (valid, said) = filled.fetched_with(&["--substituters", &both, "--trusted-public-keys", key])?;
    ensure!(valid == filled.paths, "{valid:?} {said}");
    ensure!(said.matches("wrong").count() == 1 && said.contains(bad.url()), "{said}");
    let (valid, said) = filled.fetched_with(&["--substituters", bad.url(), "--trusted-public-keys", key])?;
    ensure!(valid == none && said.contains("wrong"), "{valid:?} {said}");

    // Nobody vouches for it: another key, none, or none and that is allowed.
    let other = "other-1:h9Q3q2ys0ue8rlbVUHfpKpnJLOwAr7XSVYDCt4QsGxk=";
    for (options, expected) in [
        (vec!["--substituters", &good, "--trusted-public-keys", other], &none),
        (vec!["--substituters", &good], &none),
        (vec!["--substituters", &good, "--no-require-sigs"], &filled.paths),
        (vec!["--substituters", &format!("{good}?trusted=true")], &filled.paths),
        (vec![], &none),
        (vec!["--substituters", &good, "--no-require-sigs", "--no-substitute"], &none),
    ] {
        // What its content proves needs nobody: the source.
        let proven = |path: &&StorePath| path.name() != "source";
        let (valid, said) = filled.fetched_with(&options)?;
        let (valid, expected) = (
            valid.iter().filter(proven).collect::<Vec<_>>(),
            expected.iter().filter(proven).collect::<Vec<_>>(),
        );
        ensure!(valid == expected, "{options:?}: {valid:?} {said}");
    }

    // One that refuses, and one that accepts and says nothing: given up soon, and had from another one.
    let refuses = format!("http://{}", TcpListener::bind("127.0.0.1:0")?.local_addr()?);
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let stalls = format!("http://{}", silent.local_addr()?);
    for down in [refuses, stalls] {
        let begun = Instant::now();
        let (urls, limit) = (format!("{down} {good}"), "--stalled-download-timeout");
        let options = ["--substituters", &urls, "--trusted-public-keys", key, limit, "1"];
        let (valid, said) = filled.fetched_with(&options)?;
        ensure!(valid == filled.paths, "{down}: {valid:?} {said}");
        ensure!(said.contains(&down) && said.lines().count() == 1, "{down}: {said}");
        ensure!(begun.elapsed() < Duration::from_secs(15), "{down}: it took {:?}", begun.elapsed());
    }
    Ok(())
}

/// A whole build, into whose status it goes; and what was fetched stays for as long as the session, whatever collectors do.
#[test]
fn sessions_send_what_the_builder_cannot_fetch() -> Result<()> {
    let world = World::new(Nix::V2_34)?;
    let inputs = HttpCache::start(&world.path("inputs"))?;
    let job = Job { trust: Trust::Claimed, ..world.job()? };
    let url = format!("{}?trusted=true", inputs.url());
    let mut command = own_builder(&world.path("server"))?;
    command.args(["--substituters", &url]);
    let (result, _, log) = session(command, &job)?;
    let outcome = result.with_context(|| log.clone())?;
    let transfer = outcome.transfer;
    ensure!((transfer.paths_fetched, transfer.paths_sent) == (2, 0), "{transfer:?} {log}");
    ensure!(transfer.bytes_fetched > 0 && transfer.bytes_sent == 0, "{transfer:?}");
    world.check(&job, &outcome)?;

    // One of the two is not to be had there any more.
    let library = job.derivation.input_srcs.iter().find(|path| path.name() == "lib");
    let library = library.context("it has a library")?;
    let hidden = tempfile::tempdir()?;
    let http = HttpCache::start(hidden.path())?;
    for entry in std::fs::read_dir(world.path("inputs"))?.chain(std::fs::read_dir(world.path("inputs/nar"))?)
    {
        let entry = entry?;
        let to = match entry.path().parent().is_some_and(|dir| dir.ends_with("nar")) {
            true => hidden.path().join("nar"),
            false => hidden.path().to_owned(),
        };
        std::fs::create_dir_all(&to)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_file() && name != format!("{}.narinfo", library.hash_part()) {
            std::fs::copy(entry.path(), to.join(name))?;
        }
    }
    let store = Store::new()?;
    let url = format!("{}?trusted=true", http.url());
    let (result, _, log) = session(store.drover(&["--substituters", &url])?, &job)?;
    let transfer = result.with_context(|| log.clone())?.transfer;
    ensure!(
        (transfer.paths_total, transfer.paths_fetched, transfer.paths_sent) == (2, 1, 1),
        "{transfer:?} {log}"
    );
    Ok(())
}

#[test]
fn what_was_fetched_is_kept_from_collectors() -> Result<()> {
    let filled = Filled::new(Nix::V2_34)?;
    let store = Store::new()?;
    let options = ["--substituters", filled.cache.url(), "--trusted-public-keys", &filled.public_key];
    let mut session = Session::start(store.drover(&options)?, Reader::Follows)?;
    // Not locked: what is fetched is kept even so, with all that it refers to.
    let top = StoreDir::default().parse(filled.out.as_bytes())?;
    let valid = session.client()?.query_valid_paths(&[top.clone()].into(), false, true)?;
    ensure!(valid.contains(&top), "{}", session.log());
    let collect = || -> Result<usize> {
        let mut gc = std::process::Command::new(program("drover-builder")?);
        xtask::run::stdout(gc.args(["gc", "--store"]).arg(store.path("")))?;
        Ok(store.open()?.valid_paths(&filled.paths)?.len())
    };
    ensure!(collect()? == CLOSURE, "it was collected");
    session.end(true)?;
    ensure!(collect()? == 0, "nobody keeps it any more");
    // To build a path that is no derivation is to fetch it.
    let mut session = Session::start(store.drover(&options)?, Reader::Follows)?;
    let target = BuildTarget { path: StoreDir::default().parse(filled.out.as_bytes())?, outputs: None };
    session.client()?.build_paths(&[target], &BuildOptions::default())?;
    session.end(true)?;
    ensure!(store.open()?.valid_paths(&filled.paths)?.len() == CLOSURE, "it was fetched");
    Ok(())
}
