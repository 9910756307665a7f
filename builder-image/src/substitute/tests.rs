//! Against caches in memory that can be made to misbehave.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use drover_cache::{Cache, Error, SpooledNar, Stored};
use drover_nix::narinfo::Compression;
use drover_nix::{NarInfo, PathInfo, Sha256, StoreDir, StorePath, nar};
use drover_store::{Access, LocalStore, PathLock, StoreUri, Wait};
use tempfile::TempDir;

use super::*;

/// For what must happen, and does not.
const LONG: Duration = Duration::from_secs(20);

fn path(name: &str) -> StorePath {
    StoreDir::default().make_path("test", Sha256::of(name.as_bytes()), name).unwrap()
}

fn paths(names: &[&str]) -> BTreeSet<StorePath> {
    names.iter().map(|name| path(name)).collect()
}

#[derive(Default)]
struct MemoryCache {
    name: &'static str,
    paths: BTreeMap<StorePath, (PathInfo, Vec<u8>)>,
    unreachable: AtomicBool,
    untrusted: bool,
    /// Fails after so many bytes of any NAR.
    breaks_at: Option<u64>,
    asked: AtomicUsize,
    opened: Mutex<Vec<StorePath>>,
    changed: Condvar,
    /// Whoever waits for it goes as soon as it is asked.
    client: Option<Cancel>,
    /// The NAR of the first is not given before that of the second was asked for.
    gate: Option<(StorePath, StorePath)>,
}

impl MemoryCache {
    fn new(name: &'static str) -> Self {
        Self { name, ..Self::default() }
    }

    fn with(mut self, name: &str, references: &[&str]) -> Self {
        let mut writer = nar::Writer::new(Vec::new());
        writer.file_bytes(false, format!("contents of {name}").as_bytes()).unwrap();
        let nar = writer.finish().unwrap();
        let info = PathInfo {
            path: path(name),
            nar_hash: Sha256::of(&nar),
            nar_size: nar.len() as u64,
            references: paths(references),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        };
        self.paths.insert(path(name), (info, nar));
        self
    }

    fn corrupt(mut self, name: &str) -> Self {
        let (_, nar) = self.paths.get_mut(&path(name)).unwrap();
        let at = nar.windows(8).position(|window| window == b"contents").unwrap() + 32;
        nar[at] ^= 1;
        self
    }

    /// Waits until the NAR of `path` was asked for.
    fn wait_for(&self, path: &StorePath) {
        let opened = self.opened.lock().unwrap();
        let wait = self.changed.wait_timeout_while(opened, LONG, |opened| !opened.contains(path));
        assert!(!wait.unwrap().1.timed_out(), "{path} is not asked for meanwhile");
    }
}

impl Cache for MemoryCache {
    fn url(&self) -> String {
        format!("memory:{}", self.name)
    }

    fn narinfo(&self, path: &StorePath) -> Result<Option<NarInfo>, Error> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.client.iter().for_each(Cancel::cancel);
        if self.unreachable.load(Ordering::SeqCst) {
            return Err(Error::Io {
                act: "reach it".into(),
                source: io::ErrorKind::ConnectionRefused.into(),
            });
        }
        if self.untrusted {
            return Err(Error::Untrusted { url: self.url(), path: path.clone(), why: "unsigned".into() });
        }
        Ok(self.paths.get(path).map(|(info, _)| NarInfo {
            info: info.clone(),
            url: "x".into(),
            compression: Compression::None,
            file_hash: None,
            file_size: None,
        }))
    }

    fn nar(&self, narinfo: &NarInfo) -> Result<Box<dyn Read + Send>, Error> {
        let path = &narinfo.info.path;
        self.opened.lock().unwrap().push(path.clone());
        self.changed.notify_all();
        if let Some((_, after)) = self.gate.as_ref().filter(|(gated, _)| gated == path) {
            self.wait_for(after);
        }
        let bytes = self.paths[path].1.clone();
        Ok(match self.breaks_at {
            None => Box::new(io::Cursor::new(bytes)),
            Some(at) => Box::new(io::Cursor::new(bytes).take(at).chain(Broken)),
        })
    }

    fn put(&self, _info: &PathInfo, _nar: &SpooledNar) -> Result<Stored, Error> {
        unreachable!("nothing is stored here")
    }

    fn put_log(&self, _drv: &StorePath, _log: &mut dyn Read) -> Result<(), Error> {
        unreachable!("nothing is stored here")
    }
}

