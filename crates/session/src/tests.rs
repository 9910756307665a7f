//! Whole sessions against the serve crate's server over real pipes, with a builder and caches in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write as _, pipe};
use std::sync::{Arc, Mutex};
use std::thread;

use drover_cache::{Cache, SpooledNar, Stored};
use drover_nix::derivation::modulo;
use drover_nix::hash_modulo::HashModulo;
use drover_nix::narinfo::Compression;
use drover_nix::signature::SecretKey;
use drover_nix::{
    BasicDerivation, ContentAddress, DerivationOutput, Hash, HashAlgo, Method, NarInfo, OutputName, PathInfo,
    Sha256, StoreDir, StorePath,
};
use drover_serve::testing::{MemoryStore, file_nar, info_of};
use drover_serve::{BuildOptions, BuildResult, BuildStatus, BuiltOutput, serve};

use crate::*;

mod again;
mod frames;

const LIBC: &str = "f8g8x4m83da3b2f79iv84q2r3qlc58lr-libc";
const TOOL: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-tool";
const SOURCE: &str = "q4mzjdlh5px6977h7v5fdsk1p33yg583-source";
const OTHER: &str = "8bazivnbipbyi569623skw5zm91z6kc2-other";

fn path(base: &str) -> StorePath {
    base.parse().unwrap()
}

/// A cache in memory that can be made to misbehave.
#[derive(Default)]
struct MemoryCache {
    name: String,
    paths: Mutex<BTreeMap<StorePath, (PathInfo, Vec<u8>)>>,
    /// Order in which paths were stored.
    stored: Mutex<Vec<StorePath>>,
    unreachable: bool,
    untrusted: BTreeSet<StorePath>,
    /// Has narinfo files, but the NARs are gone.
    hollow: bool,
    /// Fails after so many bytes of any NAR.
    breaks_at: Option<u64>,
}

impl MemoryCache {
    fn insert(&self, base: &str, references: &[&str]) {
        let references: Vec<StorePath> = references.iter().map(|base| path(base)).collect();
        let nar = file_nar(format!("contents of {base}").as_bytes());
        let info = info_of(path(base), &references.iter().collect::<Vec<_>>(), &nar);
        self.paths.lock().unwrap().insert(path(base), (info, nar));
    }

    fn corrupt(&self, base: &str, bytes: Vec<u8>) {
        self.paths.lock().unwrap().get_mut(&path(base)).unwrap().1 = bytes;
    }

    fn trouble(&self) -> drover_cache::Error {
        let source = io::ErrorKind::ConnectionRefused.into();
        drover_cache::Error::Io { act: format!("reach {}", self.name), source }
    }
}

impl Cache for MemoryCache {
    fn url(&self) -> String {
        format!("memory:{}", self.name)
    }

    fn narinfo(&self, path: &StorePath) -> Result<Option<NarInfo>, drover_cache::Error> {
        if self.unreachable {
            return Err(self.trouble());
        }
        if self.untrusted.contains(path) {
            let (url, path, why) = (self.url(), path.clone(), "no signature".into());
            return Err(drover_cache::Error::Untrusted { url, path, why });
        }
        Ok(self.paths.lock().unwrap().get(path).map(|(info, _)| NarInfo {
            info: info.clone(),
            url: "x".into(),
            compression: Compression::None,
            file_hash: None,
            file_size: None,
        }))
    }

    fn nar(&self, narinfo: &NarInfo) -> Result<Box<dyn Read + Send>, drover_cache::Error> {
        if self.hollow {
            return Err(drover_cache::Error::MissingNar { url: self.url() });
        }
        let bytes = self.paths.lock().unwrap()[&narinfo.info.path].1.clone();
        Ok(match self.breaks_at {
            None => Box::new(io::Cursor::new(bytes)),
            Some(at) => Box::new(io::Cursor::new(bytes).take(at).chain(Broken)),
        })
    }

    fn put(&self, info: &PathInfo, nar: &SpooledNar) -> Result<Stored, drover_cache::Error> {
        if self.unreachable {
            return Err(self.trouble());
        }
        if let Some(narinfo) = self.narinfo(&info.path)? {
            return Ok(Stored::Already(Box::new(narinfo)));
        }
        let mut bytes = Vec::new();
        nar.open_nar()?.read_to_end(&mut bytes).unwrap();
        self.stored.lock().unwrap().push(info.path.clone());
        self.paths.lock().unwrap().insert(info.path.clone(), (info.clone(), bytes));
        Ok(Stored::New)
    }

