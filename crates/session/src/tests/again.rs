//! Sessions that come behind one another with the same builder: what a broken connection or a cache that gave something
//! wrong leaves to the next one, and what is not asked for or sent again.

use std::io::Write;

use drover_cache::{Cache, Guarded, Memory};
use drover_serve::serve;

use super::*;

/// Larger than what is read of an input before it is sent.
const LARGE: usize = 1 << 20;
/// What a session takes beside what it is about: greetings, questions, metadata.
pub(super) const AROUND: u64 = 16 << 10;

pub(super) fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let step = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..LARGE).map(step).collect()
}

/// A builder and what an operator has, for as many sessions as it takes.
pub(super) struct Line {
    pub(super) job: Job,
    store: Option<MemoryStore>,
    pub(super) spool: tempfile::TempDir,
    /// Bytes of all sessions so far, as the operator counts them.
    pub(super) received: u64,
    sent: u64,
}

/// How a session is disturbed.
#[derive(Default)]
pub(super) struct Cut {
    /// The builder is gone after so many bytes of answers.
    pub(super) answers: Option<u64>,
    /// The builder knows Nix's commands only.
    pub(super) only_nix: bool,
}

impl Line {
    fn new(caches: Vec<Arc<dyn Cache>>, push: Arc<dyn Cache>) -> Self {
        let (world, spool) = (World::new(), tempfile::tempdir().unwrap());
        let dir = StoreDir::default();
        let mut store = world.store;
        store.builder = Some(Box::new(|store, _, derivation, _| {
            let paths = derivation.output_paths(&StoreDir::default()).unwrap();
            let paths: Vec<_> = paths.iter().map(|(name, path)| (name, path.as_ref().unwrap())).collect();
            if paths.iter().all(|(_, path)| store.paths.contains_key(path)) {
                return success(&paths);
            }
            // As before, but large.
            let result = build(store, derivation);
            let (info, nar) = store.paths.get_mut(&result.built_outputs["out"].path).unwrap();
            *nar = file_nar(&[noise(1), nar.clone()].concat());
            (info.nar_hash, info.nar_size) = (Sha256::of(nar), nar.len() as u64);
            result
        }));
        let job = Job {
            drv_path: drv_path_of(&dir, &world.derivation).unwrap(),
            dir,
            derivation: world.derivation,
            options: BuildOptions::default(),
            caches,
            push: Some(push),
            signing_key: None,
            trust: Trust::Verified,
            proven: Arc::default(),
            max_output_bytes: None,
            spool_dir: spool.path().to_owned(),
            kept: Arc::default(),
        };
        Self { job, store: Some(store), spool, received: 0, sent: 0 }
    }

    pub(super) fn good() -> Self {
        let World { binaries, sources, push, .. } = World::new();
        Self::new(vec![Arc::new(binaries), Arc::new(sources)], Arc::new(push))
    }

    pub(super) fn session(&mut self, cut: &Cut) -> (Result<Outcome, Failure>, Vec<Event>) {
        let (server_input, output) = pipe().unwrap();
        let (input, server_output) = pipe().unwrap();
        let mut store = self.store.take().unwrap();
        let answers = Bounded { inner: server_output, left: cut.answers.unwrap_or(u64::MAX) };
        let server = thread::spawn(move || {
            let _broken = serve(server_input, answers, &mut store, &StoreDir::default(), true);
            store
        });
        let (mut received, mut sent) = (0, 0);
        let reader = Counted { inner: input, count: &mut received, only_nix: false };
        let writer = Counted { inner: output, count: &mut sent, only_nix: cut.only_nix };
        let mut events = Vec::new();
        let result = run(reader, writer, &self.job, &mut |event| events.push(event));
        self.store = Some(server.join().unwrap());
        (self.received, self.sent) = (self.received + received, self.sent + sent);
        (result, events)
    }

    pub(super) fn store(&mut self) -> &mut MemoryStore {
        self.store.as_mut().unwrap()
    }