struct Broken;

impl Read for Broken {
    fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A store of its own, and a session that fetches.
struct World {
    dir: TempDir,
    store: LocalStore,
    roots: TempRoots,
    substituter: Substituter,
    cancel: Cancel,
    log: Log,
    lines: Lines,
}

impl World {
    fn new(caches: Vec<Arc<MemoryCache>>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let layout = StoreUri::parse(dir.path().to_str().unwrap()).unwrap().layout();
        let store = LocalStore::open(layout, Access::ReadWrite).unwrap();
        let settings = Settings { urls: vec!["memory:".into()], ..Settings::default() };
        let substituter = Substituter::new(settings, &store);
        let sources = caches.into_iter().map(|cache| Source::new(cache, "memory:")).collect();
        substituter.0.sources.set(sources).unwrap();
        let lines = Lines::default();
        Self {
            roots: store.temp_roots().unwrap(),
            substituter,
            cancel: Cancel::new().unwrap(),
            log: Log::to(lines.clone()).unwrap(),
            lines,
            dir,
            store,
        }
    }

    fn fetch(&self, names: &[&str]) -> BTreeSet<StorePath> {
        self.substituter.fetch(&self.store, &paths(names), &self.roots, &self.log, &self.cancel);
        let valid = self.store.all_valid_paths().unwrap().into_iter().collect();
        self.only(&valid);
        valid
    }

