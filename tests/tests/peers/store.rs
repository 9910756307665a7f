//! The local store against real Nix: each reads, verifies and collects what the other wrote.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, anyhow, ensure};
use drover_nix::{PathInfo, Sha256, StorePath};
use drover_store::{Access, GcOptions, GcReport, LocalStore, TempRoots};
use drover_tests::{Nix, Peer};
use serde_json::Value;

use crate::store_parts::{Root, copy_all, filled_by_nix, with_nix};

/// What `nix path-info` says of every path, without what may differ between equal stores.
fn all_infos(peer: &Peer, root: &Root) -> Result<Value> {
    let args = [
        "--extra-experimental-features",
        "nix-command",
        "path-info",
        "--json",
        "--all",
        "--store",
        &root.text(),
    ];
    Ok(serde_json::from_str(&peer.run("nix", &args)?)?)
}

#[test]
fn nix_is_content_with_a_store_that_drover_wrote() -> Result<()> {
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        let (theirs, out) = filled_by_nix(&peer)?;
        let ours = Root::new()?;
        copy_all(&theirs.store(Access::ReadOnly)?, &ours.store(Access::ReadWrite)?)?;
        peer.run("nix-store", &["--store", &ours.text(), "--verify", "--check-contents"])?;
        // Hashes, sizes, references, derivers, `ultimate`, content addresses and times: all of it.
        ensure!(all_infos(&peer, &ours)? == all_infos(&peer, &theirs)?, "{nix:?}");
        let full = format!("/nix/store/{out}");
        for query in ["--references", "--deriver", "--requisites", "--hash", "--size"] {
            let ask = |root: &Root| peer.run("nix-store", &["--store", &root.text(), "-q", query, &full]);
            ensure!(ask(&ours)? == ask(&theirs)?, "{nix:?} {query}");
        }
        let deriver = peer.run("nix-store", &["--store", &ours.text(), "-q", "--deriver", &full])?;
        let outputs = |root: &Root| {
            peer.run("nix-store", &["--store", &root.text(), "-q", "--outputs", deriver.trim()])
        };
        ensure!(outputs(&ours)? == outputs(&theirs)?, "{nix:?}");
        // And Nix goes on working in it: nothing is left to build.
        let again = with_nix(&peer, &ours).run("nix-build", &["--no-out-link", "-E", &theirs.chain()])?;
        ensure!(again.trim() == full, "{again}");
        ensure!(ours.store(Access::ReadOnly)?.verify(true)?.problems.is_empty());
    }
    Ok(())
}

#[test]
fn drover_reads_a_store_that_nix_wrote() -> Result<()> {
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        let (root, out) = filled_by_nix(&peer)?;
        let store = root.store(Access::ReadOnly)?;
        let full = format!("/nix/store/{out}");
        let requisites = peer.run("nix-store", &["--store", &root.text(), "-q", "--requisites", &full])?;
        let requisites: BTreeSet<StorePath> = requisites
            .lines()
            .map(|line| store.store_dir().parse(line.as_bytes()))
            .collect::<Result<_, _>>()?;
        ensure!(store.closure(&[out.clone()].into())? == requisites);
        ensure!(store.verify(true)?.problems.is_empty());
        for path in &requisites {
            let theirs = peer
                .command("nix-store")?
                .args([
                    "--store",
                    &root.text(),
                    "--dump",
                    &root.path().join("nix/store").join(path.as_str()).to_string_lossy(),
                ])
                .output()?;
            let mut ours = Vec::new();
            store.dump(path, &mut ours)?;
            ensure!(ours == theirs.stdout, "{nix:?} {path}");
        }
        // With all that is needed to work in it, too: a database of Nix's own making, and its locks.
        let store = root.store(Access::ReadWrite)?;
        ensure!(store.is_valid(&out)?);
        let drv = store.valid_derivers(&out)?.into_iter().next().context("no deriver")?;
        ensure!(store.derivation_outputs(&drv)?.values().any(|path| *path == out));
        store.read_derivation(&drv)?;
    }
    Ok(())
}

#[test]
fn nix_collects_garbage_around_what_drover_protects() -> Result<()> {
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        let (theirs, out) = filled_by_nix(&peer)?;
        let root = Root::new()?;
        let store = root.store(Access::ReadWrite)?;
        copy_all(&theirs.store(Access::ReadOnly)?, &store)?;
        let layout = store.layout().clone();
        // The imports' own roots go with the store that held them.
        drop(store);
        // By default the derivers of what is alive are kept too.
        let collect = || {
            let args = ["--option", "keep-derivations", "false", "--store", &root.text(), "--gc"];
            peer.run("nix-store", &args)
        };
        let store = LocalStore::open(layout, Access::ReadWrite)?;
        let closure = store.closure(&[out.clone()].into())?;
        let all = store.all_valid_paths()?;
        ensure!(closure.len() < all.len(), "there should be garbage");
        let roots = TempRoots::new(&store)?;
        roots.add(&out)?;
        collect()?;
        ensure!(store.all_valid_paths()? == closure, "{nix:?}");
        let present = |path: &StorePath| -> bool { store.real_path(path).exists() };
        ensure!(closure.iter().all(present) && !all.difference(&closure).any(present));
        drop(roots);
        collect()?;
        ensure!(store.all_valid_paths()?.is_empty(), "{nix:?}");
    }
    Ok(())
}

