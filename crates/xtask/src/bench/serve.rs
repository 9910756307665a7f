//! `cargo xtask bench serve`: the serve protocol on standard input and output, Drover's builder beside real Nix.
//!
//! Both sides get the same bytes from the same client on equal stores on one file system. They take turns within each
//! round, and who begins changes from round to round. Starting a server and making its store is not measured.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use drover_nix::hash::Sha256Hasher;
use drover_nix::{StoreDir, StorePath};

use super::client::Manner;
use super::data::{self, Object, Random, Sizes};
use super::server::{Program, Server};
use super::stats::{Row, Side, table};
use super::{Scratch, remove};
use crate::parts::rootfs::{self, Nix};
use crate::root::Root;
use crate::run;

/// What is measured, and how often.
#[derive(Clone, Debug)]
pub struct Options {
    pub rounds: usize,
    /// Names of cases, or how they begin; all if there is none.
    pub only: Vec<String>,
    /// Where the stores are; None for a tmpfs.
    pub dir: Option<PathBuf>,
    pub sizes: Sizes,
    /// The `drover-builder` to measure.
    pub builder: PathBuf,
}

/// The cases, in the order in which they run.
pub const CASES: [&str; 8] =
    ["large", "files", "paths", "query", "query-lock", "builds-1", "builds-4", "memory"];

/// What the builder may need while it imports 4 GiB, in bytes.
const MEMORY_LIMIT: u64 = 64 << 20;
/// Bytes of the archive that are made at a time, where it is too large to be kept.
const STREAM_PIECE: usize = 1 << 20;

/// Runs the cases and prints the table.
pub fn run(options: &Options) -> Result<()> {
    let report = measure(options)?;
    print!("{}", table("Nix 2.34", &report.rows));
    if let Some(peak) = report.memory {
        let verdict = if peak <= MEMORY_LIMIT { "within" } else { "beyond" };
        println!(
            "memory: {:.1} MiB at most while importing {:.1} GiB, {verdict} the {} MiB to keep to",
            peak as f64 / (1 << 20) as f64,
            options.sizes.memory as f64 / (1u64 << 30) as f64,
            MEMORY_LIMIT >> 20
        );
    }
    Ok(())
}

/// What was measured.
#[derive(Debug)]
pub struct Report {
    pub rows: Vec<Row>,
    /// Most memory of Drover's builder during the case `memory`, in bytes.
    pub memory: Option<u64>,
}

/// Runs the cases.
pub fn measure(options: &Options) -> Result<Report> {
    let wanted =
        |case: &str| options.only.is_empty() || options.only.iter().any(|only| case.starts_with(&**only));
    if let Some(unknown) =
        options.only.iter().find(|only| !CASES.iter().any(|case| case.starts_with(&***only)))
    {
        bail!("no case begins with {unknown:?}; there are {}", CASES.join(", "));
    }
    ensure!(options.rounds > 0, "at least one round is needed");
    let scratch = Scratch::new(options.dir.as_deref())?;
    let bench = Bench { options, dir: scratch.path() };
    let mut report = Report { rows: Vec::new(), memory: None };
    for case in CASES.into_iter().filter(|case| wanted(case)) {
        eprintln!("bench: {case}");
        match case {
            "large" => report.rows.extend(bench.transfer(case, &data::large(&options.sizes)?, 3.0)?),
            "files" => report.rows.extend(bench.transfer(case, &data::files(&options.sizes)?, 2.0)?),
            "paths" => report.rows.extend(bench.transfer(case, &data::paths(&options.sizes)?, 5.0)?),
            "query" => report.rows.push(bench.query(case, false)?),
            "query-lock" => report.rows.push(bench.query(case, true)?),
            "builds-1" => report.rows.push(bench.builds(case, 1, 2.0)?),
            "builds-4" => report.rows.push(bench.builds(case, 4, 3.0)?),
            _ => report.memory = Some(bench.memory()?),
        }
    }
    Ok(report)
}

struct Bench<'a> {
    options: &'a Options,
    dir: &'a Path,
}

