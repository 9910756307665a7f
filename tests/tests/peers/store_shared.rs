//! Real Nix and Drover at work on one store at the same time: importing the same paths, killed in the middle, and all
//! that either can do at once.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use drover_nix::derivation::modulo;
use drover_nix::{
    BasicDerivation, Derivation, DerivationOutput, OutputName, PathInfo, Sha256, StoreDir, StorePath, nar,
};
use drover_serve::{BuildOptions, BuildStatus};
use drover_store::{Access, LocalStore, PathLock, Wait};
use drover_tests::{Nix, Peer, program};

use crate::store_parts::{
    Root, Running, Session, file_nar, info, no_leftovers, verify, wait_until, with_nix,
};

/// How long one who ought to wait is watched waiting.
const A_WHILE: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, PartialEq, Debug)]
enum Whose {
    Nix,
    Drover,
}

#[test]
fn two_import_the_same_path() -> Result<()> {
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        for (first, second) in [(Whose::Nix, Whose::Drover), (Whose::Drover, Whose::Nix)] {
            for dies in [false, true] {
                let what = format!("{nix:?}: {first:?} first, which dies: {dies}");
                contend(&peer, first, second, dies).map_err(|error| error.context(what))?;
            }
        }
    }
    Ok(())
}

/// The first has half of the path when the second begins.
fn contend(peer: &Peer, first: Whose, second: Whose, dies: bool) -> Result<()> {
    let root = Root::in_memory()?;
    let store = root.store(Access::ReadWrite)?;
    let nar = file_nar(&vec![b'x'; 2 << 20])?;
    let info = info("contended", &nar, &[])?;
    let mut first = start(peer, &root, first)?;
    let mut second = start(peer, &root, second)?;
    let (go_on, gate) = mpsc::channel();
    let mut halting = Halting { rest: &nar, left: nar.len() / 2, gate };
    thread::scope(|scope| -> Result<()> {
        let client = &mut first.client;
        let importing = scope.spawn(|| client.add_to_store_nar(&info, &mut halting));
        let is_locked = || {
            let lock = PathLock::acquire(&store, [&info.path], Wait::Try)?;
            Ok(lock.map(PathLock::release_deleting).is_none())
        };
        wait_until("the first has the lock", is_locked)?;
        let (send, receive) = mpsc::channel();
        let (client, info, nar) = (&mut second.client, &info, &nar);
        let waiting = scope.spawn(move || {
            let result = client.add_to_store_nar(info, &mut &nar[..]);
            let _ = send.send(());
            result
        });
        let early = receive.recv_timeout(A_WHILE).is_ok();
        if dies {
            first.child.kill()?;
        } else {
            go_on.send(())?;
        }
        drop(go_on);
        let first = importing.join().map_err(|_| anyhow!("the first panicked"))?;
        waiting.join().map_err(|_| anyhow!("the second panicked"))??;
        ensure!(!early, "the second did not wait");
        ensure!(first.is_err() == dies, "{first:?}");
        Ok(())
    })?;
    let mut dumped = Vec::new();
    second.client.dump_store_path(&info.path, &mut dumped)?;
    ensure!(dumped == nar);
    if dies {
        first.kill()?
    } else {
        first.end()?
    }
    second.end()?;
    verify(peer, &root)?;
    // Killed, it could not take its roots away; a collector does.
    collect_all(peer, &root)
}

/// An archive of which it is known how much was read.
struct Counted<'a> {
    rest: &'a [u8],
    sent: &'a AtomicU32,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(4096);
        let count = self.rest.read(&mut buffer[..most])?;
        self.sent.fetch_add(u32::try_from(count).unwrap_or(u32::MAX), Ordering::Relaxed);
        Ok(count)
    }
}

/// An archive whose second half has to wait.
struct Halting<'a> {
    rest: &'a [u8],
    left: usize,
    gate: Receiver<()>,
}

