//! The same archives, imported by real Nix and by Drover, become the same files with the same metadata and the same rows;
//! and files that an optimised store shares stay what they are.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use drover_nix::{ContentAddress, Method, PathInfo, Sha256, StoreDir, nar};
use drover_store::{Access, GcOptions};
use drover_tests::{Nix, Peer, copy_program, program};
use rusqlite::Connection;
use rusqlite::types::Value;

use crate::store_parts::{Root, Session, file_nar, findings_of_nix, info, verify};

/// `nobody`, whom every Debian knows: Nix 2.8 wants its user to have a name.
const SOMEBODY: u32 = 65534;

#[test]
fn the_same_archives_become_the_same_files() -> Result<()> {
    let objects = objects()?;
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        let (ours, theirs) = (Root::new()?, Root::new()?);
        import(ours.drover_session()?, &objects)?;
        import(theirs.nix_session(&peer)?, &objects)?;
        ensure_equal(&ours, &theirs, &format!("{nix:?}"))?;
        verify(&peer, &ours)?;
    }
    Ok(())
}

#[test]
fn and_so_they_do_for_an_ordinary_user() -> Result<()> {
    let objects = objects()?;
    // A copy, where anybody may look.
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let builder = dir.path().join("drover-builder");
    copy_program(&program("drover-builder")?, &builder)?;
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        let (ours, theirs) = (Root::new()?, Root::new()?);
        for root in [&ours, &theirs] {
            std::os::unix::fs::chown(root.path(), Some(SOMEBODY), Some(SOMEBODY))?;
        }
        let user = format!("--userspec={SOMEBODY}:{SOMEBODY}");
        let mut command = Command::new("/usr/sbin/chroot");
        command.args([&user, "--groups=", "/"]).arg(&builder).args([
            "serve",
            "--write",
            "--store",
            &ours.text(),
        ]);
        import(Session::start(command)?, &objects)?;
        let mut command = peer.command("/usr/sbin/chroot")?;
        command.args([&user, "--groups=", "/", "nix-store", "--serve", "--write", "--store", &theirs.text()]);
        // Its own home does not exist.
        command.env("HOME", theirs.path());
        import(Session::start(command)?, &objects)?;
        ensure_equal(&ours, &theirs, &format!("{nix:?}"))?;
        let owners: BTreeSet<u32> = files(&ours)?.values().map(|file| file.uid).collect();
        ensure!(owners == [SOMEBODY].into(), "{nix:?}: {owners:?}");
    }
    Ok(())
}

#[test]
fn a_store_whose_files_are_shared() -> Result<()> {
    // Twice the same large file, in different company; an executable with the same bytes is another file.
    let large = vec![b'x'; 100_000];
    let make = |name: &str, executable: bool| -> Result<(PathInfo, Vec<u8>)> {
        let mut writer = nar::Writer::new(Vec::new());
        writer.directory()?;
        for (entry, content) in [("large", &large[..]), ("own", name.as_bytes()), ("zeros", &[0; 50_000][..])]
        {
            writer.entry(entry.as_bytes())?;
            writer.file_bytes(executable, content)?;
        }
        writer.end_directory()?;
        let nar = writer.finish()?;
        Ok((info(name, &nar, &[])?, nar))
    };
    let objects = [make("one", false)?, make("two", false)?, make("three", true)?];
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        for at_once in [true, false] {
            let (ours, theirs) = (Root::new()?, Root::new()?);
            for root in [&ours, &theirs] {
                let mut command = peer.command("nix-store")?;
                command.args(["--serve", "--write", "--store", &root.text()]);
                command.env("NIX_CONFIG", format!("auto-optimise-store = {at_once}"));
                import(Session::start(command)?, &objects)?;
                if !at_once {
                    peer.run("nix-store", &["--optimise", "--store", &root.text()])?;
                }
                let file = std::fs::metadata(root.object(&objects[0].0.path).join("large"))?;
                ensure!(file.nlink() == 3, "{nix:?} shares {} names", file.nlink());
            }
            // It reads what is shared.
            let store = ours.store(Access::ReadWrite)?;
            ensure!(store.verify(true)?.problems.is_empty());
            for (info, nar) in &objects {
                let mut dumped = Vec::new();
                store.dump(&info.path, &mut dumped)?;
                ensure!(dumped == *nar);
            }
            // One of them goes, with what only it has. The others stay as they are.
            for root in [&ours, &theirs] {
                let kept = [&objects[1].0, &objects[2].0];
                for (i, info) in kept.iter().enumerate() {
                    let link = root.state(&format!("gcroots/kept{i}"));
                    std::os::unix::fs::symlink(store.store_dir().full(&info.path), link)?;
                }
            }
            let report = store.collect_garbage(&GcOptions::default())?;
            peer.run("nix-store", &["--gc", "--store", &theirs.text()])?;
            ensure!(report.paths == [objects[0].0.path.clone()], "{:?}", report.paths);
            // The file with its name in it and a directory, whatever blocks these take: not what is still shared.
            ensure!((1..50_000).contains(&report.bytes_freed), "{} bytes freed", report.bytes_freed);
            ensure!(files(&ours)? == files(&theirs)?, "{nix:?}: {:#?}", files(&ours)?);
            verify(&peer, &ours)?;
            // Whoever writes into a shared file spoils the pool: both say so, of the same.
            let spoilt = ours.object(&objects[1].0.path).join("large");
            let pool = pool_name(&ours, &spoilt)?;
            spoil(&spoilt)?;
            let theirs = findings_of_nix(&peer, &ours)?.join("\n");
            let found = store.verify(true)?.problems.join("\n");
            for text in [&theirs, &found] {
                ensure!(text.contains(&pool) && text.contains(objects[1].0.path.as_str()), "{nix:?}: {text}");
            }
            // Repairing takes it out of the pool, the object stays wrong.
            let report = store.repair(true)?;
            ensure!((report.repaired.len(), report.problems.len()) == (1, 1), "{report:?}");
            ensure!(!findings_of_nix(&peer, &ours)?.join("\n").contains(&pool));
            // All of it goes.
            for i in 0..2 {
                std::fs::remove_file(ours.state(&format!("gcroots/kept{i}")))?;
            }
            let report = store.collect_garbage(&GcOptions::default())?;
            ensure!(report.bytes_freed > 200_000 && report.alive == 0, "{report:?}");
            ensure!(files(&ours)?.is_empty(), "{:?}", files(&ours)?);
            verify(&peer, &ours)?;
        }
    }
    Ok(())
}

