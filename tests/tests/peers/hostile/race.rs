//! The race of Nix issue 141: a collector between a client's question and its use of what it heard. Both spellings of
//! the lock close it: `lock` in QueryValidPaths, and the root that AddToStoreNar takes on what it adds. And the tests
//! could see a loss: without a lock there is one.

use std::collections::BTreeSet;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use drover_nix::{PathInfo, Sha256, StoreDir, StorePath};
use drover_serve::{Client, Error};
use drover_store::GcOptions;
use drover_tests::{Nix, Peer, program};
use xtask::run;

use super::arena::Arena;
use super::bytes::{file_nar, path};

/// Who collects.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Collector {
    Drover,
    Nix(Nix),
}

impl Collector {
    const ALL: [Self; 4] = [Self::Drover, Self::Nix(Nix::V2_8), Self::Nix(Nix::V2_26), Self::Nix(Nix::V2_34)];

    /// A whole collection, by a program of its own.
    fn collect(self, arena: &Arena) -> Result<()> {
        let root = arena.root();
        let root = root.to_str().context("temporary directories are UTF-8")?;
        match self {
            Self::Drover => {
                let mut gc = Command::new(program("drover-builder")?);
                run::stdout(gc.args(["gc", "--store", root])).map(drop)
            }
            Self::Nix(nix) => Peer::new(nix)?.run("nix-store", &["--store", root, "--gc"]).map(drop),
        }
    }
}

/// A session with a builder process.
struct Session {
    client: Client<ChildStdout, ChildStdin>,
    child: Child,
}

impl Session {
    fn start(arena: &Arena) -> Result<Self> {
        let mut command = arena.command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let (output, input) = (child.stdout.take(), child.stdin.take());
        let (output, input) = (output.context("no stdout")?, input.context("no stdin")?);
        Ok(Self { client: Client::connect(output, input, StoreDir::default())?, child })
    }

    fn end(self) -> Result<()> {
        let Self { client, mut child } = self;
        drop(client);
        let status = child.wait()?;
        ensure!(status.success(), "the builder ended with {status}");
        Ok(())
    }

    /// After a loss. The builder has said what it was.
    fn abandon(self) -> Result<()> {
        let Self { client, child } = self;
        drop(client);
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && said.contains("not valid"), "not lost, but broken: {said}");
        Ok(())
    }
}

fn object(number: u64, references: &[&StorePath]) -> (PathInfo, Vec<u8>) {
    let nar = file_nar(format!("object {number}").as_bytes());
    let info = PathInfo {
        path: path(&format!("object-{number}")),
        nar_hash: Sha256::of(&nar),
        nar_size: nar.len() as u64,
        references: references.iter().copied().cloned().collect(),
        deriver: None,
        signatures: Vec::new(),
        ca: None,
    };
    (info, nar)
}

/// How a client comes to believe that it has a path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Spelling {
    /// It was there, and QueryValidPaths locked it.
    Locked,
    /// QueryValidPaths did not lock it and it was not there; AddToStoreNar brought it.
    Added,
    /// As before, but somebody else had brought it in between: AddToStoreNar skipped it.
    AddedAgain,
    /// The mutant: it was there, and QueryValidPaths did not lock it.
    NotLocked,
}

/// One round, with the collector exactly between question and use. Whether the path is still there.
fn round(arena: &Arena, collector: Collector, spelling: Spelling, number: u64) -> Result<bool> {
    let (info, nar) = object(number, &[]);
    let asked = BTreeSet::from([info.path.clone()]);
    // Nobody wants it: whatever protects it, the session does.
    let (garbage, _) = object(number + 1_000_000, &[]);
    bring(arena, &[number + 1_000_000])?;
    if matches!(spelling, Spelling::Locked | Spelling::NotLocked) {
        bring(arena, &[number])?;
    }
    let mut session = Session::start(arena)?;
    let lock = spelling == Spelling::Locked;
    let there = session.client.query_valid_paths(&asked, lock, false)?.contains(&info.path);
    match spelling {
        Spelling::Locked | Spelling::NotLocked => ensure!(there, "{spelling:?}: it was brought"),
        Spelling::Added | Spelling::AddedAgain => {
            ensure!(!there, "{spelling:?}: nobody brought it");
            if spelling == Spelling::AddedAgain {
                bring(arena, &[number])?;
            }
            session.client.add_to_store_nar(&info, &mut nar.as_slice())?;
        }
    }
    collector.collect(arena)?;
    ensure!(!arena.store.is_valid(&garbage.path)?, "{collector:?} collects nothing");
    let mut received = Vec::new();
    let kept = match session.client.dump_store_path(&info.path, &mut received) {
        Ok(_) => received == nar,
        Err(error) if error.is_disconnect() => false,
        Err(error) => bail!("{error}"),
    };
    if kept {
        session.end()?
    } else {
        session.abandon()?
    };
    Ok(kept)
}