#[test]
fn drover_collects_what_nix_would() -> Result<()> {
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        let (source, out) = filled_by_nix(&peer)?;
        let source = source.store(Access::ReadOnly)?;
        let drv = source.valid_derivers(&out)?.into_iter().next().context("no deriver")?;
        for (keep_outputs, keep_derivations, kept) in [
            (false, false, &out),
            (false, true, &out),
            (true, false, &drv),
            (true, true, &out),
            (false, true, &drv),
        ] {
            let (ours, theirs) = (Root::new()?, Root::new()?);
            for root in [&ours, &theirs] {
                let store = root.store(Access::ReadWrite)?;
                copy_all(&source, &store)?;
                let link = store.layout().state_dir.join("gcroots/kept");
                std::os::unix::fs::symlink(store.store_dir().full(kept), link)?;
                std::fs::write(store.layout().real_store_dir.join("rubbish"), "")?;
            }
            let (outputs, derivations) = (keep_outputs.to_string(), keep_derivations.to_string());
            let options =
                ["--option", "keep-outputs", &outputs, "--option", "keep-derivations", &derivations];
            peer.run("nix-store", &[&options[..], &["--store", &theirs.text(), "--gc"]].concat())?;
            let store = ours.store(Access::ReadWrite)?;
            let options = GcOptions { keep_outputs, keep_derivations, ..GcOptions::default() };
            let before = store.all_valid_paths()?;
            let report = store.collect_garbage(&options)?;
            let left = store.all_valid_paths()?;
            ensure!(left == theirs.store(Access::ReadOnly)?.all_valid_paths()?, "{nix:?} {options:?} {kept}");
            ensure!(report.paths.len() + left.len() == before.len());
            ensure!(entries(&ours)? == entries(&theirs)?, "{nix:?} {options:?}");
            peer.run("nix-store", &["--store", &ours.text(), "--verify", "--check-contents"])?;
        }
    }
    Ok(())
}

#[test]
fn nix_builds_while_drover_collects() -> Result<()> {
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        let root = Root::new()?;
        let link = root.path().join("result");
        let store = root.store(Access::ReadWrite)?;
        add_garbage(&store, 3_000)?;
        // What was imported is protected as long as the store is open.
        drop(store);
        let store = root.store(Access::ReadWrite)?;
        let (report, out) = std::thread::scope(|scope| -> Result<(GcReport, String)> {
            let collector = scope.spawn(|| store.collect_garbage(&GcOptions::default()));
            // Nix finds the collector's lock taken, tells its socket, and is answered. One collection, not several: Nix
            // notes a path in its own file only after the answer, so a next collector could come too early to see it.
            let out = with_nix(&peer, &root)
                .run("nix-build", &["-o", &link.to_string_lossy(), "-E", &root.chain()])?;
            let report = collector.join().map_err(|_| anyhow!("the collector panicked"))??;
            Ok((report, out))
        })?;
        ensure!(report.paths.len() == 3_000, "{nix:?}: {} collected", report.paths.len());
        store.collect_garbage(&GcOptions::default())?;
        ensure!(store.is_valid(&store.store_dir().parse(out.trim().as_bytes())?)?, "{nix:?}");
        with_nix(&peer, &root).run("nix-store", &["--verify", "--check-contents"])?;
        std::fs::remove_file(&link)?;
        store.collect_garbage(&GcOptions::default())?;
        ensure!(store.all_valid_paths()?.is_empty(), "{nix:?}");
    }
    Ok(())
}

/// So many small files that nothing refers to.
fn add_garbage(store: &LocalStore, count: usize) -> Result<()> {
    let mut batch = store.batch()?;
    for i in 0..count {
        let mut nar = Vec::new();
        let mut writer = drover_nix::nar::Writer::new(&mut nar);
        writer.file_bytes(false, format!("{i}").as_bytes())?;
        writer.finish()?;
        let nar_hash = Sha256::of(&nar);
        let info = PathInfo {
            path: store.store_dir().make_path("garbage", nar_hash, "garbage")?,
            nar_hash,
            nar_size: nar.len() as u64,
            references: BTreeSet::new(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        };
        batch.add_nar(&info, false, 0, &mut &nar[..])?;
        if batch.len() == 100 {
            batch.commit()?;
        }
    }
    Ok(batch.commit()?)
}

/// Names in the store directory, but for lock files, which come and go.
fn entries(root: &Root) -> Result<BTreeSet<std::ffi::OsString>> {
    let entries = std::fs::read_dir(root.path().join("nix/store"))?;
    let names = entries.map(|entry| Ok(entry?.file_name())).collect::<Result<BTreeSet<_>>>()?;
    Ok(names.into_iter().filter(|name| !name.to_string_lossy().ends_with(".lock")).collect())
}