fn import(mut session: Session, objects: &[(PathInfo, Vec<u8>)]) -> Result<()> {
    for (info, nar) in objects {
        session.client.send_nar(info, &mut &nar[..])?;
    }
    session.client.finish_nars()?;
    session.end()
}

fn ensure_equal(ours: &Root, theirs: &Root, what: &str) -> Result<()> {
    let (our_files, their_files) = (files(ours)?, files(theirs)?);
    for (name, theirs) in &their_files {
        ensure!(
            our_files.get(name) == Some(theirs),
            "{what}: {name:?}: {:?} is not {theirs:?}",
            our_files.get(name)
        );
    }
    ensure!(
        our_files.len() == their_files.len(),
        "{what}: {} files, not {}",
        our_files.len(),
        their_files.len()
    );
    for query in [
        "SELECT path, hash, deriver, narSize, ultimate, sigs, ca FROM ValidPaths ORDER BY path",
        "SELECT a.path, b.path FROM Refs, ValidPaths a, ValidPaths b WHERE a.id = referrer AND b.id = reference
         ORDER BY a.path, b.path",
        "SELECT path, DerivationOutputs.id FROM DerivationOutputs ORDER BY path",
    ] {
        let (ours, theirs) = (rows(ours, query)?, rows(theirs, query)?);
        for (ours, theirs) in ours.iter().zip(&theirs) {
            ensure!(ours == theirs, "{what}: {ours:?} is not {theirs:?}");
        }
        ensure!(ours.len() == theirs.len(), "{what}: {} rows, not {}", ours.len(), theirs.len());
    }
    Ok(())
}

#[derive(PartialEq, Debug)]
struct File {
    mode: u32,
    mtime: (i64, i64),
    uid: u32,
    gid: u32,
    nlink: u64,
    size: u64,
    target: Option<std::path::PathBuf>,
}

/// Everything in the store directory, the pool of shared files included; but the store's own directories.
fn files(root: &Root) -> Result<BTreeMap<OsString, File>> {
    fn walk(base: &Path, path: &Path, files: &mut BTreeMap<OsString, File>) -> Result<()> {
        for entry in std::fs::read_dir(path)? {
            let path = entry?.path();
            let meta = std::fs::symlink_metadata(&path)?;
            let name = path.strip_prefix(base)?.to_owned();
            if meta.is_dir() {
                walk(base, &path, files)?;
            }
            if name.as_os_str() == ".links" {
                continue;
            }
            let file = File {
                mode: meta.mode(),
                mtime: (meta.mtime(), meta.mtime_nsec()),
                uid: meta.uid(),
                gid: meta.gid(),
                nlink: meta.nlink(),
                // A directory's depends on the order in which it was filled.
                size: if meta.is_dir() { 0 } else { meta.size() },
                target: meta.is_symlink().then(|| std::fs::read_link(&path)).transpose()?,
            };
            files.insert(name.into_os_string(), file);
        }
        Ok(())
    }
    let store = root.path().join("nix/store");
    let mut found = BTreeMap::new();
    walk(&store, &store, &mut found)?;
    Ok(found)
}

