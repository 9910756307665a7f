//! The tests, in layers by what they need: `unit` nothing, `peers` real Nix, `fuzz` a C++ compiler, `mutants` what `unit`
//! needs, `control-plane` a real API server, `node` a real cluster. A layer whose parts cannot be had fails; none is
//! skipped.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::cluster::Cluster;
use crate::limit::{self, Watch};
use crate::parts::rootfs::{self, Nix};
use crate::parts::{self, go, host};
use crate::platform::Platform;
use crate::{fuzz, images, mutants, run};

/// For each target in the layer `fuzz`: enough to see that everything works, and that the seeds still get deep.
const FUZZ_SECONDS: u64 = 8;
/// How long a program's output is waited for after everything that was found of it was killed.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// What a layer's tests need on the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Every crate's own tests.
    Unit,
    /// Against real Nix 2.8, 2.26 and 2.34, as client and as server.
    Peers,
    /// The fuzz targets, for a short time each.
    Fuzz,
    /// Some of the unit tests, each with a guard taken away: they must fail.
    Mutants,
    /// Against a real etcd and kube-apiserver.
    ControlPlane,
    /// In a real one-node cluster.
    Node,
}

/// What the tests of one or several layers said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: u64,
    /// Tests that failed or were ignored, and programs of tests that did not compile or ended in another way.
    pub failed: u64,
}

impl Layer {
    /// Every layer, in the order in which they run: the fastest first.
    pub const ALL: [Self; 6] =
        [Self::Unit, Self::Peers, Self::Fuzz, Self::Mutants, Self::ControlPlane, Self::Node];

    pub fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Peers => "peers",
            Self::Fuzz => "fuzz",
            Self::Mutants => "mutants",
            Self::ControlPlane => "control-plane",
            Self::Node => "node",
        }
    }

    /// What compiling and running its tests may take, cold and on two cores, before it is ended: a test that hangs must
    /// not take the time of the layers after it. About twice what it takes when all is well.
    fn limit(self) -> Duration {
        let minutes = match self {
            Self::Unit | Self::Peers => 25,
            Self::Fuzz => 10,
            Self::Mutants => 20,
            Self::ControlPlane => 15,
            Self::Node => 40,
        };
        Duration::from_secs(minutes * 60)
    }

    /// Fetches and builds what this layer's tests need, so that their own time is that of testing.
    fn prepare(self) -> Result<()> {
        match self {
            Self::Unit => {
                [host::C_TOOLS, host::SSH_TOOLS, host::SANDBOX_TOOLS].into_iter().try_for_each(host::ensure)
            }
            Self::Peers => {
                [host::C_TOOLS, host::NET_TOOLS, host::ROOT_TOOLS].into_iter().try_for_each(host::ensure)?;
                host::ensure(host::SANDBOX_TOOLS)?;
                host::ensure(host::SSH_TOOLS)?;
                rootfs::nginx()?;
                rootfs::sshd()?;
                rootfs::passt()?;
                go::versitygw()?;
                Nix::ALL.into_iter().try_for_each(|nix| rootfs::check_version(nix, &rootfs::nix(nix)?))
            }
            Self::Fuzz => {
                [host::CXX_TOOLS, host::SANDBOX_TOOLS].into_iter().try_for_each(host::ensure)?;
                Nix::ALL.into_iter().try_for_each(|nix| rootfs::nix(nix).map(drop))
            }
            Self::Mutants => Self::Unit.prepare(),
            Self::ControlPlane => {
                rootfs::node()?;
                rootfs::prometheus()?;
                go::helm()?;
                go::kubeconform()?;
                go::kubernetes().map(drop)
            }
            Self::Node => {
                rootfs::node()?;
                rootfs::nginx()?;
                rootfs::tcc()?;
                rootfs::nix(Nix::V2_34)?;
                go::kubernetes()?;
                go::helm()?;
                images::make(&crate::checkout().join("target/images"), &[Platform::native()?]).map(drop)
            }
        }
    }

    /// What cargo is told, one run after the other; nothing for a layer that is no cargo test. Tests of a layer share
    /// machines, ports and a cluster: `node` runs one at a time.
    fn cargo_arguments(self) -> &'static [&'static [&'static str]] {
        match self {
            Self::Fuzz | Self::Mutants => &[],
            // All of the workspace: see `development`.
            Self::Unit => &[&["test", "--workspace", "--no-fail-fast"]],
            Self::Peers => &[&["test", "--workspace", "--test", "peers"]],
            Self::ControlPlane => &[&["test", "--workspace", "--test", "control_plane"]],
            Self::Node => &[&["test", "--workspace", "--test", "node", "--", "--test-threads=1"]],
        }
    }
}

impl std::str::FromStr for Layer {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let names = Self::ALL.map(Self::name).join(", ");
        Self::ALL
            .into_iter()
            .find(|layer| layer.name() == text)
            .with_context(|| format!("the layers are {names}"))
    }
}

