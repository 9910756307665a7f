//! A collector at work and a session that protects paths meanwhile, the one Nix's and the other Drover's, each way round.
//! The collector is held in the middle of deleting, where it can neither answer nor go on; then it goes on, or is killed.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Result, ensure};
use drover_nix::{Sha256, StorePath, nar};
use drover_store::{Access, LocalStore};
use drover_tests::{Nix, Peer};

use crate::store_parts::{Root, Running, Session, file_nar, info, no_leftovers, verify, wait_until};

/// Files of the object that takes a collector long enough to be caught at it.
const FILES: usize = 10_000;
/// Small objects around it.
const SMALL: usize = 30;
/// How often a collector may get away before it is caught.
const ATTEMPTS: usize = 10;
/// How long a session that ought to wait is watched waiting.
const A_WHILE: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, PartialEq, Debug)]
enum Whose {
    Nix,
    Drover,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Fate {
    GoesOn,
    IsKilled,
}

#[test]
fn a_session_waits_for_a_collector_that_is_held() -> Result<()> {
    every_pair(Fate::GoesOn)
}

#[test]
fn a_session_goes_on_when_the_collector_is_killed() -> Result<()> {
    every_pair(Fate::IsKilled)
}

fn every_pair(fate: Fate) -> Result<()> {
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        let mut pairs = vec![(Whose::Nix, Whose::Drover), (Whose::Drover, Whose::Nix)];
        // With this one, the version only verifies.
        pairs.extend((nix == Nix::V2_34).then_some((Whose::Drover, Whose::Drover)));
        for (collector, session) in pairs {
            let what = format!("{nix:?}: {collector:?}'s collector, {session:?}'s session");
            catch(&peer, collector, session, fate).map_err(|error| error.context(what))?;
        }
    }
    Ok(())
}

fn catch(peer: &Peer, collector: Whose, session: Whose, fate: Fate) -> Result<()> {
    for _ in 0..ATTEMPTS {
        if attempt(peer, collector, session, fate)? {
            return Ok(());
        }
    }
    anyhow::bail!("the collector was never caught at work")
}

/// False if the collector was too fast.
fn attempt(peer: &Peer, collector: Whose, session: Whose, fate: Fate) -> Result<bool> {
    let root = Root::in_memory()?;
    let (large, small) = fill(&root)?;
    // Connected before there is a collector, and its file of temporary roots made.
    let mut session = start(peer, &root, session)?;
    session.client.query_valid_paths(&[info("before", b"", &[])?.path].into(), true, false)?;

    let store = root.store(Access::ReadWrite)?;
    let mut running = Running::start(collect(peer, &root, collector)?)?;
    wait_until("the large path is being deleted", || Ok(running.has_ended()? || !store.is_valid(&large)?))?;
    if !running.hold()? || !root.object(&large).exists() {
        return Ok(false);
    }
    ensure!(store.is_being_collected()?, "a held collector has its lock");
    let asked: BTreeSet<StorePath> = small.iter().chain([&large]).cloned().collect();
    let (send, receive) = mpsc::channel();
    let answer = std::thread::scope(|scope| -> Result<BTreeSet<StorePath>> {
        let asker = scope.spawn(|| {
            let answer = session.client.query_valid_paths(&asked, true, false);
            let _ = send.send(());
            answer
        });
        let early = receive.recv_timeout(A_WHILE).is_ok();
        match fate {
            Fate::GoesOn => running.go_on()?,
            Fate::IsKilled => running.kill()?,
        }
        let answer = asker.join().map_err(|_| anyhow::anyhow!("the asker panicked"))??;
        ensure!(!early, "an answer came while the collector could not know");
        Ok(answer)
    })?;
    ensure!(!answer.contains(&large), "what is being deleted cannot be valid");
    if fate == Fate::GoesOn {
        running.end()?;
        ensure!(!root.object(&large).exists());
    }
    // What the session was told is there stays, for the collectors that come; and everything else goes.
    for collector in [Whose::Nix, Whose::Drover] {
        Running::start(collect(peer, &root, collector)?)?.end()?;
        ensure!(store.all_valid_paths()? == answer, "{:?} is not {answer:?}", store.all_valid_paths()?);
        // What a killed collector left of the large one is protected as well, while the session lasts.
        for path in asked.iter().filter(|path| fate == Fate::GoesOn || **path != large) {
            ensure!(root.object(path).exists() == answer.contains(path), "{path}");
        }
    }
    for path in &answer {
        let info = store.path_info(path)?.map(|info| info.nar_hash);
        let mut nar = Vec::new();
        session.client.dump_store_path(path, &mut nar)?;
        ensure!(info == Some(Sha256::of(&nar)), "{path}");
    }
    drop(store);
    session.end()?;
    verify(peer, &root)?;
    Running::start(collect(peer, &root, collector)?)?.end()?;
    ensure!(root.store(Access::ReadOnly)?.all_valid_paths()?.is_empty());
    no_leftovers(&root)?;
    // The collector may have met all of the others before the large one; then nothing was seen to stay.
    Ok(!answer.is_empty())
}

fn start(peer: &Peer, root: &Root, whose: Whose) -> Result<Session> {
    match whose {
        Whose::Nix => root.nix_session(peer),
        Whose::Drover => root.drover_session(),
    }
}

fn collect(peer: &Peer, root: &Root, whose: Whose) -> Result<Command> {
    match whose {
        Whose::Drover => root.builder(&["gc"]),
        Whose::Nix => {
            let mut command = peer.command("nix-store")?;
            command.args(["--gc", "--store", &root.text()]);
            Ok(command)
        }
    }
}

/// One large path and small ones.
fn fill(root: &Root) -> Result<(StorePath, Vec<StorePath>)> {
    let store = root.store(Access::ReadWrite)?;
    let add = |store: &LocalStore, name: &str, nar: Vec<u8>| -> Result<StorePath> {
        let info = info(name, &nar, &[])?;
        store.add_nar(&info, false, 0, &mut &nar[..])?;
        Ok(info.path)
    };
    let mut writer = nar::Writer::new(Vec::new());
    writer.directory()?;
    for i in 0..FILES {
        writer.entry(format!("{i:05}").as_bytes())?;
        writer.file_bytes(false, b"")?;
    }
    writer.end_directory()?;
    let large = writer.finish()?;
    // A collector takes them as the file system lists them, some the first and some the last first. These names are of this
    // test alone: what another test's processes have in their environment is a root.
    let salt = root.text().replace('/', "-");
    let small = |i: usize| add(&store, &format!("small-{i}"), file_nar(format!("{i}{salt}").as_bytes())?);
    let mut paths = (0..SMALL / 2).map(small).collect::<Result<Vec<_>>>()?;
    let large = add(&store, &format!("large{salt}"), large)?;
    for i in SMALL / 2..SMALL {
        paths.push(small(i)?);
    }
    Ok((large, paths))
}
