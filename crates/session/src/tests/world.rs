//! The doubles: a builder and caches in memory, and derivations for them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, pipe};
use std::sync::{Arc, Mutex};
use std::thread;

use drover_cache::{Cache, SpooledNar, Stored};
use drover_nix::derivation::modulo;
use drover_nix::narinfo::Compression;
use drover_nix::signature::SecretKey;
use drover_nix::{
    BasicDerivation, ContentAddress, DerivationOutput, Hash, Method, NarInfo, OutputName, PathInfo, Sha256,
    StoreDir, StorePath,
};
use drover_serve::testing::{MemoryStore, file_nar, info_of};
use drover_serve::{BuildOptions, BuildResult, BuildStatus, BuiltOutput, serve};

use crate::*;

pub(super) const LIBC: &str = "f8g8x4m83da3b2f79iv84q2r3qlc58lr-libc";
pub(super) const TOOL: &str = "i00sflxqsj37lfmf95m8mn0grv615hpj-tool";
pub(super) const SOURCE: &str = "q4mzjdlh5px6977h7v5fdsk1p33yg583-source";
pub(super) const OTHER: &str = "8bazivnbipbyi569623skw5zm91z6kc2-other";

pub(super) fn path(base: &str) -> StorePath {
    base.parse().unwrap()
}

/// A cache in memory that can be made to misbehave.
#[derive(Default)]
pub(super) struct MemoryCache {
    pub(super) name: String,
    pub(super) paths: Mutex<BTreeMap<StorePath, (PathInfo, Vec<u8>)>>,
    /// Order in which paths were stored.
    pub(super) stored: Mutex<Vec<StorePath>>,
    pub(super) unreachable: bool,
    pub(super) untrusted: BTreeSet<StorePath>,
    /// Has narinfo files, but the NARs are gone.
    pub(super) hollow: bool,
    /// Fails after so many bytes of any NAR.
    pub(super) breaks_at: Option<u64>,
}

impl MemoryCache {
    pub(super) fn insert(&self, base: &str, references: &[&str]) {
        let references: Vec<StorePath> = references.iter().map(|base| path(base)).collect();
        let nar = file_nar(format!("contents of {base}").as_bytes());
        let info = info_of(path(base), &references.iter().collect::<Vec<_>>(), &nar);
        self.paths.lock().unwrap().insert(path(base), (info, nar));
    }

    pub(super) fn corrupt(&self, base: &str, bytes: Vec<u8>) {
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
pub(super) struct World {
    pub(super) binaries: MemoryCache,
    pub(super) sources: MemoryCache,
    pub(super) push: MemoryCache,
    pub(super) store: MemoryStore,
    pub(super) derivation: BasicDerivation,
    pub(super) trust: Trust,
    pub(super) max_output_bytes: Option<u64>,
    pub(super) key: Option<SecretKey>,
}

impl World {
    pub(super) fn new() -> Self {
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
    pub(super) fn builder(
        &mut self,
        mut build: impl FnMut(&mut MemoryStore, &BasicDerivation) -> BuildResult + Send + 'static,
    ) {
        self.store.builder = Some(Box::new(move |store, _, derivation, _| build(store, derivation)));
    }

    pub(super) fn run(self) -> Ran {
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

pub(super) struct Ran {
    pub(super) result: Result<Outcome, Failure>,
    pub(super) store: MemoryStore,
    pub(super) push: Arc<MemoryCache>,
    pub(super) events: Vec<Event>,
    /// Whether the server saw an orderly end.
    pub(super) clean: bool,
    pub(super) job: Job,
    pub(super) tally: Tally,
}

impl Ran {
    pub(super) fn reason(&self) -> (Reason, bool) {
        let failure = self.result.as_ref().unwrap_err();
        assert!(self.push.stored.lock().unwrap().is_empty(), "a failure stores nothing");
        (failure.reason, failure.infrastructure)
    }

    pub(super) fn message(&self) -> String {
        self.result.as_ref().unwrap_err().to_string()
    }
}

/// `out` refers to `dev` and to LIBC, and their paths are proven by the derivation.
pub(super) fn derivation() -> BasicDerivation {
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
pub(super) fn single(output: DerivationOutput) -> BasicDerivation {
    BasicDerivation { outputs: [(OutputName::out(), output)].into(), ..derivation() }
}

pub(super) fn fixed(method: Method, content: &[u8]) -> DerivationOutput {
    DerivationOutput::CaFixed(ContentAddress { method, hash: Hash::from(Sha256::of(content)) })
}

pub(super) fn success(outputs: &[(&OutputName, &StorePath)]) -> BuildResult {
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
pub(super) fn build(store: &mut MemoryStore, derivation: &BasicDerivation) -> BuildResult {
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
pub(super) fn build_single(
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
