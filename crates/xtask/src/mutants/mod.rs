//! Mutants: for each guard on the list, whether the test that is named for it fails when the guard is taken away.
//!
//! A test that passes says nothing of whether it could fail. So the sources are copied ([`copy`]), every named test is run
//! once as they are, and must pass; then one mutant at a time ([`list`]) is put in, must compile, and its test must fail.
//! Whatever else happens is a failure of the mutant: its old text is gone, it does not compile, the test does not exist, or
//! the test program ends without a word.

mod copy;
pub mod list;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::layers::Tally;
use crate::{checkout, run};
use copy::Copy;
use list::{Mutant, Program};

/// For a test program. One that hangs has not failed.
const LIMIT: Duration = Duration::from_secs(120);
/// Of how many runs of all layers together each tries a mutant: alone they take a quarter of an hour, and what a layer takes
/// of the hour and a half that all have, another does not get.
pub const TURNS: usize = 6;
/// Lines of what cargo or a test said that are shown where it should have said something else.
const SHOWN: usize = 30;

/// How a test program ended.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Ended {
    Counted(Tally),
    /// Without the line that says how many passed.
    Silently,
    /// It did not end.
    NotAtAll,
}

/// Tries all mutants, or those that `wanted` means: a part of a name, an invariant, or a package. With several `turns`, those
/// whose turn it is; the commit says whose.
pub fn run(wanted: Option<&str>, turns: usize) -> Result<Tally> {
    let checkout = checkout();
    let mut mutants = list::read(&checkout)?;
    mutants.retain(|mutant| wanted.is_none_or(|wanted| mutant.is_meant_by(wanted)));
    ensure!(
        !mutants.is_empty(),
        "no mutant is called {}, guards that or is tested there",
        wanted.unwrap_or_default()
    );
    // Beside each other what compiles alike.
    mutants.sort_by(|a, b| (&a.test.program, &a.file).cmp(&(&b.test.program, &b.file)));
    if turns > 1 {
        let (turn, all) = (turn(&checkout, turns)?, mutants.len());
        mutants = take_turn(mutants, turn, turns);
        println!(
            "== mutants: {} of {all}, turn {turn} of {turns}; `cargo xtask test mutants` tries all",
            mutants.len()
        );
    }
    let copy = Copy::make(&checkout)?;
    let mut tally = Tally::default();
    for group in mutants.chunk_by(|a, b| a.test.program == b.test.program) {
        let program = &group[0].test.program;
        let start = Instant::now();
        let broken = match broken_without(&copy, program, group) {
            Ok(broken) => broken,
            Err(error) => {
                println!("mutants of {} ... FAILED: {error:#}", program.arguments().join(" "));
                tally.failed += u64::try_from(group.len())?;
                continue;
            }
        };
        let took = start.elapsed().as_secs_f64();
        println!("== mutants: {} without any: {took:.0} s", program.arguments().join(" "));
        for mutant in group {
            let start = Instant::now();
            let result = match broken.get(mutant.test.name.as_str()) {
                Some(why) => Err(anyhow::anyhow!("{} {why} without the mutant", mutant.test.name)),
                None => attempt(&copy, mutant),
            };
            let took = start.elapsed().as_secs_f64();
            match result {
                Ok(()) => {
                    tally.passed += 1;
                    println!("mutant {} {} ... ok, {took:.0} s", mutant.guards, mutant.name);
                }
                Err(error) => {
                    tally.failed += 1;
                    println!("mutant {} {} ... FAILED, {took:.0} s: {error:#}", mutant.guards, mutant.name);
                }
            }
        }
    }
    Ok(tally)
}

/// From 0. Any commit is as good as another, and the same one has the same turn each time.
fn turn(checkout: &Path, turns: usize) -> Result<usize> {
    let commit = run::stdout(Command::new("git").current_dir(checkout).args(["rev-parse", "HEAD"]))?;
    let sum: usize = commit.trim().bytes().map(usize::from).sum();
    Ok(sum % turns)
}

/// Every so many'th of them, in their order.
fn take_turn(mutants: Vec<Mutant>, turn: usize, turns: usize) -> Vec<Mutant> {
    mutants.into_iter().skip(turn).step_by(turns).collect()
}

/// The tests of a group that do not pass as the sources are, and what becomes of each.
fn broken_without<'a>(
    copy: &Copy,
    program: &Program,
    group: &'a [Mutant],
) -> Result<BTreeMap<&'a str, &'static str>> {
    compile(copy, program)?;
    let names: BTreeSet<&str> = group.iter().map(|mutant| mutant.test.name.as_str()).collect();
    let all: Vec<&str> = names.iter().copied().collect();
    let good = |count: usize| Tally { passed: count as u64, failed: 0 };
    if test(copy, program, &all)?.0 == Ended::Counted(good(all.len())) {
        return Ok(BTreeMap::new());
    }
    // One at a time, to see which.
    let mut broken = BTreeMap::new();
    for name in names {
        let why = match test(copy, program, &[name])?.0 {
            Ended::Counted(tally) if tally == good(1) => continue,
            Ended::Counted(tally) if tally == good(0) => "does not exist",
            Ended::NotAtAll => "does not end",
            _ => "fails",
        };
        broken.insert(name, why);
    }
    Ok(broken)
}

