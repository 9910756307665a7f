//! Fuzzing: builds the targets of `tests/fuzz` with coverage counters and runs libFuzzer on each.
//!
//! Works with the stable compiler: the flags below are what `cargo fuzz` asks of a nightly one, without its sanitizers.
//! The build has a directory of its own, `target/fuzz`, where inputs that reached something new (`corpus`) stay from run
//! to run. An input that breaks a target is written as text into `tests/fuzz/cases/TARGET/`, which the unit tests replay.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};

use crate::layers::Tally;
use crate::parts::host;
use crate::{development, limit, run};

/// Counters at every edge, and comparisons reported to libFuzzer, which then tries the other operand.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";
/// Fewer counters than this mean that the flags had no effect.
const MIN_COUNTERS: u64 = 2000;
/// An input that takes longer is a finding.
const TIMEOUT_SECONDS: u64 = 10;
/// libFuzzer's own tables included. The targets bound their memory more tightly themselves.
const RSS_LIMIT_MIB: u64 = 1024;
/// Longer inputs only slow it down: every limit that is larger has a test of its own.
const MAX_LEN: usize = 16 << 10;

/// What one run reached.
struct Reached {
    counters: u64,
    /// Edges that some input took.
    edges: u64,
    executions: u64,
    /// Inputs that were added because they reached something that no seed did.
    new_inputs: u64,
}