/// Adds objects that nothing protects, by a session that is over.
fn bring(arena: &Arena, numbers: &[u64]) -> Result<()> {
    let mut session = Session::start(arena)?;
    for number in numbers {
        let (info, nar) = object(*number, &[]);
        session.client.send_nar(&info, &mut nar.as_slice())?;
    }
    session.client.finish_nars()?;
    session.end()
}

#[test]
fn a_collector_between_question_and_use() -> Result<()> {
    for collector in Collector::ALL {
        let arena = Arena::new()?;
        let rounds = if collector == Collector::Drover { 40 } else { 4 };
        for number in 0..rounds {
            for (at, spelling) in (0..).zip([Spelling::Locked, Spelling::Added, Spelling::AddedAgain]) {
                let kept = round(&arena, collector, spelling, 10 * number + at)?;
                ensure!(kept, "{collector:?}, {spelling:?}: lost in round {number}");
            }
            // The session is over, so its locks are: what it had goes with the next collection.
            collector.collect(&arena)?;
            ensure!(arena.store.all_valid_paths()?.is_empty(), "{collector:?}: something stays for ever");
        }
        arena.check_clean()?;
        arena.verify()?;
    }
    Ok(())
}

#[test]
fn without_the_lock_it_is_lost() -> Result<()> {
    for collector in Collector::ALL {
        let arena = Arena::new()?;
        for number in 0..3 {
            let kept = round(&arena, collector, Spelling::NotLocked, number)?;
            ensure!(!kept, "{collector:?} left what nothing protects: these tests could not see a loss");
        }
        arena.check_clean()?;
    }
    Ok(())
}

/// Chains of objects that clients fight a collector for. A round needs one chain, whole.
const CHAINS: u64 = 32;
/// Objects of a chain, each of which refers to the one before it.
const LENGTH: u64 = 6;
/// After so many rounds a client ends its session, and its locks with it.
const ROUNDS_A_SESSION: u64 = 8;

/// What free-running clients met.
#[derive(Default)]
struct Seen {
    rounds: AtomicU64,
    /// Paths that were there when they were asked for.
    found: AtomicU64,
    added: AtomicU64,
    lost: AtomicU64,
    collections: AtomicU64,
}

/// Clients against a collector, none of which waits for another: until `enough`, or until something is lost.
fn stress(
    arena: &Arena,
    collector: Collector,
    lock: bool,
    enough: impl Fn(&Seen) -> bool + Sync,
) -> Result<Seen> {
    const CLIENTS: u64 = 2;
    /// Several times what it takes on a busy machine.
    const LIMIT: Duration = Duration::from_secs(300);
    let (seen, over, start) = (Seen::default(), AtomicBool::new(false), Instant::now());
    std::thread::scope(|scope| -> Result<()> {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (seen, over, enough) = (&seen, &over, &enough);
                scope.spawn(move || {
                    let result = fight(arena, lock, client, seen, || {
                        over.load(Ordering::Relaxed) || enough(seen) || start.elapsed() > LIMIT
                    });
                    over.store(true, Ordering::Relaxed);
                    result
                })
            })
            .collect();
        let result = (|| {
            while !over.load(Ordering::Relaxed) {
                match collector {
                    // The same as the program does, without the start of a program between two collections.
                    Collector::Drover => arena.store.collect_garbage(&GcOptions::default()).map(drop)?,
                    Collector::Nix(_) => collector.collect(arena)?,
                }
                seen.collections.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })();
        over.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().expect("it does not panic")?;
        }
        result
    })?;
    ensure!(start.elapsed() <= LIMIT, "after {LIMIT:?} it is not done: {} rounds", seen.rounds.into_inner());
    Ok(seen)
}