impl Read for Halting<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            // Nobody says anything any more if the importer was killed.
            let _ = self.gate.recv();
            self.left = self.rest.len();
        }
        let count = self.rest.read(&mut buffer[..self.left.min(4096)])?;
        self.left -= count;
        Ok(count)
    }
}

#[test]
fn whoever_is_killed_the_other_goes_on() -> Result<()> {
    for nix in Nix::ALL {
        let peer = Peer::new(nix)?;
        for (victim, other) in [(Whose::Nix, Whose::Drover), (Whose::Drover, Whose::Nix)] {
            let what = format!("{nix:?}: {victim:?} is killed");
            kill_at_random(&peer, victim, other).map_err(|error| error.context(what))?;
        }
    }
    Ok(())
}

fn kill_at_random(peer: &Peer, victim: Whose, other: Whose) -> Result<()> {
    const ROUNDS: u32 = 12;
    let root = Root::in_memory()?;
    let mut caught = 0;
    for round in 0..ROUNDS {
        let objects = objects(&root, round)?;
        let mut session = start(peer, &root, victim)?;
        // The points to kill it at are spread over all that it is sent.
        let whole: u32 = objects.iter().map(|(info, _)| info.nar_size as u32).sum();
        let (sent, target) = (AtomicU32::new(0), whole / ROUNDS * round);
        let cut = thread::scope(|scope| {
            let (client, sent) = (&mut session.client, &sent);
            let sending = scope.spawn(|| {
                let mut send = |(info, nar): &(PathInfo, Vec<u8>)| {
                    client.send_nar(info, &mut Counted { rest: nar, sent })
                };
                objects.iter().try_for_each(&mut send)?;
                client.finish_nars()
            });
            wait_until("enough is sent", || {
                Ok(sent.load(Ordering::Relaxed) >= target || sending.is_finished())
            })?;
            session.child.kill()?;
            sending.join().map_err(|_| anyhow!("the sender panicked")).map(|result| result.is_err())
        })?;
        session.kill()?;
        caught += u32::from(cut);
        // The locks are free, what is there is whole, and what is half is replaced.
        let mut session = start(peer, &root, other)?;
        let paths: BTreeSet<StorePath> = objects.iter().map(|(info, _)| info.path.clone()).collect();
        session.client.query_valid_paths(&paths, true, false)?;
        send(&mut session, &objects)?;
        for (info, nar) in &objects {
            let mut dumped = Vec::new();
            session.client.dump_store_path(&info.path, &mut dumped)?;
            ensure!(dumped == *nar, "round {round}: {}", info.path);
        }
        session.end()?;
        if round % 5 == 0 {
            verify(peer, &root)?;
        }
        if round % 4 == 3 {
            leave_half(peer, &root, victim, round)?;
        }
    }
    ensure!(caught >= ROUNDS / 4, "only {caught} of {ROUNDS} were killed at work");
    verify(peer, &root)?;
    collect_all(peer, &root)
}

/// Half of a path that nobody will want again: for the collector.
fn leave_half(peer: &Peer, root: &Root, victim: Whose, round: u32) -> Result<()> {
    let mut session = start(peer, root, victim)?;
    let nar = file_nar(&format!("{} half {round}", root.text()).into_bytes().repeat(100_000))?;
    let info = info("half", &nar, &[])?;
    let (go_on, gate) = mpsc::channel();
    let mut halting = Halting { rest: &nar, left: nar.len() / 2, gate };
    thread::scope(|scope| -> Result<()> {
        let (client, info) = (&mut session.client, &info);
        let sending = scope.spawn(move || client.add_to_store_nar(info, &mut halting));
        wait_until("there is something of it", || Ok(root.object(&info.path).exists()))?;
        session.child.kill()?;
        drop(go_on);
        let sent = sending.join().map_err(|_| anyhow!("the sender panicked"))?;
        ensure!(sent.is_err());
        Ok(())
    })?;
    session.kill()?;
    ensure!(root.object(&info.path).exists() && !root.store(Access::ReadOnly)?.is_valid(&info.path)?);
    Ok(())
}

