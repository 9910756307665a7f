//! A store is the same whoever made it, and may go from hand to hand: tables, files, owners, and what each adds.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use drover_nix::StorePath;
use drover_store::{Access, GcOptions, LocalStore};
use drover_tests::{Nix, Peer};
use rusqlite::{Connection, OpenFlags};

use crate::store_parts::{Root, build_chain, file_nar, info, no_leftovers, verify, with_nix};

#[test]
fn a_new_store_is_what_nix_makes() -> Result<()> {
    let ours = Root::new()?;
    drop(ours.store(Access::ReadWrite)?);
    let (our_schema, our_tree) = (schema(&ours)?, tree(&ours)?);
    for nix in Nix::ALL {
        let theirs = Root::new()?;
        Peer::new(nix)?.run("nix-store", &["--store", &theirs.text(), "--verify"])?;
        let mut their_schema = schema(&theirs)?;
        // An index that the primary key makes superfluous, which Nix 2.35 removes; a note about its own migrations.
        their_schema.remove("index IndexReferrer").context("no IndexReferrer")?;
        their_schema.remove("table SchemaMigrations");
        ensure!(our_schema == their_schema, "{nix:?}: {our_schema:#?} is not {their_schema:#?}");
        ensure!(pragmas(&ours)? == pragmas(&theirs)?, "{nix:?}: {:?}", pragmas(&theirs)?);
        let schema = |root: &Root| std::fs::read(root.state("db/schema"));
        ensure!(schema(&ours)? == schema(&theirs)?, "{nix:?}");

        let mut their_tree = tree(&theirs)?;
        // What the collector and whoever makes a first root would make; and a user's own directories.
        for name in ["gc.lock", "gcroots/profiles", "gcroots/per-user/root", "profiles/per-user/root"] {
            their_tree.remove(&format!("nix/var/nix/{name}"));
        }
        ensure!(our_tree == their_tree, "{nix:?}: {our_tree:#?} is not {their_tree:#?}");
    }
    Ok(())
}

#[test]
fn a_store_goes_from_hand_to_hand() -> Result<()> {
    let peers = Nix::ALL.into_iter().map(Peer::new).collect::<Result<Vec<_>>>()?;
    // Made by Drover, then by each version; everybody adds something each time.
    for first in [None, Some(0), Some(1), Some(2)] {
        let root = Root::new()?;
        let mut expected = BTreeSet::new();
        match first {
            None => expected.extend(drover_adds(&root, "first", &expected)?),
            Some(first) => expected.extend(nix_adds(&peers[first], &root, "first")?),
        }
        for (turn, peer) in peers.iter().enumerate() {
            expected.extend(nix_adds(peer, &root, &format!("nix-{turn}"))?);
            expected.extend(drover_adds(&root, &format!("drover-{turn}"), &expected)?);
            ensure!(root.store(Access::ReadOnly)?.all_valid_paths()? == expected, "{first:?} {turn}");
        }
        for peer in &peers {
            verify(peer, &root)?;
        }
        // The newest builds in it, the oldest collects, and nothing is left.
        build_chain(&peers[2], &root)?;
        verify(&peers[0], &root)?;
        with_nix(&peers[0], &root).run("nix-store", &["--gc"])?;
        ensure!(root.store(Access::ReadOnly)?.all_valid_paths()?.is_empty(), "{first:?}");
        no_leftovers(&root)?;
        // It is still a store.
        drover_adds(&root, "last", &BTreeSet::new())?;
        peers.iter().try_for_each(|peer| verify(peer, &root))?;
    }
    Ok(())
}