/// Rounds of one client: asks for some objects, brings what is missing, and then needs all of them.
fn fight(arena: &Arena, lock: bool, client: u64, seen: &Seen, over: impl Fn() -> bool) -> Result<()> {
    let mut random = 0x9e37_79b9_7f4a_7c15 ^ (client + 1);
    while !over() {
        let mut session = Session::start(arena)?;
        for _ in 0..ROUNDS_A_SESSION {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            match fight_round(&mut session, lock, (random >> 33) % CHAINS, seen) {
                Ok(()) => {
                    seen.rounds.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) if error.is_disconnect() => {
                    seen.lost.fetch_add(1, Ordering::Relaxed);
                    return session.abandon();
                }
                Err(error) => return Err(error.into()),
            }
        }
        session.end()?;
    }
    Ok(())
}

fn fight_round(session: &mut Session, lock: bool, chain: u64, seen: &Seen) -> Result<(), Error> {
    let mut objects: Vec<(PathInfo, Vec<u8>)> = Vec::new();
    for number in chain * LENGTH..(chain + 1) * LENGTH {
        let previous = objects.last().map(|(info, _)| info.path.clone());
        objects.push(object(number, &previous.iter().collect::<Vec<_>>()));
    }
    let asked = objects.iter().map(|(info, _)| info.path.clone()).collect();
    let there = session.client.query_valid_paths(&asked, lock, false)?;
    seen.found.fetch_add(there.len() as u64, Ordering::Relaxed);
    for (info, nar) in objects.iter().filter(|(info, _)| !there.contains(&info.path)) {
        session.client.send_nar(info, &mut nar.as_slice())?;
        seen.added.fetch_add(1, Ordering::Relaxed);
    }
    session.client.finish_nars()?;
    for (info, nar) in &objects {
        let mut received = Vec::new();
        session.client.dump_store_path(&info.path, &mut received)?;
        assert_eq!(&received, nar, "{}", info.path);
    }
    Ok(())
}

#[test]
fn thousands_of_rounds_against_a_collector() -> Result<()> {
    let arena = Arena::new()?;
    let seen = stress(&arena, Collector::Drover, true, |seen| {
        let met = |count: &AtomicU64, enough| count.load(Ordering::Relaxed) >= enough;
        met(&seen.lost, 1) || met(&seen.rounds, 2000) && met(&seen.collections, 300)
    })?;
    ensure!(seen.lost.into_inner() == 0, "lost after {:?} rounds", seen.rounds);
    // It was a fight: what clients found was often there, and often had been collected again.
    let (found, added) = (seen.found.into_inner(), seen.added.into_inner());
    ensure!(found > 500 && added > 500, "{found} found, {added} added");
    arena.store.collect_garbage(&GcOptions::default())?;
    ensure!(arena.check_clean()?.is_empty(), "something stays for ever");
    arena.verify()
}

#[test]
fn rounds_against_the_collector_of_real_nix() -> Result<()> {
    let arena = Arena::new()?;
    let seen = stress(&arena, Collector::Nix(Nix::V2_34), true, |seen| {
        let met = |count: &AtomicU64, enough| count.load(Ordering::Relaxed) >= enough;
        met(&seen.lost, 1) || met(&seen.rounds, 1000) && met(&seen.collections, 20)
    })?;
    ensure!(seen.lost.into_inner() == 0, "lost after {:?} rounds", seen.rounds);
    ensure!(seen.found.into_inner() > 500 && seen.added.into_inner() > 100);
    arena.store.collect_garbage(&GcOptions::default())?;
    ensure!(arena.check_clean()?.is_empty(), "something stays for ever");
    arena.verify()
}

#[test]
fn without_the_lock_rounds_lose() -> Result<()> {
    let arena = Arena::new()?;
    let lost = |seen: &Seen| seen.lost.load(Ordering::Relaxed) > 0;
    let seen = stress(&arena, Collector::Drover, false, lost)?;
    ensure!(seen.lost.into_inner() > 0, "the fight without locks was won: it shows nothing with them");
    arena.store.collect_garbage(&GcOptions::default())?;
    arena.check_clean()?;
    arena.verify()
}
