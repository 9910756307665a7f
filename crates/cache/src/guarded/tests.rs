//! Against doubles that count questions, with a clock that stands until it is moved.

use std::io;
use std::sync::atomic::AtomicBool;
use std::thread;

use drover_nix::narinfo::Compression;

use super::*;
use crate::find;
use crate::testing::{info_of, nar_of_file, spool, store_path};

const SECOND: Duration = Duration::from_secs(1);

/// Has every path whose name begins with its own, and counts questions.
struct Double {
    name: &'static str,
    asked: AtomicU64,
    broken: AtomicBool,
}

impl Cache for Double {
    fn url(&self) -> String {
        format!("double:{}", self.name)
    }

    fn narinfo(&self, path: &StorePath) -> Result<Option<NarInfo>, Error> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if self.broken.load(Ordering::Relaxed) {
            return Err(Error::Status { act: "fetch", url: self.url(), status: 503 });
        }
        Ok(path.name().starts_with(self.name).then(|| narinfo(path)))
    }

    fn nar(&self, narinfo: &NarInfo) -> Result<Box<dyn Read + Send>, Error> {
        match self.broken.load(Ordering::Relaxed) {
            true => Err(Error::MissingNar { url: narinfo.url.clone() }),
            false => Ok(Box::new(io::empty())),
        }
    }

    fn put(&self, _info: &PathInfo, _nar: &SpooledNar) -> Result<Stored, Error> {
        Ok(Stored::New)
    }

    fn put_log(&self, _drv: &StorePath, _log: &mut dyn Read) -> Result<(), Error> {
        Ok(())
    }
}

fn narinfo(path: &StorePath) -> NarInfo {
    let info = PathInfo { path: path.clone(), ..info_of("any", &nar_of_file(b"")) };
    NarInfo { info, url: "x".into(), compression: Compression::None, file_hash: None, file_size: None }
}

/// Caches with a clock that stands until it is moved.
struct World {
    caches: Vec<Arc<dyn Cache>>,
    guarded: Vec<Arc<Guarded>>,
    doubles: Vec<Arc<Double>>,
    millis: Arc<AtomicU64>,
}