/// Runs one target, or all of them, `seconds` each, as many at a time as there are cores. A target that holds counts as a
/// test that passed.
pub fn run(target: Option<&str>, seconds: u64) -> Result<Tally> {
    let engine = build()?;
    let recordings = record()?;
    let known = run::stdout(&mut Command::new(&engine))?;
    let known: Vec<&str> = known.lines().collect();
    let targets = match target {
        None => known,
        Some(name) if known.contains(&name) => vec![name],
        Some(name) => bail!("there is no target {name}; the targets are {}", known.join(", ")),
    };
    let (queue, tally) = (Mutex::new(VecDeque::from(targets)), Mutex::new(Tally::default()));
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let cores = std::thread::available_parallelism()?.get();
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some(target) = next() {
                    let result = fuzz(&engine, target, seconds, &recordings);
                    let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
                    match result {
                        Ok(reached) => {
                            tally.passed += 1;
                            println!(
                                "fuzz {target} ... ok: {} executions, {} of {} edges, {} new inputs",
                                reached.executions, reached.edges, reached.counters, reached.new_inputs
                            );
                        }
                        Err(error) => {
                            tally.failed += 1;
                            println!("fuzz {target} ... FAILED: {error:#}");
                        }
                    }
                }
            });
        }
    });
    Ok(tally.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Sessions of real Nix clients with the builder, recorded just now.
fn record() -> Result<PathBuf> {
    let dir = directory().join("recordings");
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir_all(&dir)?;
    // It lives with the fixtures, which this crate cannot depend on.
    run::run(Command::new(development::compile()?.join("record")).arg(&dir))?;
    Ok(dir)
}

/// The program of all targets.
fn build() -> Result<PathBuf> {
    host::ensure(host::CXX_TOOLS)?;
    let version = run::stdout(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
    let dir = directory();
    let mut cargo = run::cargo();
    cargo.args(["build", "--quiet", "-p", "drover-fuzz", "--features", "engine", "--profile", "fuzz"]);
    // With a target named, build scripts and macros, which run outside libFuzzer, are compiled without the flags.
    cargo.args(["--target", host, "--target-dir"]).arg(&dir).env("RUSTFLAGS", COVERAGE);
    run::run(&mut cargo)?;
    Ok(dir.join(host).join("fuzz/drover-fuzz"))
}

fn directory() -> PathBuf {
    crate::checkout().join("target/fuzz")
}

fn fuzz(engine: &Path, target: &str, seconds: u64, recordings: &Path) -> Result<Reached> {
    let dir = |name: &str| directory().join(name).join(target);
    let [corpus, seeds, crashes] = ["corpus", "seeds", "crashes"].map(dir);
    for stale in [&seeds, &crashes] {
        if stale.exists() {
            fs::remove_dir_all(stale)?;
        }
    }
    [&corpus, &seeds, &crashes].into_iter().try_for_each(fs::create_dir_all)?;
    let mut command = Command::new(engine);
    command.env("DROVER_FUZZ_TARGET", target).env("DROVER_FUZZ_SEEDS", &seeds).env("RUST_BACKTRACE", "1");
    command.env("DROVER_FUZZ_RECORDINGS", recordings).env(limit::MARK, limit::mark());
    command.args([
        format!("-max_total_time={seconds}"),
        format!("-timeout={TIMEOUT_SECONDS}"),
        format!("-rss_limit_mb={RSS_LIMIT_MIB}"),
        format!("-max_len={MAX_LEN}"),
        format!("-artifact_prefix={}/", crashes.display()),
        "-print_final_stats=1".to_owned(),
    ]);
    let output = command.arg(&corpus).arg(&seeds).stdin(Stdio::null()).output().context("the engine")?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let kept = keep(target, &crashes)?;
        let why = said.lines().rev().take(60).collect::<Vec<_>>();
        let why = why.into_iter().rev().collect::<Vec<_>>().join("\n");
        bail!("{}; kept as {}\n{why}", output.status, kept.join(", "));
    }
    let reached =
        read(&said).with_context(|| format!("libFuzzer said nothing that is understood:\n{said}"))?;
    ensure!(reached.counters >= MIN_COUNTERS, "only {} counters: the flags have no effect", reached.counters);
    ensure!(reached.edges > 0 && reached.executions > 0, "no edge was taken:\n{said}");
    Ok(reached)
}

/// Writes what libFuzzer left of inputs that broke the target where the unit tests find it.
fn keep(target: &str, crashes: &Path) -> Result<Vec<String>> {
    let cases = crate::checkout().join("tests/fuzz/cases").join(target);
    let mut kept = Vec::new();
    for entry in fs::read_dir(crashes)? {
        let path = entry?.path();
        let name = path.file_name().context("entries have names")?.to_string_lossy().into_owned();
        let text: String = fs::read(&path)?.chunks(32).map(hex_line).collect();
        fs::create_dir_all(&cases)?;
        fs::write(cases.join(format!("{name}.hex")), text)?;
        kept.push(format!("tests/fuzz/cases/{target}/{name}.hex"));
    }
    Ok(kept)
}

fn hex_line(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n"
}

/// From `Loaded 1 modules   (18712 inline 8-bit counters)`, `#… DONE   cov: 512 …` and the final statistics.
fn read(said: &str) -> Option<Reached> {
    let line =
        |prefix: &str| said.lines().rev().find_map(|line| line.split_once(prefix).map(|(_, rest)| rest));
    let number = |text: &str| text.split_whitespace().next()?.parse().ok();
    let counters = line("Loaded 1 modules")?.trim().strip_prefix('(')?;
    Some(Reached {
        counters: number(counters)?,
        edges: number(line(" cov: ")?)?,
        executions: number(line("stat::number_of_executed_units:")?)?,
        new_inputs: number(line("stat::new_units_added:")?)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_prints() {
        let said = "INFO: Loaded 1 modules   (18712 inline 8-bit counters): 18712 [0x5, 0x9),\n\
            INFO: seed corpus: files: 1\n#2\tINITED cov: 300 ft: 301\n#9\tDONE   cov: 512 ft: 900 corp: 7/1Kb\n\
            stat::number_of_executed_units: 4321\nstat::new_units_added:          12\n";
        let reached = read(said).unwrap();
        assert_eq!((reached.counters, reached.edges), (18712, 512));
        assert_eq!((reached.executions, reached.new_inputs), (4321, 12));
        assert!(read("INFO: nothing\n").is_none());
    }
}