/// A directory of many files, a large file, and one that refers to both: the same for the same round.
fn objects(root: &Root, round: u32) -> Result<Vec<(PathInfo, Vec<u8>)>> {
    let salt = format!("{} {round}", root.text());
    let mut writer = nar::Writer::new(Vec::new());
    writer.directory()?;
    for i in 0..200 {
        writer.entry(format!("{i:04}").as_bytes())?;
        writer.file_bytes(i % 2 == 0, format!("{salt} {i}").as_bytes())?;
    }
    writer.end_directory()?;
    let many = writer.finish()?;
    let many = (info("many", &many, &[])?, many);
    let large = file_nar(&salt.as_bytes().repeat(20_000))?;
    let large = (info("large", &large, &[])?, large);
    let last = file_nar(salt.as_bytes())?;
    let last = (info("last", &last, &[&many.0.path, &large.0.path])?, last);
    Ok(vec![many, large, last])
}

fn send(session: &mut Session, objects: &[(PathInfo, Vec<u8>)]) -> Result<()> {
    for (info, nar) in objects {
        session.client.send_nar(info, &mut &nar[..])?;
    }
    Ok(session.client.finish_nars()?)
}

fn start(peer: &Peer, root: &Root, whose: Whose) -> Result<Session> {
    match whose {
        Whose::Nix => root.nix_session(peer),
        Whose::Drover => root.drover_session(),
    }
}

/// With nobody at work, everything is garbage, and nothing is left of it.
fn collect_all(peer: &Peer, root: &Root) -> Result<()> {
    Running::start(root.builder(&["gc"])?)?.end()?;
    ensure!(root.store(Access::ReadOnly)?.all_valid_paths()?.is_empty());
    no_leftovers(root)?;
    verify(peer, root)
}

#[test]
fn all_at_once_with_nix_2_34() -> Result<()> {
    all_at_once(Nix::V2_34, Duration::from_secs(15))
}

#[test]
fn all_at_once_with_older_ones() -> Result<()> {
    all_at_once(Nix::V2_26, Duration::from_secs(6))?;
    all_at_once(Nix::V2_8, Duration::from_secs(6))
}

/// How long to wait for everybody to have done something.
const AT_MOST: Duration = Duration::from_secs(25);