    /// How often this path was asked for from its beginning.
    fn dumps(&mut self, path: &StorePath) -> usize {
        let call = format!("dump {path}");
        self.store().calls.iter().filter(|said| **said == call).count()
    }
}

struct Bounded<W> {
    inner: W,
    left: u64,
}

impl<W: Write> Write for Bounded<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let some = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.inner.write(&bytes[..some])?;
        self.left -= count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

struct Counted<'a, T> {
    inner: T,
    count: &'a mut u64,
    only_nix: bool,
}

impl<T: Read> Read for Counted<'_, T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        *self.count += count as u64;
        Ok(count)
    }
}

impl<T: Write> Write for Counted<'_, T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Requests leave one by one, and their numbers stand first.
        if self.only_nix && bytes.starts_with(b"VORD") {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let count = self.inner.write(bytes)?;
        *self.count += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

pub(super) fn is_lost(result: &Result<Outcome, Failure>) -> bool {
    matches!(result, Err(failure) if failure.reason == Reason::ConnectionLost && failure.infrastructure)
}

#[test]
fn an_output_goes_on_where_it_stopped() {
    let mut whole = Line::good();
    let expected = whole.session(&Cut::default()).0.unwrap().outputs;
    let all = whole.received;
    // Anywhere in what the builder says, twice in a row as well.
    for step in 1..12 {
        let at = all * step / 12;
        for second in [None, Some(AROUND), Some(all / 3)] {
            let mut line = Line::good();
            let cuts = [Some(at), second].into_iter().flatten().map(Some).chain([None]);
            let mut ended = cuts.map(|answers| line.session(&Cut { answers, ..Cut::default() }).0);
            assert!(is_lost(&ended.next().unwrap()));
            let outputs = match ended.find(|result| !is_lost(result)).unwrap() {
                Ok(outcome) => outcome.outputs,
                Err(failure) => panic!("{at} {second:?}: {failure}"),
            };
            drop(ended);
            assert_eq!(outputs, expected, "{at} {second:?}");
            assert!(line.received < all + 3 * AROUND, "{at} {second:?}: {} of {all}", line.received);
            assert!(line.job.kept.is_empty());
            assert_eq!(std::fs::read_dir(line.spool.path()).unwrap().count(), 0);
        }
    }
}

#[test]
fn a_builder_that_cannot_resume_sends_it_again() {
    let mut line = Line::good();
    assert!(is_lost(&line.session(&Cut { answers: Some(LARGE as u64 / 2), ..Cut::default() }).0));
    let only_nix = || Cut { only_nix: true, ..Cut::default() };
    assert!(is_lost(&line.session(&only_nix()).0));
    let (result, events) = line.session(&only_nix());
    result.unwrap();
    // What came whole is not asked for again even so.
    let kept = events.iter().filter(|event| matches!(event, Event::OutputKept { .. })).count();
    assert_eq!(kept, 1);
}

#[test]
fn what_is_kept_is_what_is_wanted() {
    // Another one is there when the next session comes.
    let mut line = Line::good();
    assert!(is_lost(&line.session(&Cut { answers: Some(LARGE as u64 / 2), ..Cut::default() }).0));
    let out = line.job.known_outputs().unwrap().unwrap()["out"].clone();
    let (info, nar) = line.store().paths.get_mut(&out).unwrap();
    nar[1000] ^= 1;
    info.nar_hash = Sha256::of(nar);
    let hash = info.nar_hash;
    let (result, _) = line.session(&Cut::default());
    assert_eq!(result.unwrap().outputs["out"].nar_hash, hash);

    // The rest is not the rest of what the builder says.
    let mut line = Line::good();
    assert!(is_lost(&line.session(&Cut { answers: Some(LARGE as u64 / 2), ..Cut::default() }).0));
    let (_, nar) = line.store().paths.get_mut(&out).unwrap();
    nar[LARGE] ^= 1;
    let failure = line.session(&Cut::default()).0.unwrap_err();
    assert_eq!((failure.reason, failure.infrastructure), (Reason::OutputHashMismatch, false));

    // It is what the builder says, and no archive.
    let mut line = Line::good();
    line.store().builder = Some(Box::new(|store, _, derivation, _| {
        let result = build(store, derivation);
        let (info, nar) = store.paths.get_mut(&result.built_outputs["out"].path).unwrap();
        *nar = [file_nar(&noise(1)), b"behind it".to_vec()].concat();
        (info.nar_hash, info.nar_size) = (Sha256::of(nar), nar.len() as u64);
        info.references.clear();
        result
    }));
    assert!(is_lost(&line.session(&Cut { answers: Some(LARGE as u64 / 2), ..Cut::default() }).0));
    let failure = line.session(&Cut::default()).0.unwrap_err();
    assert_eq!((failure.reason, failure.infrastructure), (Reason::OutputRejected, false));
}

#[test]
fn what_could_not_be_stored_is_not_received_again() {
    let mut line = Line::good();
    let good = line.job.push.take();
    line.job.push = Some(Arc::new(MemoryCache { unreachable: true, ..MemoryCache::default() }));
    let failure = line.session(&Cut::default()).0.unwrap_err();
    assert_eq!((failure.reason, failure.infrastructure), (Reason::InfrastructureFailure, true));
    let before = line.received;
    line.job.push = good;
    line.session(&Cut::default()).0.unwrap();
    assert!(line.received - before < AROUND, "{}", line.received - before);
    let outputs = line.job.known_outputs().unwrap().unwrap();
    assert!(outputs.values().all(|path| line.dumps(path) == 1));
}

fn large_input() -> Vec<u8> {
    file_nar(&noise(2))
}

/// A cache with a large input, and with what else the build needs.
fn cache(name: &str, nar: Vec<u8>) -> MemoryCache {
    let cache = MemoryCache { name: name.into(), ..MemoryCache::default() };
    cache.insert(TOOL, &[TOOL, LIBC]);
    cache.insert(LIBC, &[]);
    let info = info_of(path(SOURCE), &[], &large_input());
    cache.paths.lock().unwrap().insert(path(SOURCE), (info, nar));
    cache
}

fn guarded(cache: MemoryCache) -> Arc<dyn Cache> {
    Arc::new(Guarded::new(Arc::new(cache), Memory::default()))
}

fn set_aside(events: &[Event]) -> Vec<String> {
    let said = events.iter().filter_map(|event| match event {
        Event::CacheSetAside { cache, path, .. } => Some(format!("{cache} {path}")),
        _ => None,
    });
    said.collect()
}

fn spoilt(at: usize) -> Vec<u8> {
    let mut nar = large_input();
    nar[at] ^= 1;
    nar
}

#[test]
fn an_input_that_came_wrong_is_had_from_another_cache() {
    let push = || Arc::new(MemoryCache::default());
    let mut line = Line::new(
        vec![guarded(cache("bad", spoilt(LARGE / 2))), guarded(cache("good", large_input()))],
        push(),
    );
    let (result, events) = line.session(&Cut::default());
    let failure = result.unwrap_err();
    assert_eq!((failure.reason, failure.infrastructure), (Reason::InputHashMismatch, true));
    assert!(
        failure.message.contains("memory:bad delivered") && failure.message.contains("memory:good has it")
    );
    assert_eq!(set_aside(&events), [format!("memory:bad {SOURCE}")]);
    let (result, events) = line.session(&Cut::default());
    let outcome = result.unwrap();
    // What was there is there; the one that was wrong comes again, and nothing else.
    assert!(set_aside(&events).is_empty());
    assert_eq!((outcome.transfer.paths_present, outcome.transfer.paths_sent), (2, 1));
    assert!(line.sent < 2 * LARGE as u64 + AROUND);

    // Nobody else has it: a verdict, and for whoever asks next as well.
    let mut line = Line::new(vec![guarded(cache("bad", spoilt(LARGE / 2)))], push());
    for _ in 0..2 {
        let failure = line.session(&Cut::default()).0.unwrap_err();
        assert_eq!((failure.reason, failure.infrastructure), (Reason::InputHashMismatch, false));
        assert!(failure.message.contains("memory:bad") && failure.message.contains(SOURCE), "{failure}");
    }
    // All that have it have it wrong.
    let bad = |name: &str| guarded(cache(name, spoilt(LARGE / 2)));
    let mut line = Line::new(vec![bad("one"), bad("two")], push());
    assert!(line.session(&Cut::default()).0.unwrap_err().infrastructure);
    let failure = line.session(&Cut::default()).0.unwrap_err();
    assert_eq!((failure.reason, failure.infrastructure), (Reason::InputHashMismatch, false));
}

#[test]
fn another_cache_is_asked_at_once_while_nothing_was_sent() {
    let hollow = MemoryCache { hollow: true, ..cache("bad", large_input()) };
    let breaks = MemoryCache { breaks_at: Some(1000), ..cache("bad", large_input()) };
    for bad in [cache("bad", spoilt(100)), hollow, breaks] {
        // What is wrong in the first part of a large one is found out at its end only.
        let at_end = !bad.hollow && bad.breaks_at.is_none();
        bad.insert(LIBC, &[]);
        if at_end {
            bad.corrupt(LIBC, file_nar(b"contents of something else that is wrong"));
            bad.corrupt(SOURCE, large_input());
        }
        let mut line = Line::new(
            vec![guarded(bad), guarded(cache("good", large_input()))],
            Arc::new(MemoryCache::default()),
        );
        let (result, events) = line.session(&Cut::default());
        let outcome = result.unwrap();
        assert_eq!(outcome.transfer.paths_sent, 3);
        let expected = if at_end { 1 } else { 3 };
        assert_eq!(set_aside(&events).len(), expected, "{events:?}");
    }
}

#[test]
fn a_cache_that_breaks_in_the_middle() {
    let breaks = || MemoryCache { breaks_at: Some(LARGE as u64 / 2), ..cache("bad", large_input()) };
    let push = || Arc::new(MemoryCache::default());
    let mut line = Line::new(vec![guarded(breaks()), guarded(cache("good", large_input()))], push());
    let failure = line.session(&Cut::default()).0.unwrap_err();
    assert_eq!((failure.reason, failure.infrastructure), (Reason::InputHashMismatch, true));
    line.session(&Cut::default()).0.unwrap();
    // Nobody else has it: it may come another time.
    let mut line = Line::new(vec![guarded(breaks())], push());
    for _ in 0..2 {
        let (result, events) = line.session(&Cut::default());
        let failure = result.unwrap_err();
        assert_eq!((failure.reason, failure.infrastructure), (Reason::InfrastructureFailure, true));
        assert!(set_aside(&events).is_empty());
    }
}

#[test]
fn inputs_that_have_arrived_are_not_sent_again() {
    let caches = || vec![Arc::new(cache("c", large_input())) as Arc<dyn Cache>];
    let mut line = Line::new(caches(), Arc::new(MemoryCache::default()));
    // The greeting, the answer about what is there, and of three additions' answers one.
    let mut whole = Line::new(caches(), Arc::new(MemoryCache::default()));
    whole.session(&Cut::default()).0.unwrap();
    assert!(is_lost(&line.session(&Cut { answers: Some(16 + 8 + 8), ..Cut::default() }).0));
    let there = line.store().paths.len();
    assert!(there > 0);
    let (result, _) = line.session(&Cut::default());
    let outcome = result.unwrap();
    assert_eq!((outcome.transfer.paths_present, outcome.transfer.paths_sent), (there, 3 - there));
}