/// Runs these layers and prints what each took; a layer that cannot be prepared counts as one failure.
pub fn test(layers: &[Layer]) -> Tally {
    let mut total = Tally::default();
    for layer in layers {
        let start = Instant::now();
        eprintln!("== {}", layer.name());
        let tally = layer.prepare().map(|()| start.elapsed()).and_then(|took| {
            eprintln!("== {}: parts ready after {:.0} s", layer.name(), took.as_secs_f64());
            run_layer(*layer, layers.len() > 1)
        });
        let tally = tally.unwrap_or_else(|error| {
            eprintln!("error: the layer {} cannot run: {error:#}", layer.name());
            Tally { passed: 0, failed: 1 }
        });
        total.passed += tally.passed;
        total.failed += tally.failed;
        let took = start.elapsed().as_secs_f64();
        println!("== {}: {} passed, {} failed, {took:.0} s", layer.name(), tally.passed, tally.failed);
    }
    total
}

/// `in_a_hurry`: among other layers, where the mutants take turns.
fn run_layer(layer: Layer, in_a_hurry: bool) -> Result<Tally> {
    let turns = if in_a_hurry { mutants::TURNS } else { 1 };
    let all = layer.cargo_arguments();
    match layer {
        Layer::Fuzz => in_time(layer.limit(), limit::mark(), |_| fuzz::run(None, FUZZ_SECONDS)),
        Layer::Mutants if !in_a_hurry => mutants::run(None, turns), // all of them, and somebody watches
        Layer::Mutants => in_time(layer.limit(), limit::mark(), |_| mutants::run(None, turns)),
        Layer::Node if std::env::var_os("DROVER_CLUSTER_DIR").is_none() => {
            in_own_cluster(|env| in_time(layer.limit(), limit::mark(), |watch| run_all(all, env, watch)))
        }
        _ => in_time(layer.limit(), limit::mark(), |watch| run_all(all, &[], watch)),
    }
}

/// A cluster of the tests' own, new and gone afterwards: what a person does in theirs is no matter of the tests.
fn in_own_cluster(tests: impl FnOnce(&[(&str, &OsStr)]) -> Result<Tally>) -> Result<Tally> {
    let cache = parts::cache()?;
    let _lock = parts::lock(&cache, "node-tests")?;
    let dir = cache.join("cluster-test");
    let cluster = Cluster::in_dir(&dir)?;
    cluster.down()?;
    let tally = tests(&[("DROVER_CLUSTER_DIR", dir.as_os_str())]);
    if cluster.logs().is_dir() && tally.as_ref().is_ok_and(|tally| tally.failed > 0) {
        let kept = cache.join("cluster-test-logs");
        run::stdout(Command::new("rm").arg("-rf").arg(&kept))?;
        run::stdout(Command::new("cp").arg("-r").arg(cluster.logs()).arg(&kept))?;
        eprintln!("== node: the cluster's logs are kept in {}", kept.display());
    }
    cluster.down()?;
    tally
}

/// What `tests` say, whose programs carry `mark`. When the time is over, those are killed, and that is one failure more.
fn in_time(limit: Duration, mark: &str, tests: impl FnOnce(&Watch) -> Result<Tally>) -> Result<Tally> {
    let watch = Watch::until(Instant::now() + limit, mark);
    let tally = tests(&watch);
    let Some(killed) = watch.stop() else { return tally };
    let mut tally = tally.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        Tally::default()
    });
    tally.failed += 1;
    let killed: Vec<_> = killed.into_iter().collect();
    println!("error: stopped after {} s; killed: {}", limit.as_secs(), killed.join(", "));
    Ok(tally)
}

/// Runs cargo with each of these arguments, whatever came of those before, until the time is over.
fn run_all(all: &[&[&str]], env: &[(&str, &OsStr)], watch: &Watch) -> Result<Tally> {
    let mut total = Tally::default();
    for arguments in all {
        let (tally, hung) = run_tests(run::cargo().args(*arguments).envs(env.iter().copied()), watch)?;
        total.passed += tally.passed;
        total.failed += tally.failed;
        if watch.is_over() {
            println!("error: {hung}");
            break;
        }
    }
    Ok(total)
}