/// Puts the mutant in, sees its test fail, and takes it out again.
fn attempt(copy: &Copy, mutant: &Mutant) -> Result<()> {
    let file = copy.sources.join(&mutant.file);
    let text = fs::read_to_string(&file).with_context(|| format!("could not read {}", mutant.file))?;
    let mutated = mutant.apply(&text)?;
    fs::write(&file, mutated)?;
    let result = try_mutated(copy, mutant);
    fs::write(&file, text)?;
    result
}

fn try_mutated(copy: &Copy, mutant: &Mutant) -> Result<()> {
    compile(copy, &mutant.test.program)?;
    let (ended, said) = test(copy, &mutant.test.program, &[&mutant.test.name])?;
    match ended {
        Ended::Counted(Tally { passed: 0, failed: 1 }) => Ok(()),
        Ended::Counted(Tally { passed: 0, failed: 0 }) => bail!("there is no test {}", mutant.test.name),
        Ended::Counted(_) => bail!("{} passes with it: nothing guards this", mutant.test.name),
        Ended::NotAtAll => bail!("{} does not end within {} s", mutant.test.name, LIMIT.as_secs()),
        Ended::Silently => bail!("{} ends without a verdict:\n{said}", mutant.test.name),
    }
}

fn compile(copy: &Copy, program: &Program) -> Result<()> {
    let mut cargo = copy.cargo();
    cargo.args(["test", "--quiet", "--no-run"]).args(program.arguments());
    // Its warnings are of no interest: a guard that is gone leaves names that nobody uses.
    run::stdout(&mut cargo).map(drop).context("it does not compile")
}

/// Runs these tests of a program that is compiled, and says how that ended and what was said last.
fn test(copy: &Copy, program: &Program, names: &[&str]) -> Result<(Ended, String)> {
    let mut cargo = copy.cargo();
    cargo.args(["test", "--quiet"]).args(program.arguments()).args(["--", "--exact"]).args(names);
    // A property is to fail the same way each time, and at once: nobody reads the smallest case.
    cargo.env("PROPTEST_RNG_SEED", "1").env("PROPTEST_MAX_SHRINK_ITERS", "0");
    let said = tempfile::NamedTempFile::new()?;
    cargo.stdin(Stdio::null()).stdout(said.reopen()?).stderr(said.reopen()?);
    let in_time = within_limit(cargo.process_group(0), LIMIT)?;
    let said = String::from_utf8_lossy(&fs::read(said.path())?).into_owned();
    let lines: Vec<&str> = said.lines().collect();
    let end = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
    Ok((if in_time { ended(&said) } else { Ended::NotAtAll }, end))
}

/// Whether the program, which leads a process group, ends in time. Its group is killed if it does not.
fn within_limit(command: &mut Command, limit: Duration) -> Result<bool> {
    let mut child = command.spawn().with_context(|| format!("could not start {}", run::describe(command)))?;
    let start = Instant::now();
    while child.try_wait()?.is_none() {
        if start.elapsed() > limit {
            let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("no such process")?;
            kill_process_group(group, Signal::KILL)?;
            child.wait()?;
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(true)
}

fn ended(said: &str) -> Ended {
    let mut tally = None::<Tally>;
    for line in said.lines().filter(|line| line.starts_with("test result: ")) {
        tally.get_or_insert_default().add(line);
    }
    tally.map_or(Ended::Silently, Ended::Counted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_counted_failure_is_one() {
        let of = |line: &str| ended(&format!("\nrunning 1 test\n{line}\n"));
        let counts = "0 ignored; 0 measured; 9 filtered out; finished in 0.00s";
        let counted = |passed, failed| Ended::Counted(Tally { passed, failed });
        assert_eq!(of(&format!("test result: ok. 1 passed; 0 failed; {counts}")), counted(1, 0));
        assert_eq!(of(&format!("test result: FAILED. 0 passed; 1 failed; {counts}")), counted(0, 1));
        assert_eq!(of(&format!("test result: ok. 0 passed; 0 failed; {counts}")), counted(0, 0));
        assert_eq!(of("error: test failed, to rerun pass `--lib`"), Ended::Silently);
    }

    #[test]
    fn each_mutant_has_its_turn() {
        let all = list::read(&checkout()).unwrap();
        let turns = (0..TURNS).map(|turn| take_turn(all.clone(), turn, TURNS));
        let mut tried: Vec<String> = turns.flatten().map(|mutant| mutant.name).collect();
        let mut names: Vec<String> = all.iter().map(|mutant| mutant.name.clone()).collect();
        tried.sort();
        names.sort();
        assert_eq!(tried, names);
        assert!(turn(&checkout(), TURNS).unwrap() < TURNS);
    }

    #[test]
    fn what_hangs_is_killed_with_its_children() {
        let mut hangs = Command::new("sh");
        hangs.args(["-c", "sleep 100 & wait"]).process_group(0);
        assert!(!within_limit(&mut hangs, Duration::from_millis(50)).unwrap());
        let mut ends = Command::new("true");
        assert!(within_limit(ends.process_group(0), Duration::from_secs(60)).unwrap());
    }
}