#[test]
fn a_store_with_content_addressed_derivations() -> Result<()> {
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        let root = Root::new()?;
        std::fs::create_dir(root.path().join("nix"))?;
        // One that refers to itself, and one that depends on it.
        let expression = format!(
            r#"
            let
              make = attrs: derivation ({{
                system = "x86_64-linux"; builder = "/bin/sh"; PATH = "/bin:/usr/bin"; __contentAddressed = true;
                outputHashMode = "recursive"; outputHashAlgo = "sha256"; salt = "{}";
              }} // attrs);
              first = make {{ name = "first"; args = [ "-c" "echo $out $salt > $out" ]; }};
            in make {{ name = "second"; args = [ "-c" "mkdir $out; cp ${{first}} $out/first" ]; }}
            "#,
            root.text()
        );
        let link = root.path().join("result").to_string_lossy().into_owned();
        let build = |link: &[&str]| {
            let features = ["--option", "experimental-features", "ca-derivations nix-command"];
            let inside = with_nix(&peer, &root);
            inside.run("nix-build", &[&features[..], &["-E", &expression], link].concat())
        };
        let out = build(&["-o", &link])?;
        let store = root.store(Access::ReadWrite)?;
        let out = store.store_dir().parse(out.trim().as_bytes())?;
        let made: i64 =
            database(&root)?.query_row("SELECT count(*) FROM Realisations", [], |row| row.get(0))?;
        ensure!(made >= 2, "{nix:?} keeps {made} realisations");
        ensure!(store.path_info(&out)?.context("not valid")?.ca.is_some());
        ensure!(store.verify(true)?.problems.is_empty(), "{nix:?}: {:?}", store.verify(true)?.problems);
        // What is alive stays, first because of second; the rest goes.
        let closure = store.closure(&[out.clone()].into())?;
        ensure!(closure.len() == 2, "{closure:?}");
        let options = GcOptions { keep_derivations: false, ..GcOptions::default() };
        store.collect_garbage(&options)?;
        ensure!(store.all_valid_paths()? == closure, "{nix:?}");
        verify(&peer, &root)?;
        // Nix still knows what it built: nothing is built anew.
        let times = |store: &LocalStore| -> Result<Vec<u64>> {
            closure
                .iter()
                .map(|path| Ok(store.registration(path)?.context("not valid")?.registration_time))
                .collect()
        };
        let before = (times(&store)?, std::fs::metadata(root.object(&out))?.ino());
        build(&["-o", &link])?;
        ensure!((times(&store)?, std::fs::metadata(root.object(&out))?.ino()) == before, "{nix:?}");
        // Its realisations go with their outputs.
        std::fs::remove_file(&link)?;
        store.collect_garbage(&options)?;
        ensure!(store.all_valid_paths()?.is_empty(), "{nix:?}");
        let left: i64 =
            database(&root)?.query_row("SELECT count(*) FROM Realisations", [], |row| row.get(0))?;
        ensure!(left == 0, "{nix:?} has {left} realisations of nothing");
        drop(store);
        build(&["--no-out-link"])?;
        verify(&peer, &root)?;
    }
    Ok(())
}

fn nix_adds(peer: &Peer, root: &Root, name: &str) -> Result<Option<StorePath>> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join(name);
    std::fs::write(&file, name)?;
    let added = peer.run("nix-store", &["--store", &root.text(), "--add", &file.to_string_lossy()])?;
    Ok(Some(added.trim().rsplit('/').next().context("no path")?.parse()?))
}

/// A path that refers to one that is there.
fn drover_adds(root: &Root, name: &str, present: &BTreeSet<StorePath>) -> Result<Option<StorePath>> {
    let store = root.store(Access::ReadWrite)?;
    let nar = file_nar(name.as_bytes())?;
    let info = info(name, &nar, &present.first().into_iter().collect::<Vec<_>>())?;
    store.add_nar(&info, false, 0, &mut &nar[..])?;
    Ok(Some(info.path))
}

fn database(root: &Root) -> Result<Connection> {
    Ok(Connection::open_with_flags(root.state("db/db.sqlite"), OpenFlags::SQLITE_OPEN_READ_ONLY)?)
}

/// The statements that made the tables, indices and triggers, without what SQLite does not look at.
fn schema(root: &Root) -> Result<BTreeMap<String, String>> {
    let database = database(root)?;
    let mut statement =
        database.prepare("SELECT type || ' ' || name, sql FROM sqlite_master WHERE sql IS NOT NULL")?;
    let rows = statement.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
    rows.map(|row| {
        let (name, sql) = row?;
        let code: String =
            sql.lines().map(|line| line.split("--").next().unwrap_or(line).to_lowercase() + " ").collect();
        let words = code
            .replace("if not exists", "")
            .replace('(', " ( ")
            .replace(')', " ) ")
            .replace(',', " , ")
            .replace(';', " ; ");
        Ok((name, words.split_whitespace().collect::<Vec<_>>().join(" ")))
    })
    .collect()
}

/// What the file of a database says of itself.
fn pragmas(root: &Root) -> Result<Vec<(&'static str, String)>> {
    let database = database(root)?;
    ["journal_mode", "page_size", "encoding", "auto_vacuum", "user_version", "application_id"]
        .into_iter()
        .map(|name| {
            let value = database
                .query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, rusqlite::types::Value>(0))?;
            Ok((name, format!("{value:?}")))
        })
        .collect()
}

/// Everything below the root by its name: kind and mode, owner, group, and the size where it does not depend on the moment.
fn tree(root: &Root) -> Result<BTreeMap<String, (u32, u32, u32, u64)>> {
    fn walk(base: &Path, path: &Path, tree: &mut BTreeMap<String, (u32, u32, u32, u64)>) -> Result<()> {
        for entry in std::fs::read_dir(path)? {
            let path = entry?.path();
            let meta = std::fs::symlink_metadata(&path)?;
            let name = path.strip_prefix(base)?.to_string_lossy().into_owned();
            if meta.is_dir() {
                walk(base, &path, tree)?;
            }
            // Its log and the log's index come and go.
            if !name.ends_with("-wal") && !name.ends_with("-shm") {
                let size = if meta.is_file() && !name.ends_with("db.sqlite") { meta.len() } else { 0 };
                tree.insert(name, (meta.mode(), meta.uid(), meta.gid(), size));
            }
        }
        Ok(())
    }
    let mut found = BTreeMap::new();
    walk(root.path(), root.path(), &mut found)?;
    Ok(found)
}