/// Importing, protecting, building and collecting, for a while.
fn all_at_once(nix: Nix, duration: Duration) -> Result<()> {
    let peer = Peer::new(nix)?;
    // It may have to be compiled, which must not count.
    program("drover-builder")?;
    let root = Root::in_memory()?;
    let store = root.store(Access::ReadWrite)?;
    let rounds = Rounds::default();
    let stop = AtomicBool::new(false);
    let objects = chain_of_objects(&root)?;
    // Nix's collector looks for permanent roots first and for temporary ones then: whoever makes a link and ends in between
    // loses what is linked. That is between Nix and Nix, so these two take turns.
    let nix_and_nix = RwLock::new(());
    thread::scope(|scope| -> Result<()> {
        let (peer, root, store, objects, rounds, stop) = (&peer, &root, &store, &objects, &rounds, &stop);
        let nix_and_nix = &nix_and_nix;
        let until_stopped = |what: &'static str, mut once: Box<dyn FnMut(usize) -> Result<()> + Send>| {
            move || {
                let mut turn = 0;
                while !stop.load(Ordering::Relaxed) {
                    let result = once(turn).with_context(|| format!("{nix:?}: {what}, turn {turn}"));
                    if result.is_err() {
                        stop.store(true, Ordering::Relaxed);
                        return result;
                    }
                    turn += 1;
                }
                Ok(())
            }
        };
        let mut threads = Vec::new();
        for (seed, whose) in [(1, Whose::Drover), (2, Whose::Drover), (3, Whose::Nix)] {
            let mut random = Random(seed);
            let once = move |_| live(peer, root, whose, objects, &mut random, rounds);
            threads.push(scope.spawn(until_stopped("importing", Box::new(once))));
        }
        // One after the other and not both at once: Nix notes a root in its own file only after the collector's answer, so
        // a collector that has waited for the last one could come too early to see it.
        let collect = move |turn| {
            // In between, what is equal comes to be shared.
            let command = match turn % 3 {
                0 => root.builder(&["gc"])?,
                1 => on_store(peer, root, "--gc")?,
                _ => on_store(peer, root, "--optimise")?,
            };
            let _turn = (turn % 3 == 1).then(|| nix_and_nix.write().unwrap_or_else(PoisonError::into_inner));
            let log = Running::start(command)?.end()?;
            // A Nix that finds the database in use says so in a warning, and tries again until it gets it (Nix: sqlite.cc,
            // handleSQLiteBusy). What it gives up for is an error, and no warning.
            let gave_up = |line: &str| {
                (line.contains("locked") || line.contains("busy")) && !line.starts_with("warning: ")
            };
            ensure!(!log.lines().any(gave_up), "{log}");
            rounds.collected.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        threads.push(scope.spawn(until_stopped("collecting", Box::new(collect))));
        let link = root.path().join("result");
        let build = move |turn| {
            let expression = root.chain().replace("some text", &format!("text {turn}"));
            let mut command = with_nix(peer, root).command("nix-build")?;
            command.args(["-E", &expression, "-o"]).arg(&link);
            let _turn = nix_and_nix.read().unwrap_or_else(PoisonError::into_inner);
            let log = Running::start(command)?.end()?;
            let out = std::fs::read_link(&link)?;
            let out = store.store_dir().parse(out.as_os_str().as_encoded_bytes())?;
            for _ in 0..20 {
                ensure!(store.is_valid(&out)? && root.object(&out).exists(), "{log}");
                thread::yield_now();
            }
            rounds.nix_builds.fetch_add(1, Ordering::Relaxed);
            Ok(std::fs::remove_file(&link)?)
        };
        threads.push(scope.spawn(until_stopped("nix-build", Box::new(build))));
        let build = move |turn| build_with_drover(root, store, turn, rounds);
        threads.push(scope.spawn(until_stopped("building", Box::new(build))));
        // On a machine with much else to do, until there is something to judge by.
        let start = Instant::now();
        while !stop.load(Ordering::Relaxed)
            && (start.elapsed() < duration || !rounds.all_worked() && start.elapsed() < AT_MOST)
        {
            thread::sleep(Duration::from_millis(20));
        }
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(())
    })?;
    // Shown with `--nocapture`.
    eprintln!("{nix:?}: {rounds:?}");
    ensure!(rounds.all_worked(), "{rounds:?}");
    drop(store);
    let _ = std::fs::remove_file(root.path().join("result"));
    verify(&peer, &root)?;
    // Each has something left to collect, if need be.
    collect_all(&peer, &root)
}

/// How often everything was done.
#[derive(Default, Debug)]
struct Rounds {
    imported: AtomicUsize,
    found: AtomicUsize,
    collected: AtomicUsize,
    nix_builds: AtomicUsize,
    drover_builds: AtomicUsize,
}

impl Rounds {
    /// Nobody only waited.
    fn all_worked(&self) -> bool {
        [&self.imported, &self.found, &self.collected, &self.nix_builds, &self.drover_builds]
            .iter()
            .all(|count| count.load(Ordering::Relaxed) >= 3)
    }
}

