//! What collecting an output costs, by whoever compresses it: `cargo run --release -p drover-session --example collect --
//! FILE [ROUNDS]`.
//!
//! The file is the output's content; a library or a program, or many of them in a row, compresses as most outputs do. A whole
//! session over pipes receives it from a builder in memory and stores it in a cache in a directory, once compressed here
//! and once by the builder, in turns. Shown are the seconds from the build's end to the stored output, the processor time of
//! the thread that collects, and that of the whole program, which is both sides'.

use std::collections::BTreeSet;
use std::io::{self, Read, Write, pipe};
use std::sync::Arc;

use drover_cache::{CacheOptions, FrameWriter};
use drover_nix::{BasicDerivation, DerivationOutput, OutputName, PathInfo, Sha256, StoreDir, StorePath};
use drover_serve::testing::{MemoryStore, file_nar, info_of};
use drover_serve::{
    Backend, BoxError, BuildOptions, BuildResult, BuildStatus, BuiltOutput, ReceivedPath, serve,
};
use drover_session::{Job, Trust, drv_path_of, run};

/// Clock ticks a second in `/proc/*/stat`: the same on every Linux (USER_HZ).
const TICKS: f64 = 100.0;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let mut args = std::env::args_os().skip(1);
    let contents = std::fs::read(args.next().ok_or("name a file")?)?;
    let rounds: usize = args.next().map_or(Ok(5), |rounds| rounds.to_string_lossy().parse())?;
    let nar: Arc<[u8]> = file_nar(&contents).into();
    drop(contents);
    let mib = nar.len() as f64 / f64::from(1 << 20);
    println!("{mib:.0} MiB; seconds, MiB/s, CPU seconds of the operator, of both sides, size of the file");
    for _ in 0..rounds {
        for frames in [false, true] {
            let figures = round(&nar, frames)?;
            let by = if frames { "builder" } else { "operator" };
            let Figures { seconds, operator, all, size } = figures;
            println!(
                "compressed by the {by:<9} {seconds:>6.2} {:>6.0} {operator:>6.2} {all:>6.2} {:>5.1} %",
                mib / seconds,
                100.0 * size as f64 / nar.len() as f64
            );
        }
    }
    Ok(())
}

struct Figures {
    seconds: f64,
    operator: f64,
    all: f64,
    size: u64,
}

fn round(nar: &Arc<[u8]>, frames: bool) -> Outcome<Figures> {
    let dir = tempfile::tempdir()?;
    let out: StorePath = "i00sflxqsj37lfmf95m8mn0grv615hpj-x".parse()?;
    let derivation = BasicDerivation {
        name: "x".into(),
        outputs: [(OutputName::out(), DerivationOutput::InputAddressed(out.clone()))].into(),
        input_srcs: BTreeSet::new(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: Vec::new(),
        env: Default::default(),
    };
    let cache = dir.path().join("cache");
    std::fs::create_dir(&cache)?;
    let job = Job {
        dir: StoreDir::default(),
        drv_path: drv_path_of(&StoreDir::default(), &derivation)?,
        derivation,
        options: BuildOptions::default(),
        caches: Vec::new(),
        push: Some(drover_cache::open(&format!("file://{}", cache.display()), &CacheOptions::default())?),
        signing_key: None,
        trust: Trust::Claimed,
        proven: Arc::default(),
        max_output_bytes: None,
        spool_dir: dir.path().to_owned(),
        kept: Arc::default(),
    };
    let (server_input, output) = pipe()?;
    let (input, server_output) = pipe()?;
    let info = PathInfo { nar_hash: Sha256::of(nar), nar_size: nar.len() as u64, ..info_of(out, &[], b"") };
    let mut store = Store { inner: MemoryStore::default(), info, nar: Arc::clone(nar), frames };
    let server = std::thread::spawn(move || {
        serve(server_input, server_output, &mut store, &StoreDir::default(), true)
    });
    let (operator, all) = (cpu("thread-self")?, cpu("self")?);
    let outcome = run(input, output, &job, &mut |_| {})?;
    let (operator, all) = (cpu("thread-self")? - operator, cpu("self")? - all);
    server.join().map_err(|_| "the server panicked")??;
    let seconds = (outcome.timings.copy_out + outcome.timings.store).as_secs_f64();
    Ok(Figures { seconds, operator, all, size: outcome.transfer.bytes_stored })
}

/// Processor time so far, user and system, in seconds.
fn cpu(of: &str) -> Outcome<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{of}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').ok_or("no such file")?;
    let ticks: f64 =
        fields.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum();
    Ok(ticks / TICKS)
}

/// A builder with one output that compresses as `drover-builder` does, or not.
struct Store {
    inner: MemoryStore,
    info: PathInfo,
    nar: Arc<[u8]>,
    frames: bool,
}

impl Backend for Store {
    fn query_valid_paths(
        &mut self,
        paths: &BTreeSet<StorePath>,
        lock: bool,
        substitute: bool,
    ) -> Result<BTreeSet<StorePath>, BoxError> {
        self.inner.query_valid_paths(paths, lock, substitute)
    }

    fn path_info(&mut self, path: &StorePath) -> Result<Option<PathInfo>, BoxError> {
        Ok(Some(self.info.clone()).filter(|info| info.path == *path))
    }

    fn dump(&mut self, _path: &StorePath, nar: &mut dyn Write) -> Result<(), BoxError> {
        Ok(nar.write_all(&self.nar)?)
    }

    fn makes_frames(&self) -> bool {
        self.frames
    }

    fn dump_frames(
        &mut self,
        _path: &StorePath,
        _offset: u64,
        frames: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), BoxError> {
        let mut writer = FrameWriter::new(frames);
        writer.write_all(&self.nar)?;
        Ok(writer.finish()?)
    }

    fn add_nar(&mut self, path: ReceivedPath, nar: &mut dyn Read) -> Result<(), BoxError> {
        self.inner.add_nar(path, nar)
    }

    fn build_derivation(
        &mut self,
        _drv_path: &StorePath,
        _derivation: &BasicDerivation,
        _options: &BuildOptions,
    ) -> Result<BuildResult, BoxError> {
        let output = BuiltOutput { path: self.info.path.clone(), signatures: Vec::new() };
        let built_outputs = [(OutputName::out(), output)].into();
        Ok(BuildResult { built_outputs, ..BuildResult::new(BuildStatus::Built) })
    }

    fn query_closure(
        &mut self,
        paths: &BTreeSet<StorePath>,
        include_outputs: bool,
    ) -> Result<BTreeSet<StorePath>, BoxError> {
        self.inner.query_closure(paths, include_outputs)
    }
}