    fn put_log(&self, _drv_path: &StorePath, _log: &mut dyn Read) -> Result<(), drover_cache::Error> {
        Ok(())
    }

    fn log(&self, _drv_path: &StorePath) -> Result<Option<Box<dyn Read + Send>>, drover_cache::Error> {
        Ok(None)
    }
}

struct Broken;

impl Read for Broken {
    fn read(&mut self, _buffer: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

/// TOOL needs LIBC, and both are in one cache; SOURCE is in another.
struct World {
    binaries: MemoryCache,
    sources: MemoryCache,
    push: MemoryCache,
    store: MemoryStore,
    derivation: BasicDerivation,
    trust: Trust,
    max_output_bytes: Option<u64>,
    key: Option<SecretKey>,
}

impl World {
    fn new() -> Self {
        let named = |name: &str| MemoryCache { name: name.into(), ..MemoryCache::default() };
        let (binaries, sources) = (named("binaries"), named("sources"));
        binaries.insert(TOOL, &[TOOL, LIBC]);
        binaries.insert(LIBC, &[]);
        sources.insert(SOURCE, &[]);
        let mut store = MemoryStore::default();
        store.builder = Some(Box::new(|store, _, derivation, _| build(store, derivation)));
        Self {
            binaries,
            sources,
            push: named("push"),
            store,
            derivation: derivation(),
            trust: Trust::Verified,
            max_output_bytes: None,
            key: None,
        }
    }

    /// Replaces what the builder does.
    fn builder(
        &mut self,
        mut build: impl FnMut(&mut MemoryStore, &BasicDerivation) -> BuildResult + Send + 'static,
    ) {
        self.store.builder = Some(Box::new(move |store, _, derivation, _| build(store, derivation)));
    }

    fn run(self) -> Ran {
        let Self { binaries, sources, push, mut store, derivation, trust, max_output_bytes, key } = self;
        let dir = StoreDir::default();
        let (push, spool) = (Arc::new(push), tempfile::tempdir().unwrap());
        let mut job = Job {
            drv_path: drv_path_of(&dir, &derivation).unwrap(),
            dir,
            derivation,
            options: BuildOptions::default(),
            caches: vec![Arc::new(binaries), Arc::new(sources)],
            push: Some(push.clone()),
            signing_key: key.map(Arc::new),
            trust,
            proven: Arc::default(),
            max_output_bytes,
            spool_dir: spool.path().to_owned(),
            kept: Arc::default(),
        };
        let (server_input, output) = pipe().unwrap();
        let (input, server_output) = pipe().unwrap();
        let server = thread::spawn(move || {
            let result = serve(server_input, server_output, &mut store, &StoreDir::default(), true);
            (store, result.is_ok())
        });
        let mut events = Vec::new();
        let mut tally = Tally::default();
        let result = run_counting(input, output, &job, &mut |event| events.push(event), &mut tally);
        let (store, clean) = server.join().unwrap();
        // What is kept for another session goes with that.
        drop(std::mem::take(&mut job.kept));
        assert_eq!(std::fs::read_dir(spool.path()).unwrap().count(), 0, "nothing is left behind");
        Ran { result, store, push, events, clean, job, tally }
    }
}

struct Ran {
    result: Result<Outcome, Failure>,
    store: MemoryStore,
    push: Arc<MemoryCache>,
    events: Vec<Event>,
    /// Whether the server saw an orderly end.
    clean: bool,
    job: Job,
    tally: Tally,
}

impl Ran {
    fn reason(&self) -> (Reason, bool) {
        let failure = self.result.as_ref().unwrap_err();
        assert!(self.push.stored.lock().unwrap().is_empty(), "a failure stores nothing");
        (failure.reason, failure.infrastructure)
    }

    fn message(&self) -> String {
        self.result.as_ref().unwrap_err().to_string()
    }
}

/// `out` refers to `dev` and to LIBC, and their paths are proven by the derivation.
fn derivation() -> BasicDerivation {
    let name = |name: &str| name.parse::<OutputName>().unwrap();
    let mut derivation = BasicDerivation {
        name: "hello".into(),
        outputs: [(name("out"), DerivationOutput::Deferred), (name("dev"), DerivationOutput::Deferred)]
            .into(),
        input_srcs: [path(TOOL), path(SOURCE)].into(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: Vec::new(),
        env: [("dev".into(), "".into()), ("out".into(), "".into())].into(),
    };
    let dir = StoreDir::default();
    // Computing paths needs outputs of the right kind, whatever their paths.
    for output in derivation.outputs.values_mut() {
        *output = DerivationOutput::InputAddressed(path(OTHER));
    }
    for (name, path) in modulo::basic_output_paths(&dir, &derivation).unwrap() {
        derivation.env.insert(name.as_str().into(), dir.full(&path).into());
        derivation.outputs.insert(name, DerivationOutput::InputAddressed(path));
    }
    derivation
}

/// One with a single output.
fn single(output: DerivationOutput) -> BasicDerivation {
    BasicDerivation { outputs: [(OutputName::out(), output)].into(), ..derivation() }
}

fn fixed(method: Method, content: &[u8]) -> DerivationOutput {
    DerivationOutput::CaFixed(ContentAddress { method, hash: Hash::from(Sha256::of(content)) })
}

fn success(outputs: &[(&OutputName, &StorePath)]) -> BuildResult {
    let output = |path: &StorePath| BuiltOutput { path: path.clone(), signatures: Vec::new() };
    BuildResult {
        times_built: 1,
        start_time: 100,
        stop_time: 107,
        built_outputs: outputs.iter().map(|(name, path)| ((*name).clone(), output(path))).collect(),
        ..BuildResult::new(BuildStatus::Built)
    }
}

/// What an honest builder does with `derivation()`.
fn build(store: &mut MemoryStore, derivation: &BasicDerivation) -> BuildResult {
    for input in &derivation.input_srcs {
        assert!(store.paths.contains_key(input), "{input} must be there when the build starts");
    }
    let paths = derivation.output_paths(&StoreDir::default()).unwrap();
    let (dev, out) = (paths["dev"].clone().unwrap(), paths["out"].clone().unwrap());
    store.insert(dev.clone(), &[], file_nar(b"headers"));
    let text = format!("{out} links {LIBC} and {dev}");
    store.insert(out.clone(), &[&dev, &out, &path(LIBC)], file_nar(text.as_bytes()));
    success(&paths.iter().map(|(name, path)| (name, path.as_ref().unwrap())).collect::<Vec<_>>())
}

/// Puts one output with this content where the derivation wants it, or, if it does not say, at `otherwise`.
fn build_single(
    content: &'static [u8],
    otherwise: &'static str,
) -> impl FnMut(&mut MemoryStore, &BasicDerivation) -> BuildResult {
    move |store, derivation| {
        let known = derivation.output_paths(&StoreDir::default()).unwrap()["out"].clone();
        let out = known.unwrap_or_else(|| path(otherwise));
        store.insert(out.clone(), &[], file_nar(content));
        success(&[(&OutputName::out(), &out)])
    }
}

#[test]
fn one_build_from_end_to_end() {
    let mut world = World::new();
    world.key = Some(SecretKey::from_seed("test-1", &[7; 32]).unwrap());
    let public = SecretKey::from_seed("test-1", &[7; 32]).unwrap().public();
    let ran = world.run();
    let outcome = ran.result.as_ref().unwrap();
    assert!(ran.clean);

    // Locked as a whole before anything was copied; copied with references first.
    let closure: BTreeSet<StorePath> = [LIBC, TOOL, SOURCE].map(path).into();
    assert_eq!(ran.store.locked, closure);
    let calls: Vec<&str> = ran.store.calls.iter().map(String::as_str).collect();
    assert_eq!(calls[0], "query-valid-paths lock=true substitute=false");
    assert_eq!(calls[1], "query-valid-paths lock=false substitute=true");
    let position = |call: &str| calls.iter().position(|item| *item == call).unwrap();
    assert!(position(&format!("add-nar {LIBC}")) < position(&format!("add-nar {TOOL}")));
    assert_eq!(position(&format!("build-derivation {}", ran.job.drv_path)), 5);

    assert_eq!(outcome.transfer.paths_total, 3);
    assert_eq!((outcome.transfer.paths_present, outcome.transfer.paths_sent), (0, 3));
    let out = &outcome.outputs["out"];
    let dev = &outcome.outputs["dev"];
    assert_eq!(out.references, [out.path.clone(), dev.path.clone(), path(LIBC)].into());
    let built = outcome.built.as_ref().unwrap();
    assert_eq!((built.start_time, built.stop_time), (100, 107));

    // In the cache: references first, signed, with the deriver.
    assert_eq!(*ran.push.stored.lock().unwrap(), [dev.path.clone(), out.path.clone()]);
    let stored = ran.push.paths.lock().unwrap();
    let (info, nar) = &stored[&out.path];
    assert_eq!((info.nar_hash, out.nar_hash), (Sha256::of(nar), Sha256::of(nar)));
    assert_eq!(info.deriver.as_ref(), Some(&ran.job.drv_path));
    assert!(public.verify(info.fingerprint(&StoreDir::default()).as_bytes(), &out.signatures[0]));
    drop(stored);

    // What an observer hears, in order.
    let names: Vec<String> = ran
        .events
        .iter()
        .map(|event| {
            let text = format!("{event:?}");
            text[..text.find(|c: char| !c.is_alphanumeric()).unwrap_or(text.len())].to_owned()
        })
        .collect();
    let expected = [
        "Connected",
        "ClosureComputed",
        "Locked",
        "FetchStarted",
        "Fetched",
        "CopyStarted",
        "Copied",
        "CopyStarted",
        "Copied",
        "CopyStarted",
        "Copied",
        "InputsCopied",
        "BuildStarted",
        "Built",
        "OutputStarted",
        "OutputReceived",
        "OutputStarted",
        "OutputReceived",
        "OutputsVerified",
        "OutputStored",
        "OutputStored",
        "OutputsCollected",
    ];
    assert_eq!(names, expected);

    // And now nobody needs a builder any more.
    let again = all_outputs_in_cache(&ran.job).unwrap().unwrap();
    assert_eq!(again.outputs, outcome.outputs);
    assert!(again.built.is_none());
}

#[test]
fn what_the_builder_has_is_not_sent() {
    let mut world = World::new();
    world.store.insert(path(LIBC), &[], file_nar(b"libc"));
    let nar = file_nar(format!("contents of {TOOL}").as_bytes());
    let info = info_of(path(TOOL), &[&path(LIBC), &path(TOOL)], &nar);
    let size = info.nar_size;
    world.store.substitutable.insert(path(TOOL), (info, nar));
    let ran = world.run();
    let transfer = ran.result.as_ref().unwrap().transfer;
    assert_eq!((transfer.paths_total, transfer.paths_present, transfer.paths_sent), (3, 1, 1));
    assert_eq!((transfer.paths_fetched, transfer.bytes_fetched), (1, size));
    assert!(!ran.store.calls.iter().any(|call| call.ends_with(TOOL) && call.starts_with("add")));
}

#[test]
fn an_input_that_only_the_builder_has() {
    let mut world = World::new();
    world.sources.paths.lock().unwrap().clear();
    // Its own references count too, and those may be in a cache.
    world.store.insert(path(SOURCE), &[&path(LIBC)], file_nar(b"source"));
    let ran = world.run();
    let transfer = ran.result.as_ref().unwrap().transfer;
    assert_eq!((transfer.paths_present, transfer.paths_fetched), (1, 0));
    assert!(ran.store.paths.contains_key(&path(LIBC)));
}

/// Content that mentions an input, of which the builder says that it refers to nothing.
#[test]
fn references_are_discarded_where_the_derivation_says_so() {
    for (attributes, accepted) in [
        (r#"{"unsafeDiscardReferences":{"out":true}}"#, true),
        (r#"{"unsafeDiscardReferences":{"out":false}}"#, false),
        ("{}", false),
    ] {
        let mut world = World::new();
        world.derivation =
            single(DerivationOutput::CaFloating { method: Method::Flat, algo: HashAlgo::Sha256 });
        world.derivation.env.insert("__json".into(), attributes.into());
        let content = format!("see {LIBC}");
        let address =
            ContentAddress { method: Method::Flat, hash: Hash::from(Sha256::of(content.as_bytes())) };
        let out =
            address.store_path(&StoreDir::default(), &world.derivation.name, &[].into(), false).unwrap();
        let expected = out.clone();
        world.builder(move |store: &mut MemoryStore, _: &BasicDerivation| {
            store.insert(out.clone(), &[], file_nar(content.as_bytes()));
            success(&[(&OutputName::out(), &out)])
        });
        let ran = world.run();
        if accepted {
            let outcome = ran.result.as_ref().unwrap();
            assert_eq!(
                (&outcome.outputs["out"].path, outcome.outputs["out"].references.len()),
                (&expected, 0)
            );
            assert!(ran.push.paths.lock().unwrap()[&expected].0.references.is_empty());
        } else {
            assert_eq!(ran.reason().0, Reason::OutputHashMismatch, "{attributes}");
        }
    }
}

#[test]
fn missing_inputs_are_named_all_of_them() {
    let world = World::new();
    world.sources.paths.lock().unwrap().clear();
    world.binaries.paths.lock().unwrap().remove(&path(LIBC));
    let ran = world.run();
    assert_eq!(ran.reason(), (Reason::InputMissing, false));
    let message = ran.message();
    for part in [LIBC, SOURCE, "memory:binaries", "memory:sources"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(!ran.store.calls.iter().any(|call| call.starts_with("build")));
}

#[test]
fn a_cache_that_cannot_be_asked_gives_no_verdict() {
    let mut world = World::new();
    world.sources.unreachable = true;
    assert_eq!(world.run().reason(), (Reason::InfrastructureFailure, true));
    // But what another one has is good enough.
    let mut world = World::new();
    world.sources.unreachable = true;
    world.binaries.insert(SOURCE, &[]);
    world.run().result.unwrap();
}

#[test]
fn inputs_that_nobody_vouches_for() {
    let mut world = World::new();
    world.sources.untrusted.insert(path(SOURCE));
    let ran = world.run();
    assert_eq!(ran.reason(), (Reason::InputMissing, false));
    assert!(ran.message().contains("no signature"));
    // Another cache that cannot be asked might have had a trusted one.
    let mut world = World::new();
    world.sources.untrusted.insert(path(SOURCE));
    world.binaries.unreachable = true;
    assert_eq!(world.run().reason(), (Reason::InfrastructureFailure, true));
}

/// Before there is a builder that could be asked.
#[test]
fn inputs_that_no_cache_has() {
    let missing = |world: World| missing_inputs(&world.run().job);
    assert_eq!(missing(World::new()), MissingInputs::default());
    let world = World::new();
    world.sources.paths.lock().unwrap().clear();
    world.binaries.paths.lock().unwrap().remove(&path(LIBC));
    // Only of inputs; what they refer to is the session's business.
    let found = missing(world);
    assert_eq!((found.absent, found.unknown), (BTreeSet::from([path(SOURCE)]), BTreeSet::new()));
    for spoil in [
        |world: &mut World| world.sources.unreachable = true,
        |world: &mut World| world.sources.untrusted = BTreeSet::from([path(SOURCE)]),
    ] {
        let mut world = World::new();
        spoil(&mut world);
        let found = missing(world);
        assert_eq!((found.absent, found.unknown), (BTreeSet::new(), BTreeSet::from([path(SOURCE)])));
        assert!(found.trouble.is_some());
    }
}

#[test]
fn a_cache_that_lost_a_nar() {
    let mut world = World::new();
    world.binaries.hollow = true;
    assert_eq!(world.run().reason(), (Reason::InfrastructureFailure, true));
    let mut world = World::new();
    world.binaries.hollow = true;
    world.sources.insert(LIBC, &[]);
    world.sources.insert(TOOL, &[TOOL, LIBC]);
    world.run().result.unwrap();
}

#[test]
fn an_output_that_the_cache_has_already() {
    let world = World::new();
    let paths = world.derivation.output_paths(&StoreDir::default()).unwrap();
    let dev = paths["dev"].clone().unwrap();
    let nar = file_nar(b"other headers");
    world.push.paths.lock().unwrap().insert(dev.clone(), (info_of(dev, &[], &nar), nar.clone()));
    let ran = world.run();
    let outcome = ran.result.as_ref().unwrap();
    assert_eq!(outcome.outputs["dev"].nar_hash, Sha256::of(&nar), "what the cache has counts");
    assert_eq!(ran.push.stored.lock().unwrap().len(), 1);
}

#[test]
fn a_cache_with_other_content_at_a_path_that_follows_from_content() {
    let mut world = World::new();
    world.derivation = single(fixed(Method::Flat, b"right"));
    world.builder(build_single(b"right", OTHER));
    let out = world.derivation.output_paths(&StoreDir::default()).unwrap()["out"].clone().unwrap();
    let nar = file_nar(b"wrong");
    world.push.paths.lock().unwrap().insert(out.clone(), (info_of(out, &[], &nar), nar));
    let ran = world.run();
    assert_eq!(ran.reason(), (Reason::InfrastructureFailure, true));
    assert!(ran.message().contains("delete it"), "{}", ran.message());
}

#[test]
fn a_cache_that_delivers_something_else() {
    let good = file_nar(format!("contents of {SOURCE}").as_bytes());
    let mut other = good.clone();
    *other.iter_mut().find(|byte| **byte == b'c').unwrap() = b'C';
    for bytes in [other, good[..good.len() - 8].to_vec(), [good.as_slice(), &[0; 8]].concat(), Vec::new()] {
        let world = World::new();
        world.sources.corrupt(SOURCE, bytes);
        let ran = world.run();
        assert_eq!(ran.reason(), (Reason::InputHashMismatch, false));
        let message = ran.message();
        assert!(message.contains(SOURCE) && message.contains("memory:sources"), "{message}");
        assert!(!ran.store.paths.contains_key(&path(SOURCE)));
    }
}

#[test]
fn a_cache_that_breaks_off() {
    let mut world = World::new();
    world.binaries.breaks_at = Some(50);
    let ran = world.run();
    assert_eq!(ran.reason(), (Reason::InfrastructureFailure, true));
    assert!(ran.message().contains("memory:binaries"));
    // It broke off before anything of it had gone to the builder.
    assert!(ran.clean && ran.store.paths.is_empty());
}

#[test]
fn a_build_that_fails() {
    let mut world = World::new();
    world.builder(|_, _| BuildResult::failure(BuildStatus::PermanentFailure, "exit code 3"));
    let ran = world.run();
    assert_eq!(ran.reason(), (Reason::BuildFailed, false));
    // What came before has been done, and what would have come behind it has not.
    let Tally { transfer, timings } = ran.tally;
    assert!(
        transfer.paths_sent == 3 && transfer.bytes_sent > 0 && transfer.bytes_received == 0,
        "{transfer:?}"
    );
    assert!(!timings.copy_in.is_zero() && !timings.build.is_zero() && timings.store.is_zero(), "{timings:?}");
    assert!(ran.message().contains("exit code 3"));
}

#[test]
fn a_builder_that_goes_away() {
    let world = World::new();
    let dir = StoreDir::default();
    let job = Job {
        drv_path: drv_path_of(&dir, &world.derivation).unwrap(),
        dir,
        derivation: world.derivation,
        options: BuildOptions::default(),
        caches: vec![Arc::new(world.binaries), Arc::new(world.sources)],
        push: None,
        signing_key: None,
        trust: Trust::Verified,
        proven: Arc::default(),
        max_output_bytes: None,
        spool_dir: std::env::temp_dir(),
        kept: Arc::default(),
    };
    // A server's half of the whole conversation, recorded by letting it run over memory, cut off anywhere.
    for len in [0, 8, 16, 20] {
        let greeting = [0x5452_eecb_u64.to_le_bytes(), 0x207_u64.to_le_bytes(), [0; 8]].concat();
        let failure = run(&greeting[..len], io::sink(), &job, &mut |_| {}).unwrap_err();
        assert_eq!((failure.reason, failure.infrastructure), (Reason::ConnectionLost, true));
    }
}

#[test]
fn a_builder_that_lies_about_its_outputs() {
    type Lie = fn(&mut MemoryStore, &StorePath);
    let lies: [(Lie, Reason); 6] = [
        (
            |store, out| store.paths.get_mut(out).unwrap().0.nar_hash = Sha256::of(b""),
            Reason::OutputHashMismatch,
        ),
        (|store, out| store.paths.get_mut(out).unwrap().0.nar_size += 8, Reason::OutputHashMismatch),
        (|store, out| store.paths.get_mut(out).unwrap().0.nar_size -= 8, Reason::OutputHashMismatch),
        (|store, out| store.paths.get_mut(out).unwrap().0.references.clear(), Reason::OutputHashMismatch),
        (
            |store, out| {
                store.paths.get_mut(out).unwrap().0.references.insert(path(SOURCE));
            },
            Reason::OutputHashMismatch,
        ),
        (
            |store, out| {
                store.paths.remove(out);
            },
            Reason::OutputRejected,
        ),
    ];
    for (number, (lie, reason)) in lies.into_iter().enumerate() {
        let mut world = World::new();
        world.builder(move |store, derivation| {
            let result = build(store, derivation);
            lie(store, &result.built_outputs["out"].path);
            result
        });
        assert_eq!(world.run().reason(), (reason, false), "lie {number}");
    }
}

#[test]
fn a_reference_to_something_that_was_no_input() {
    let mut world = World::new();
    world.builder(|store, derivation| {
        let result = build(store, derivation);
        let out = result.built_outputs["out"].path.clone();
        store.insert(path(OTHER), &[], file_nar(b"other"));
        store.insert(out, &[&path(OTHER)], file_nar(OTHER.as_bytes()));
        result
    });
    let ran = world.run();
    assert_eq!(ran.reason(), (Reason::OutputRejected, false));
    assert!(ran.message().contains(OTHER));
}

#[test]
fn outputs_that_are_too_large() {
    let mut world = World::new();
    world.max_output_bytes = Some(200);
    assert_eq!(world.run().reason(), (Reason::OutputSizeLimitExceeded, false));
}

#[test]
fn a_cache_that_takes_nothing() {
    let mut world = World::new();
    world.push.unreachable = true;
    assert_eq!(world.run().reason(), (Reason::InfrastructureFailure, true));
}

#[test]
fn fixed_outputs() {
    for (output, good) in [
        (fixed(Method::Flat, b"right"), true),
        (fixed(Method::Nar, &file_nar(b"right")), true),
        (fixed(Method::Flat, b"wrong"), false),
        (fixed(Method::Nar, &file_nar(b"wrong")), false),
    ] {
        let mut world = World::new();
        world.derivation = single(output.clone());
        world.builder(build_single(b"right", OTHER));
        let ran = world.run();
        match good {
            true => {
                let outcome = ran.result.unwrap();
                let DerivationOutput::CaFixed(address) = output else { unreachable!() };
                assert_eq!(outcome.outputs["out"].ca, Some(address));
            }
            false => assert_eq!(ran.reason(), (Reason::OutputHashMismatch, false)),
        }
    }
}

#[test]
fn floating_outputs() {
    let output = DerivationOutput::CaFloating { method: Method::Flat, algo: HashAlgo::Sha256 };
    let address = ContentAddress { method: Method::Flat, hash: Hash::from(Sha256::of(b"content")) };
    let at = address.store_path(&StoreDir::default(), "hello", &[].into(), false).unwrap();
    for honest in [true, false] {
        let mut world = World::new();
        world.derivation = single(output.clone());
        let place = if honest { at.clone() } else { path(OTHER) };
        world.builder(move |store, _| {
            store.insert(place.clone(), &[], file_nar(b"content"));
            success(&[(&OutputName::out(), &place)])
        });
        let ran = world.run();
        match honest {
            true => assert_eq!(ran.result.unwrap().outputs["out"].path, at),
            false => assert_eq!(ran.reason(), (Reason::OutputRejected, false)),
        }
    }
}

#[test]
fn nothing_is_believed_of_a_floating_output() {
    let dir = StoreDir::default();
    let address = |method, algo, hash: Hash| {
        assert_eq!(hash.algo, algo);
        ContentAddress { method, hash }
    };
    let nar = file_nar(LIBC.as_bytes());
    let good = address(Method::Nar, HashAlgo::Sha256, Sha256::of(&nar).into());
    let flat = address(Method::Flat, HashAlgo::Sha256, Sha256::of(LIBC.as_bytes()).into());
    let refers = BTreeSet::from([path(LIBC)]);
    let at = |address: &ContentAddress, name: &str, references: &BTreeSet<StorePath>| {
        address.store_path(&dir, name, references, false).unwrap()
    };
    // Where the builder says that the output is, and what it says that the output refers to.
    for (place, said, expected) in [
        (at(&good, "hello", &refers), &[LIBC][..], None),
        (at(&good, "other", &refers), &[LIBC], Some(Reason::OutputRejected)),
        (at(&good, "hello", &BTreeSet::new()), &[LIBC], Some(Reason::OutputRejected)),
        (at(&good, "hello", &BTreeSet::new()), &[], Some(Reason::OutputHashMismatch)),
        (at(&good, "hello", &refers), &[LIBC, TOOL], Some(Reason::OutputHashMismatch)),
        (at(&flat, "hello", &BTreeSet::new()), &[LIBC], Some(Reason::OutputRejected)),
    ] {
        let mut world = World::new();
        world.derivation =
            single(DerivationOutput::CaFloating { method: Method::Nar, algo: HashAlgo::Sha256 });
        let (there, content) = (place.clone(), nar.clone());
        let references: Vec<StorePath> = said.iter().map(|base| path(base)).collect();
        world.builder(move |store, _| {
            store.insert(there.clone(), &references.iter().collect::<Vec<_>>(), content.clone());
            success(&[(&OutputName::out(), &there)])
        });
        let ran = world.run();
        match expected {
            None => assert_eq!(ran.result.unwrap().outputs["out"].ca, Some(good.clone())),
            Some(reason) => assert_eq!(ran.reason(), (reason, false), "{place} {said:?}"),
        }
    }
}

#[test]
fn content_with_its_own_path_is_not_swapped() {
    let dir = StoreDir::default();
    // Where content that refers to itself twice belongs, by either rule, and content with zeros in one of the places.
    let own = path("i00sflxqsj37lfmf95m8mn0grv615hpj-hello");
    let nar = |own: &StorePath, first: &str| file_nar(format!("{first} and {}", own.hash_part()).as_bytes());
    let mut hasher = HashModulo::new(&own, HashAlgo::Sha256);
    hasher.write_all(&nar(&own, own.hash_part())).unwrap();
    let hashes = hasher.finish();
    let zeros = "\0".repeat(32);
    for (hash, trust, swapped, expected) in [
        (&hashes.with_offsets, Trust::Verified, false, None),
        (&hashes.with_offsets, Trust::Verified, true, Some(Reason::OutputRejected)),
        (&hashes.with_offsets, Trust::Claimed, true, Some(Reason::OutputRejected)),
        (&hashes.without_offsets, Trust::Verified, false, Some(Reason::OutputRejected)),
        (&hashes.without_offsets, Trust::Verified, true, Some(Reason::OutputRejected)),
        (&hashes.without_offsets, Trust::Claimed, false, None),
        // What Claimed believes, and why Verified does not.
        (&hashes.without_offsets, Trust::Claimed, true, None),
    ] {
        let address = ContentAddress { method: Method::Nar, hash: hash.clone() };
        let place = address.store_path(&dir, "hello", &[].into(), true).unwrap();
        let content = nar(&place, if swapped { &zeros } else { place.hash_part() });
        let mut world = World::new();
        world.trust = trust;
        world.derivation =
            single(DerivationOutput::CaFloating { method: Method::Nar, algo: HashAlgo::Sha256 });
        world.builder(move |store, _| {
            store.insert(place.clone(), &[&place], content.clone());
            success(&[(&OutputName::out(), &place)])
        });
        let ran = world.run();
        match expected {
            None => drop(ran.result.unwrap()),
            Some(reason) => assert_eq!(ran.reason(), (reason, false), "{hash} {trust:?} {swapped}"),
        }
    }
}

#[test]
fn paths_that_nothing_proves() {
    let claimed = || single(DerivationOutput::InputAddressed(path(OTHER)));
    let mut world = World::new();
    world.derivation = claimed();
    let ran = world.run();
    assert_eq!(ran.reason(), (Reason::PathNotProven, false));
    assert!(ran.store.calls.is_empty(), "nobody is asked");
    let mut world = World::new();
    world.derivation = BasicDerivation { name: "other".into(), ..claimed() };
    world.trust = Trust::Claimed;
    world.builder(build_single(b"x", OTHER));
    assert_eq!(world.run().result.unwrap().outputs["out"].path, path(OTHER));
}

#[test]
fn derivations_that_nobody_can_build() {
    for derivation in
        [single(DerivationOutput::Deferred), BasicDerivation { outputs: BTreeMap::new(), ..derivation() }]
    {
        let mut world = World::new();
        world.trust = Trust::Claimed;
        world.derivation = derivation;
        assert_eq!(world.run().reason(), (Reason::InvalidDerivation, false));
    }
}