    /// Nothing lies in the store that is not valid.
    fn only(&self, valid: &BTreeSet<StorePath>) {
        let entries = std::fs::read_dir(self.dir.path().join("nix/store")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let left: Vec<String> = names
            .filter(|name| !name.starts_with('.') && !valid.iter().any(|path| path.as_str() == name))
            .collect();
        assert_eq!(left, Vec::<String>::new());
    }

    fn said(&self) -> String {
        self.log.flush_until(&|| false);
        String::from_utf8(self.lines.0.lock().unwrap().clone()).unwrap()
    }
}

#[test]
fn a_path_comes_with_all_that_it_refers_to() {
    let cache = MemoryCache::new("a").with("top", &["low", "top"]).with("low", &[]).with("other", &[]);
    let cache = Arc::new(cache);
    let world = World::new(vec![cache.clone()]);
    assert_eq!(world.fetch(&["top"]), paths(&["top", "low"]));
    assert_eq!(world.store.path_info(&path("top")).unwrap().unwrap(), cache.paths[&path("top")].0);
    let asked = cache.asked.load(Ordering::SeqCst);
    assert_eq!(world.fetch(&["top"]).len(), 2);
    assert_eq!(cache.asked.load(Ordering::SeqCst), asked, "what is valid is not asked for");
    let roots = world.dir.path().join("nix/var/nix/temproots").join(std::process::id().to_string());
    let roots = std::fs::read_to_string(roots).unwrap();
    assert!(roots.contains(path("top").as_str()) && roots.contains(path("low").as_str()), "{roots}");
    assert_eq!(world.said(), "");
}

#[test]
fn what_is_referred_to_may_arrive_last() {
    let (low, top) = (path("low"), path("top"));
    let cache = MemoryCache::new("a").with("top", &["low"]).with("low", &[]);
    let world = World::new(vec![Arc::new(MemoryCache { gate: Some((low, top)), ..cache })]);
    assert_eq!(world.fetch(&["top"]).len(), 2);
}

#[test]
fn several_paths_are_fetched_at_once() {
    let cache = MemoryCache::new("a").with("first", &[]).with("second", &[]);
    let order = [path("first"), path("second")];
    // Each way round: whichever is begun first waits for the other.
    for (gated, after) in [(&order[0], &order[1]), (&order[1], &order[0])] {
        let cache = MemoryCache {
            paths: cache.paths.clone(),
            gate: Some((gated.clone(), after.clone())),
            ..MemoryCache::new("a")
        };
        assert_eq!(World::new(vec![Arc::new(cache)]).fetch(&["first", "second"]).len(), 2);
    }
}

#[test]
fn wrong_bytes_are_refused_and_their_cache_is_set_aside() {
    let bad = Arc::new(MemoryCache::new("bad").with("x", &[]).with("y", &[]).corrupt("x"));
    let good = Arc::new(MemoryCache::new("good").with("x", &[]).with("y", &[]));
    let world = World::new(vec![bad.clone(), good]);
    assert_eq!(world.fetch(&["x"]), paths(&["x"]));
    let said = world.said();
    assert!(said.contains("memory:bad delivered") && said.lines().count() == 1, "{said}");
    let asked = bad.asked.load(Ordering::SeqCst);
    assert_eq!(world.fetch(&["y"]).len(), 2);
    assert_eq!(bad.asked.load(Ordering::SeqCst), asked, "it is asked last, and was not needed");
    // Where there is no other, the path is not valid, and that is all.
    let world = World::new(vec![Arc::new(MemoryCache::new("bad").with("x", &[]).corrupt("x"))]);
    assert_eq!(world.fetch(&["x"]), paths(&[]));
}

#[test]
fn a_cache_whose_bytes_are_all_wrong_is_not_read_to_its_end() {
    let names: Vec<String> = (0..50).map(|i| format!("p{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let cache = MemoryCache::new("bad");
    let cache = Arc::new(names.iter().fold(cache, |cache, name| cache.with(name, &[]).corrupt(name)));
    let world = World::new(vec![cache.clone()]);
    assert_eq!(world.fetch(&names), paths(&[]));
    let opened = cache.opened.lock().unwrap().len();
    assert!(opened < 15, "{opened} were fetched");
}

#[test]
fn a_cache_that_does_not_answer_is_left_alone() {
    let names: Vec<String> = (0..100).map(|i| format!("p{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let (down, up) = (Arc::new(MemoryCache::new("down")), MemoryCache::new("up"));
    down.unreachable.store(true, Ordering::SeqCst);
    let up = names.iter().fold(up, |up, name| up.with(name, &[]));
    let world = World::new(vec![down.clone(), Arc::new(up)]);
    assert_eq!(world.fetch(&names).len(), names.len());
    let asked = down.asked.load(Ordering::SeqCst);
    assert!(asked < 20, "it was asked {asked} times");
    assert_eq!(world.said().lines().count(), 1, "{}", world.said());
}

#[test]
fn a_stream_that_breaks_off_is_taken_from_elsewhere() {
    let broken = MemoryCache { breaks_at: Some(50), ..MemoryCache::new("broken") }.with("x", &[]);
    let world = World::new(vec![Arc::new(broken), Arc::new(MemoryCache::new("whole").with("x", &[]))]);
    assert_eq!(world.fetch(&["x"]), paths(&["x"]));
    assert!(!world.said().contains("wrong"), "{}", world.said());
}

#[test]
fn what_cannot_be_complete_is_not_begun() {
    let cache = MemoryCache::new("a")
        .with("top", &["middle"])
        .with("middle", &["nowhere", "low"])
        .with("low", &[])
        .with("this", &["that"])
        .with("that", &["this"]);
    let cache = Arc::new(cache);
    let world = World::new(vec![cache.clone()]);
    assert_eq!(world.fetch(&["top", "this"]), paths(&["low"]));
    assert_eq!(*cache.opened.lock().unwrap(), [path("low")]);
}

#[test]
fn what_fails_below_fails_above() {
    let cache = MemoryCache::new("a").with("top", &["low"]).with("low", &[]).corrupt("low");
    let gate = Some((path("low"), path("top")));
    let world = World::new(vec![Arc::new(MemoryCache { gate, ..cache })]);
    assert_eq!(world.fetch(&["top"]), paths(&[]));
}

#[test]
fn what_is_not_believed_is_not_there() {
    let cache = MemoryCache { untrusted: true, ..MemoryCache::new("a") }.with("x", &[]).with("y", &[]);
    let world = World::new(vec![Arc::new(cache)]);
    assert_eq!(world.fetch(&["x", "y"]), paths(&[]));
    assert!(world.said().contains("unsigned") && world.said().lines().count() == 1, "{}", world.said());
}

#[test]
fn who_comes_second_waits_and_fetches_nothing() {
    let cache = Arc::new(MemoryCache::new("a").with("x", &[]));
    let world = World::new(vec![cache.clone()]);
    let lock = PathLock::acquire(&world.store, [&path("x")], Wait::Try).unwrap().unwrap();
    std::thread::scope(|scope| {
        let second = scope.spawn(|| {
            world.substituter.fetch(&world.store, &paths(&["x"]), &world.roots, &world.log, &world.cancel)
        });
        // Whoever has the lock makes the path valid meanwhile.
        let (info, nar) = &cache.paths[&path("x")];
        std::fs::write(world.store.real_path(&path("x")), b"contents of x").unwrap();
        assert_eq!(Sha256::of(nar), info.nar_hash);
        let valid = drover_store::ValidPath { info: info.clone(), ultimate: false, registration_time: 0 };
        world.store.register(&[valid]).unwrap();
        lock.release_deleting();
        second.join().unwrap();
    });
    assert!(cache.opened.lock().unwrap().is_empty());
    assert!(world.store.is_valid(&path("x")).unwrap());
}

#[test]
fn nobody_waits_for_it_any_more() {
    let cache = Arc::new(MemoryCache::new("a").with("x", &[]));
    let world = World::new(vec![cache.clone()]);
    world.cancel.cancel();
    assert_eq!(world.fetch(&["x"]), paths(&[]));
    assert!(cache.opened.lock().unwrap().is_empty());
}

#[test]
fn caches_are_asked_no_further_when_nobody_waits() {
    let names: Vec<String> = (0..200).map(|i| format!("p{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut world = World::new(vec![]);
    let cache = MemoryCache { client: Some(world.cancel.clone()), ..MemoryCache::new("a") };
    let cache = Arc::new(names.iter().fold(cache, |cache, name| cache.with(name, &[])));
    world.substituter = World::new(vec![cache.clone()]).substituter;
    assert_eq!(world.fetch(&names), paths(&[]));
    let asked = cache.asked.load(Ordering::SeqCst);
    assert!(asked < 100, "it was asked {asked} times");
}

#[test]
fn nobody_waits_for_a_lock_longer_than_its_client() {
    let cache = Arc::new(MemoryCache::new("a").with("x", &[]).with("y", &[]));
    let world = World::new(vec![cache.clone()]);
    // Of two of one size the first in order is begun first.
    let wanted: Vec<StorePath> = paths(&["x", "y"]).into_iter().collect();
    let lock = PathLock::acquire(&world.store, [&wanted[0]], Wait::Try).unwrap().unwrap();
    std::thread::scope(|scope| {
        let (done, is_done) = std::sync::mpsc::channel();
        let world = &world;
        scope.spawn(move || {
            world.substituter.fetch(
                &world.store,
                &paths(&["x", "y"]),
                &world.roots,
                &world.log,
                &world.cancel,
            );
            done.send(()).unwrap();
        });
        cache.wait_for(&wanted[1]);
        world.cancel.cancel();
        let gone = is_done.recv_timeout(LONG);
        // Before anything fails, or the scope would never end.
        drop(lock);
        gone.unwrap();
    });
    assert!(!world.store.is_valid(&wanted[0]).unwrap());
}

#[test]
fn references_are_followed_up_to_a_limit() {
    let cache = MemoryCache::new("a").with("a", &["x", "y"]).with("b", &["x", "y"]).with("c", &["x"]);
    let world = World::new(vec![Arc::new(cache)]);
    let (sources, complaints) = (world.substituter.0.sources.get().unwrap(), Complaints::new(&world.log));
    let asked: Vec<StorePath> = paths(&["a", "b", "c"]).into_iter().collect();
    for (most, found) in [(8, 3), (7, 2), (5, 2), (4, 1), (1, 0)] {
        let left = AtomicUsize::new(most);
        let answers = search::look_up(sources, &asked, &left, &world.cancel, &complaints);
        // Whichever comes first: three, three and two.
        assert!(answers.len() <= found && answers.len() + 1 >= found, "{most}: {}", answers.len());
        let taken: usize = answers.iter().map(|(_, (_, narinfo))| 1 + narinfo.info.references.len()).sum();
        assert_eq!(left.into_inner(), most - taken);
    }
}

#[test]
fn derivations_are_not_fetched_for_their_own_sake() {
    let world = World::new(vec![Arc::new(MemoryCache::new("a").with("x.drv", &[]))]);
    assert_eq!(world.fetch(&["x.drv"]), paths(&[]));
}

#[test]
fn caches_that_need_no_signature_say_so() {
    for (url, trusted) in [
        ("http://a?trusted=true", true),
        ("http://a?priority=3&trusted=1", true),
        ("http://a", false),
        ("http://a?trusted=false", false),
        ("http://trusted=true", false),
    ] {
        assert_eq!(is_trusted(url), trusted, "{url}");
    }
}