fn rows(root: &Root, query: &str) -> Result<Vec<Vec<Value>>> {
    let database = Connection::open(root.state("db/db.sqlite"))?;
    let mut statement = database.prepare(query)?;
    let columns = statement.column_count();
    let rows = statement.query_map([], |row| (0..columns).map(|i| row.get(i)).collect())?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Archives of every kind, each behind what it refers to.
fn objects() -> Result<Vec<(PathInfo, Vec<u8>)>> {
    let mut objects: Vec<(PathInfo, Vec<u8>)> = Vec::new();
    let mut add =
        |name: &str, references: &[usize], fill: &dyn Fn(&mut nar::Writer<Vec<u8>>) -> Result<()>| {
            let mut writer = nar::Writer::new(Vec::new());
            fill(&mut writer)?;
            let nar = writer.finish()?;
            let references: Vec<_> = references.iter().map(|i| objects[*i].0.path.clone()).collect();
            let info = info(name, &nar, &references.iter().collect::<Vec<_>>())?;
            objects.push((info, nar));
            anyhow::Ok(())
        };
    add("plain", &[], &|w| Ok(w.file_bytes(false, b"text")?))?;
    add("executable", &[0], &|w| Ok(w.file_bytes(true, b"#!/bin/sh\n")?))?;
    add("empty-file", &[], &|w| Ok(w.file_bytes(false, b"")?))?;
    add("link", &[0, 1], &|w| Ok(w.symlink(b"/no/where")?))?;
    add("long-link", &[], &|w| Ok(w.symlink(&[b'x'; 4000])?))?;
    add("empty-directory", &[], &|w| {
        w.directory()?;
        Ok(w.end_directory()?)
    })?;
    add("big", &[2], &|w| Ok(w.file_bytes(false, &[7; 5_000_001])?))?;
    add("deep", &[], &|w| {
        for _ in 0..50 {
            w.directory()?;
            w.entry(b"d")?;
        }
        w.file_bytes(true, b"bottom")?;
        (0..50).try_for_each(|_| Ok(w.end_directory()?))
    })?;
    add("many", &[3, 5], &|w| {
        w.directory()?;
        for i in 0..600 {
            w.entry(format!("{i:04}").as_bytes())?;
            match i % 4 {
                0 => w.file_bytes(false, &vec![b'a'; i * 50])?,
                1 => w.file_bytes(true, &vec![b'b'; i])?,
                2 => w.symlink(b"0000")?,
                _ => {
                    w.directory()?;
                    w.end_directory()?;
                }
            }
        }
        Ok(w.end_directory()?)
    })?;
    add("odd-names", &[], &|w| {
        w.directory()?;
        let long = OsString::from_vec(vec![b'n'; 255]);
        let odd: [&[u8]; 11] =
            [b" ", b"\n", b"\xff\xfe", b"...", b".x", b"-rf", b"*", b"A", b"a", b"\xc3\xa9", b"x.lock"];
        let names: BTreeSet<&[u8]> = odd.into_iter().chain([long.as_encoded_bytes()]).collect();
        for name in names {
            w.entry(name)?;
            w.file_bytes(false, name)?;
        }
        Ok(w.end_directory()?)
    })?;
    // Everything that a row can say.
    let nar = file_nar(b"of itself")?;
    let mut full = info("full", &nar, &[&objects[0].0.path])?;
    full.references.insert(full.path.clone());
    full.deriver = Some(info("full.drv", b"", &[])?.path);
    for key in ["cache-1", "another.org-2"] {
        let text = format!("{key}:{}==", "A".repeat(86));
        full.signatures.push(text.parse()?);
    }
    objects.push((full, nar));
    let nar = file_nar(b"by content")?;
    for (method, hash) in [(Method::Nar, Sha256::of(&nar)), (Method::Flat, Sha256::of(b"by content"))] {
        let ca = ContentAddress { method, hash: hash.into() };
        let mut addressed = info("addressed", &nar, &[])?;
        addressed.path = ca.store_path(&StoreDir::default(), "addressed", &BTreeSet::new(), false)?;
        addressed.ca = Some(ca);
        objects.push((addressed, nar.clone()));
    }
    Ok(objects)
}

/// The name in the pool of the file, by its inode.
fn pool_name(root: &Root, file: &Path) -> Result<String> {
    let inode = std::fs::metadata(file)?.ino();
    for entry in std::fs::read_dir(root.path().join("nix/store/.links"))? {
        let entry = entry?;
        if entry.metadata()?.ino() == inode {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    None.context("the file is not in the pool")
}

/// One byte of the file becomes another.
fn spoil(file: &Path) -> Result<()> {
    use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
    let mode = std::fs::metadata(file)?.permissions();
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o644))?;
    std::fs::File::options().write(true).open(file)?.write_at(b"X", 10)?;
    Ok(std::fs::set_permissions(file, mode)?)
}