/// A few sets of paths in one session: what it has locked, and was told is there or has added, stays to its end.
fn live(
    peer: &Peer,
    root: &Root,
    whose: Whose,
    objects: &[(PathInfo, Vec<u8>)],
    random: &mut Random,
    rounds: &Rounds,
) -> Result<()> {
    let mut session = start(peer, root, whose)?;
    let mut ours: BTreeMap<&StorePath, &(PathInfo, Vec<u8>)> = BTreeMap::new();
    for _ in 0..3 {
        // Chains of four, each of which refers to the one before.
        let first = random.below(objects.len() / 4) * 4;
        let set = &objects[first..first + 1 + random.below(4)];
        let paths: BTreeSet<StorePath> = set.iter().map(|(info, _)| info.path.clone()).collect();
        let valid = session.client.query_valid_paths(&paths, true, false)?;
        rounds.found.fetch_add(valid.len(), Ordering::Relaxed);
        for object in set {
            if !valid.contains(&object.0.path) {
                session.client.send_nar(&object.0, &mut &object.1[..])?;
                rounds.imported.fetch_add(1, Ordering::Relaxed);
            }
            ours.insert(&object.0.path, object);
        }
        session.client.finish_nars()?;
        for (path, (_, nar)) in &ours {
            let mut dumped = Vec::new();
            session.client.dump_store_path(path, &mut dumped).with_context(|| format!("{whose:?} dumps"))?;
            ensure!(dumped == *nar, "{whose:?}: {path}");
        }
        let all: BTreeSet<StorePath> = ours.keys().map(|path| (*path).clone()).collect();
        let still = session.client.query_valid_paths(&all, false, false)?;
        ensure!(still == all, "{whose:?} lost {:?}", all.difference(&still));
    }
    session.end()
}

/// Chains of four objects, so many that sessions share some of them.
fn chain_of_objects(root: &Root) -> Result<Vec<(PathInfo, Vec<u8>)>> {
    let mut objects: Vec<(PathInfo, Vec<u8>)> = Vec::new();
    for i in 0..32_usize {
        let content = format!("{} {i}", root.text()).into_bytes().repeat(1 + (i % 5) * 500);
        let nar = file_nar(&content)?;
        let before = objects.last().filter(|_| i % 4 != 0).map(|(info, _)| info.path.clone());
        let info = info(&format!("object-{i}"), &nar, &before.iter().collect::<Vec<_>>())?;
        objects.push((info, nar));
    }
    Ok(objects)
}

fn on_store(peer: &Peer, root: &Root, operation: &str) -> Result<std::process::Command> {
    let mut command = peer.command("nix-store")?;
    command.args([operation, "--store", &root.text()]);
    Ok(command)
}

fn build_with_drover(root: &Root, store: &LocalStore, turn: usize, rounds: &Rounds) -> Result<()> {
    let mut session = root.drover_session()?;
    let dir = StoreDir::default();
    let nar = file_nar(format!("{} input {turn}", root.text()).as_bytes())?;
    let input = info("input", &nar, &[])?;
    session.client.add_to_store_nar(&input, &mut &nar[..])?;
    let mut drv = BasicDerivation {
        name: "made".into(),
        outputs: [(OutputName::out(), DerivationOutput::InputAddressed(input.path.clone()))].into(),
        input_srcs: [input.path.clone()].into(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: vec![
            "-c".into(),
            format!("read -r text < {0}; echo $text {0} > $out", dir.full(&input.path)).into(),
        ],
        env: [("out".into(), "".into())].into(),
    };
    let paths = modulo::basic_output_paths(&dir, &drv)?;
    let (name, out) = paths.into_iter().next().context("no output")?;
    drv.env.insert("out".into(), dir.full(&out).into());
    drv.outputs.insert(name, DerivationOutput::InputAddressed(out.clone()));
    let derivation = Derivation { basic: drv, input_drvs: BTreeMap::new() };
    let drv_path = modulo::drv_path(&dir, &derivation)?;
    let result = session.client.build_derivation(&drv_path, &derivation.basic, &BuildOptions::default())?;
    ensure!(result.status == BuildStatus::Built, "{result:?}");
    for _ in 0..3 {
        let mut dumped = Vec::new();
        session.client.dump_store_path(&out, &mut dumped)?;
        let info = store.path_info(&out)?.context("what was built is gone")?;
        ensure!(
            info.nar_hash == Sha256::of(&dumped) && info.references == [input.path.clone()].into(),
            "{info:?}"
        );
    }
    rounds.drover_builds.fetch_add(1, Ordering::Relaxed);
    session.end()
}

/// Numbers that look random enough to meet others at odd moments.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap_or(0) % end
    }
}