impl Bench<'_> {
    /// Imports and exports the objects in each manner.
    fn transfer(&self, case: &str, objects: &[Object], reach: f64) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for manner in Manner::ALL {
            let row = |act, reach| Row {
                name: format!("{case} {act}, {}", manner.name()),
                theirs: Side::default(),
                ours: Side::default(),
                reach: Some(reach),
            };
            let (mut import, mut export) = (row("in", reach), row("out", 1.5));
            self.rounds(|program, ours| {
                let root = self.dir.join("store");
                let mut server = program.start(&root, Stdio::inherit())?;
                timed(side(&mut import, ours), &mut server, |s| s.client.import(objects, manner))?;
                timed(side(&mut export, ours), &mut server, |s| s.client.export(objects, manner))?;
                server.end()?;
                remove(&root)
            })?;
            rows.extend([import, export]);
        }
        Ok(rows)
    }

    /// Asks a store for paths of which it has every other one.
    fn query(&self, case: &str, lock: bool) -> Result<Row> {
        let paths = data::names(self.options.sizes.queried)?;
        let root = self.dir.join("store");
        let mut valid: Vec<&StorePath> = paths.iter().step_by(2).collect();
        valid.sort();
        register(&root, &valid)?;
        let mut asked = paths.clone();
        asked.sort();
        let mut row = Row {
            name: format!("{case}, {} paths", paths.len()),
            theirs: Side::default(),
            ours: Side::default(),
            reach: Some(5.0),
        };
        self.rounds(|program, ours| {
            let mut server = program.start(&root, Stdio::inherit())?;
            timed(side(&mut row, ours), &mut server, |s| {
                let count = s.client.query(&asked, lock)?;
                ensure!(count == valid.len() as u64, "{count} of {} paths are valid", valid.len());
                Ok(())
            })?;
            server.end()
        })?;
        remove(&root)?;
        Ok(row)
    }

    /// Trivial builds, shared among sessions that run at once on one store.
    fn builds(&self, case: &str, sessions: usize, reach: f64) -> Result<Row> {
        let derivations: Vec<_> =
            (0..self.options.sizes.builds).map(data::derivation).collect::<Result<_>>()?;
        let share = derivations.len().div_ceil(sessions).max(1);
        let mut row = Row {
            name: format!("{case}, {} builds", derivations.len()),
            theirs: Side::default(),
            ours: Side::default(),
            reach: Some(reach),
        };
        self.rounds(|program, ours| {
            let root = self.dir.join("store");
            let mut servers = (0..derivations.len().div_ceil(share))
                .map(|_| program.start(&root, Stdio::null()))
                .collect::<Result<Vec<_>>>()?;
            let side = side(&mut row, ours);
            let barrier = Barrier::new(servers.len());
            let before = servers.iter().map(Server::usage).collect::<Result<Vec<_>>>()?;
            let start = Instant::now();
            std::thread::scope(|scope| {
                let workers: Vec<_> = servers
                    .iter_mut()
                    .zip(derivations.chunks(share))
                    .map(|(server, derivations)| {
                        let barrier = &barrier;
                        scope.spawn(move || {
                            barrier.wait();
                            derivations.iter().try_for_each(|(path, drv)| server.client.build(path, drv))
                        })
                    })
                    .collect();
                workers.into_iter().try_for_each(|worker| match worker.join() {
                    Ok(result) => result,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
            })?;
            side.seconds.0.push(start.elapsed().as_secs_f64());
            let after = servers.iter().map(Server::usage).collect::<Result<Vec<_>>>()?;
            side.cpu.0.push(after.iter().zip(&before).map(|(after, before)| after.cpu - before.cpu).sum());
            side.peak = after.iter().map(|usage| usage.peak).fold(side.peak, u64::max);
            servers.into_iter().try_for_each(Server::end)?;
            remove(&root)
        })?;
        Ok(row)
    }

    /// Most memory of our builder while one very large file arrives.
    fn memory(&self) -> Result<u64> {
        let size = self.options.sizes.memory;
        // The archive of one file: what comes before the contents, the same piece again and again, what comes after.
        let piece = Random::new(5).bytes(STREAM_PIECE);
        let mut small = drover_nix::nar::Writer::new(Vec::new());
        small.file_bytes(false, &[0; 8])?;
        let small = small.finish()?;
        let (head, tail) = (&small[..small.len() - 32], &small[small.len() - 16..]);
        let count = size.div_ceil(STREAM_PIECE as u64);
        let size = count * STREAM_PIECE as u64;
        let head = [head, &size.to_le_bytes()].concat();
        let pieces = || {
            let middle = (0..count).map(|_| piece.clone());
            std::iter::once(head.clone()).chain(middle).chain(std::iter::once(tail.to_vec()))
        };
        let mut hasher = Sha256Hasher::new();
        pieces().for_each(|piece| hasher.update(&piece));
        let hash = hasher.finish();
        let path = data::name(hash, "memory", 0)?;
        let request = data::request(&path, hash, size + (head.len() + tail.len()) as u64);
        let root = self.dir.join("store");
        let mut server = Program::Drover(self.options.builder.clone()).start(&root, Stdio::inherit())?;
        server.client.import_stream(&request, pieces())?;
        let peak = server.usage()?.peak;
        server.end()?;
        remove(&root)?;
        Ok(peak)
    }

    /// Has both sides do the same, in turns. The flag says whether it is ours.
    fn rounds(&self, mut once: impl FnMut(&Program, bool) -> Result<()>) -> Result<()> {
        let programs = [(Program::Nix, false), (Program::Drover(self.options.builder.clone()), true)];
        for round in 0..self.options.rounds {
            for turn in 0..2 {
                let (program, ours) = &programs[(round + turn) % 2];
                once(program, *ours).with_context(|| format!("{program:?}"))?;
            }
        }
        Ok(())
    }
}

fn side(row: &mut Row, ours: bool) -> &mut Side {
    if ours { &mut row.ours } else { &mut row.theirs }
}

fn timed(side: &mut Side, server: &mut Server, act: impl FnOnce(&mut Server) -> Result<()>) -> Result<()> {
    let before = server.usage()?;
    let start = Instant::now();
    act(server)?;
    side.seconds.0.push(start.elapsed().as_secs_f64());
    let after = server.usage()?;
    side.cpu.0.push(after.cpu - before.cpu);
    side.peak = side.peak.max(after.peak);
    Ok(())
}

/// Makes a store whose database has these paths, by real Nix. Their files are nowhere: nobody asks for them.
fn register(root: &Path, paths: &[&StorePath]) -> Result<()> {
    let at = root.join("nix");
    std::fs::create_dir_all(&at)?;
    let mut text = String::new();
    for path in paths {
        let hash = drover_nix::Sha256::of(path.as_str().as_bytes()).to_hex();
        // Path, hash, size, no deriver, no references.
        text.push_str(&format!("{}\n{hash}\n120\n\n0\n", StoreDir::default().full(path)));
    }
    let mut command: Command = Root::new(rootfs::nix(Nix::V2_34)?).bind(&at, "/nix").command("nix-store")?;
    run::filter(command.arg("--load-db"), text.as_bytes()).map(drop)
}