/// Runs a program that prints what libtest prints, and counts; and says which tests had not finished.
///
/// If the time is over, that is counted by who watches it.
fn run_tests(program: &mut Command, watch: &Watch) -> Result<(Tally, String)> {
    program.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = program.spawn().with_context(|| format!("could not start {}", run::describe(program)))?;
    let stdout = child.stdout.take().context("a child has no standard output")?;
    let (send, lines) = mpsc::channel();
    // Not joined: what escaped from being killed may hold the pipe for ever.
    std::thread::spawn(move || read_lines(stdout, &send));
    let (mut tally, mut progress) = (Tally::default(), Progress::default());
    let mut last_words = None;
    loop {
        match lines.recv_timeout(Duration::from_secs(1)) {
            Ok(line) => {
                println!("{line}");
                tally.add(&line);
                progress.add(&line);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if watch.is_over() && last_words.get_or_insert_with(Instant::now).elapsed() > LAST_WORDS {
            break;
        }
    }
    let success = child.wait()?.success();
    if watch.is_over() {
        return Ok((tally, progress.unfinished()));
    }
    // Cargo fails for a test, which is counted, and for what stops it from testing, which must count too.
    if !success && tally.failed == 0 {
        tally.failed = 1;
    }
    if tally == Tally::default() {
        anyhow::bail!("no test ran");
    }
    Ok((tally, String::new()))
}

/// Sends each line, and at the end what stands there without one.
fn read_lines(stdout: ChildStdout, lines: &mpsc::Sender<String>) {
    let mut stdout = BufReader::new(stdout);
    let mut line = Vec::new();
    while stdout.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        let text = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
        if lines.send(text).is_err() {
            return; // nobody counts any more
        }
        line.clear();
    }
}

/// Which tests a test program has started, as far as libtest says so, and not finished.
#[derive(Debug, Default)]
struct Progress {
    /// Those that take longer than a minute, and the one that was started last where there is one at a time.
    running: BTreeSet<String>,
    last: String,
}

impl Progress {
    /// A line of the program's: `running 3 tests`, `test NAME ... ok`, `test NAME has been running for over 60 seconds`, or at
    /// its end `test NAME ... `, perhaps with what the test printed.
    fn add(&mut self, line: &str) {
        self.last = line.to_owned();
        if line.starts_with("running ") && line.contains(" test") {
            self.running.clear(); // another program's, or none
        }
        let Some(test) = line.strip_prefix("test ") else { return };
        if let Some((name, _)) = test.split_once(" has been running for over ") {
            self.running.insert(name.to_owned());
        } else if let Some((name, result)) = test.split_once(" ... ") {
            if ["ok", "FAILED", "ignored"].iter().any(|ended| result.starts_with(ended)) {
                self.running.remove(name);
            } else {
                self.running.insert(name.to_owned());
            }
        }
    }

    fn unfinished(&self) -> String {
        let names: Vec<_> = self.running.iter().map(String::as_str).collect();
        match names.as_slice() {
            [] => format!("no test is known to have been running; the last line was {:?}", self.last),
            names => format!("not finished: {}", names.join(", ")),
        }
    }
}

impl Tally {
    /// Counts a line that a test program ends with: `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    pub(crate) fn add(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        let counts = result.split_once(". ").map_or("", |(_, counts)| counts);
        for count in counts.split("; ") {
            let Some((number, what)) = count.split_once(' ') else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" | "ignored" => self.failed += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_and_an_ignored_test_is_no_success() {
        let mut tally = Tally::default();
        tally.add("test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 5 filtered out; finished in 0.00s");
        tally.add("test serve::x ... ok");
        tally.add(
            "test result: ok. 10 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s",
        );
        assert_eq!(tally, Tally { passed: 13, failed: 3 });
    }

    #[test]
    fn what_hangs_is_named_killed_and_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        let mark = format!("layers-test-{}", std::process::id());
        // A test program with a server that left its parent, one that left its environment, and the test that hangs.
        let script = "(setsid sleep 600 & echo $! > servers)
            env -i sleep 600 & echo $! >> servers
            echo 'running 3 tests'
            echo 'test a ... ok'
            echo 'test b ... FAILED'
            printf 'test c ... '
            mv servers ready
            sleep 600";
        let ready = dir.path().join("ready");
        let tally = in_time(Duration::from_secs(600), &mark, |watch| {
            let mut hangs = Command::new("sh");
            hangs.args(["-c", script]).current_dir(dir.path()).env(limit::MARK, &mark);
            let (tally, hung) = std::thread::scope(|scope| {
                scope.spawn(|| {
                    let hangs = run::wait_for("a test that hangs", LAST_WORDS, || Ok(ready.exists()));
                    watch.expire();
                    hangs
                });
                run_tests(&mut hangs, watch)
            })?;
            assert_eq!(hung, "not finished: c");
            Ok(tally)
        })
        .unwrap();
        assert_eq!(tally, Tally { passed: 0, failed: 1 }); // no program came to its result
        for server in std::fs::read_to_string(&ready).unwrap().lines() {
            // A signal takes its time; and what nobody asks for its exit code stays as a zombie.
            let stat = || std::fs::read_to_string(format!("/proc/{server}/stat")).unwrap_or_default();
            let gone = || Ok(stat().is_empty() || stat().contains(") Z "));
            run::wait_for("the end of a server", LAST_WORDS, gone).unwrap();
        }
    }

    #[test]
    fn the_tests_that_run_are_those_that_did_not_end() {
        let mut progress = Progress::default();
        assert!(progress.unfinished().starts_with("no test"));
        for line in [
            "running 4 tests",
            "test a has been running for over 60 seconds",
            "test b has been running for over 60 seconds",
            "test c ... ignored, for a reason",
            "test a ... ok",
        ] {
            progress.add(line);
        }
        assert_eq!(progress.unfinished(), "not finished: b");
        progress.add("running 1 test");
        assert_eq!(
            progress.unfinished(),
            "no test is known to have been running; the last line was \"running 1 test\""
        );
    }
}