impl World {
    fn new<const N: usize>(names: [&'static str; N], memory: Memory) -> Self {
        let millis = Arc::new(AtomicU64::new(0));
        let (start, mut doubles, mut guarded) = (Instant::now(), Vec::new(), Vec::new());
        for name in names {
            let double = Double { name, asked: AtomicU64::new(0), broken: AtomicBool::new(false) };
            let double = Arc::new(double);
            let time = millis.clone();
            let clock = move || start + Duration::from_millis(time.load(Ordering::Relaxed));
            guarded.push(Arc::new(Guarded::with_clock(double.clone(), memory, clock)));
            doubles.push(double);
        }
        let caches = guarded.iter().map(|cache| cache.clone() as Arc<dyn Cache>).collect();
        Self { caches, guarded, doubles, millis }
    }

    fn find(&self, name: &str) -> Result<Option<usize>, Error> {
        Ok(find(&self.caches, &store_path(name))?.map(|(index, _)| index))
    }

    fn pass(&self, time: Duration) {
        self.millis.fetch_add(time.as_millis() as u64, Ordering::Relaxed);
    }

    /// Questions since the last call, by cache.
    fn asked(&self) -> Vec<u64> {
        self.doubles.iter().map(|double| double.asked.swap(0, Ordering::Relaxed)).collect()
    }
}

#[test]
fn what_is_known_is_not_asked_again() {
    let world = World::new(["a", "b"], Memory::default());
    assert_eq!(world.find("a1").unwrap(), Some(0));
    assert_eq!(world.find("b1").unwrap(), Some(1));
    assert_eq!(world.asked(), [2, 1]);
    for name in ["a1", "b1"] {
        assert!(world.find(name).unwrap().is_some());
    }
    assert_eq!(world.asked(), [0, 0]);
    // The first lacked one a moment ago, which is no longer a moment; the second still has it.
    world.pass(Memory::default().negative);
    assert_eq!(world.find("b1").unwrap(), Some(1));
    assert_eq!(world.asked(), [1, 0]);
    world.pass(Memory::default().positive);
    assert_eq!(world.find("a1").unwrap(), Some(0));
    assert_eq!(world.asked(), [1, 0]);
    assert_eq!(world.guarded[1].counts(), Counts { recalled: 2, asked: 1, wrong: 0 });
    // A caller that asks itself gets the cache's own answer.
    assert!(world.caches[0].narinfo(&store_path("a1")).unwrap().is_some());
    assert_eq!(world.asked(), [1, 0]);
}

#[test]
fn absence_is_never_recalled() {
    let world = World::new(["a", "b"], Memory::default());
    for _ in 0..3 {
        assert_eq!(world.find("c").unwrap(), None);
        assert_eq!(world.asked(), [1, 1], "each time, each cache is asked once");
    }
    // The same handle twice, as where outputs go to one of the caches that inputs come from.
    let twice = [world.caches[0].clone(), world.caches[0].clone()];
    assert_eq!(find(&twice, &store_path("b")).unwrap(), None);
    assert_eq!(world.asked(), [1, 0]);
    // One cannot be asked: whether the path is absent is not known.
    world.doubles[1].broken.store(true, Ordering::Relaxed);
    assert_eq!(world.find("c").unwrap_err().category(), "status");
    assert_eq!(world.find("a").unwrap(), Some(0));
}

#[test]
fn what_is_stored_or_gone_is_asked_for_anew() {
    let world = World::new(["a"], Memory::default());
    let nar = nar_of_file(b"");
    world.find("a").unwrap();
    world.caches[0].put(&info_of("a", &nar), &spool(&nar)).unwrap();
    world.find("a").unwrap();
    assert_eq!(world.asked(), [2]);
    world.doubles[0].broken.store(true, Ordering::Relaxed);
    assert_eq!(world.find("a").unwrap(), Some(0), "the memory of it");
    assert!(world.caches[0].nar(&narinfo(&store_path("a"))).is_err());
    assert!(world.find("a").is_err());
    assert_eq!(world.asked(), [1]);
}

#[test]
fn a_cache_that_was_wrong_is_asked_last() {
    let memory = Memory::default();
    let world = World::new(["", "both"], memory);
    assert_eq!(world.find("both1").unwrap(), Some(0));
    world.caches[0].set_aside(&store_path("both1"), "its hash is another");
    for name in ["both1", "both2"] {
        assert_eq!(world.find(name).unwrap(), Some(1), "another cache has {name}");
    }
    // For what nobody else has it is good enough: all bytes are verified anyway. But not for what came wrong.
    assert_eq!(world.find("single").unwrap(), Some(0));
    world.caches[0].set_aside(&store_path("single"), "its hash is another");
    let error = world.find("single").unwrap_err();
    assert!(error.is_transient());
    assert_eq!(error.category(), "set-aside");
    let said = error.to_string();
    assert!(
        said.contains("double:") && said.contains("its hash is another") && said.contains("600 s"),
        "{said}"
    );
    assert!(world.caches[0].nar(&narinfo(&store_path("single"))).is_err());
    // The second mistake doubled the time.
    world.pass(memory.wrong_cache);
    assert_eq!(world.find("both3").unwrap(), Some(1));
    world.pass(memory.wrong_cache);
    assert_eq!(world.find("both4").unwrap(), Some(0));
    assert!(world.find("single").is_err());
    world.pass(memory.wrong_path);
    assert_eq!(world.find("single").unwrap(), Some(0));
    assert_eq!(world.guarded[0].counts().wrong, 2);
}

#[test]
fn memory_has_a_limit() {
    let world = World::new(["a"], Memory { bytes: 20_000, ..Memory::default() });
    for number in 0..1000 {
        world.find(&format!("a{number}")).unwrap();
        world.find("a-often").unwrap();
        let answers = world.guarded[0].answers();
        let sum = |map: &HashMap<_, Answer>| map.values().map(Answer::weight).sum::<usize>();
        assert_eq!(sum(&answers.young), answers.weight);
        assert!(sum(&answers.young) + sum(&answers.old) <= 20_000);
    }
    assert_eq!(world.asked(), [1001], "what is asked for often stays");
    world.find("a0").unwrap();
    assert_eq!(world.asked(), [1], "the rest does not");
    for number in 0..2 * MAX_WRONG {
        world.caches[0].set_aside(&store_path(&number.to_string()), &"x".repeat(10_000));
    }
    let wrong = world.guarded[0].wrong();
    assert_eq!(wrong.paths.len(), MAX_WRONG);
    assert!(wrong.paths.values().all(|mistake| mistake.why.len() <= MAX_WHY));
}

#[test]
fn many_threads_at_once() {
    let world = World::new(["a"], Memory { bytes: 50_000, ..Memory::default() });
    thread::scope(|scope| {
        for thread in 0..8 {
            let world = &world;
            scope.spawn(move || {
                for number in 0..500 {
                    let name = format!("a{}", (number * 7 + thread) % 100);
                    assert!(number % 50 == 0 || world.find(&name).is_ok_and(|found| found == Some(0)));
                    if number % 50 == 0 {
                        world.caches[0].nar(&narinfo(&store_path(&name))).unwrap();
                        world.caches[0].set_aside(&store_path(&format!("z{number}")), "wrong");
                    }
                    world.pass(SECOND);
                }
            });
        }
    });
    let answers = world.guarded[0].answers();
    assert_eq!(answers.young.values().map(Answer::weight).sum::<usize>(), answers.weight);
}
