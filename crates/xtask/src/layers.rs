//! The tests, in layers by what they need: `unit` nothing, `peers` real Nix, `fuzz` a C++ compiler, `mutants` what `unit`
//! needs, `control-plane` a real API server, `node` a real cluster. A layer whose parts cannot be had fails; none is
//! skipped.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::cluster::Cluster;
use crate::parts::rootfs::{self, Nix};
use crate::parts::{self, go, host};
use crate::{fuzz, images, mutants, run};

/// For each target in the layer `fuzz`: enough to see that everything works, and that the seeds still get deep.
const FUZZ_SECONDS: u64 = 8;

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
                go::helm()?;
                go::kubernetes().map(drop)
            }
            Self::Node => {
                rootfs::node()?;
                rootfs::nginx()?;
                rootfs::tcc()?;
                rootfs::nix(Nix::V2_34)?;
                go::kubernetes()?;
                go::helm()?;
                images::make(&crate::checkout().join("target/images")).map(drop)
            }
        }
    }

    /// What cargo is told, one run after the other; nothing for a layer that is no cargo test. Tests of a layer share
    /// machines, ports and a cluster: `node` runs one at a time.
    fn cargo_arguments(self) -> &'static [&'static [&'static str]] {
        match self {
            Self::Fuzz | Self::Mutants => &[],
            // What tests are made of has tests of its own, beside those that take real parts.
            Self::Unit => &[
                &["test", "--workspace", "--exclude", "drover-tests", "--no-fail-fast"],
                &["test", "-p", "drover-tests", "--lib"],
            ],
            Self::Peers => &[&["test", "-p", "drover-tests", "--test", "peers"]],
            Self::ControlPlane => &[&["test", "-p", "drover-tests", "--test", "control_plane"]],
            Self::Node => &[&["test", "-p", "drover-tests", "--test", "node", "--", "--test-threads=1"]],
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
    match layer {
        Layer::Fuzz => return fuzz::run(None, FUZZ_SECONDS),
        Layer::Mutants if in_a_hurry => return mutants::run(None, mutants::TURNS),
        Layer::Mutants => return mutants::run(None, 1),
        _ => {}
    }
    let all = layer.cargo_arguments();
    if layer != Layer::Node || std::env::var_os("DROVER_CLUSTER_DIR").is_some() {
        return run_all(all, &[]);
    }
    // A cluster of the tests' own, new and gone afterwards: what a person does in theirs is no matter of the tests.
    let cache = parts::cache()?;
    let _lock = parts::lock(&cache, "node-tests")?;
    let dir = cache.join("cluster-test");
    let cluster = Cluster::in_dir(&dir)?;
    cluster.down()?;
    let tally = run_all(all, &[("DROVER_CLUSTER_DIR", dir.as_os_str())]);
    if cluster.logs().is_dir() && tally.as_ref().is_ok_and(|tally| tally.failed > 0) {
        let kept = cache.join("cluster-test-logs");
        run::stdout(Command::new("rm").arg("-rf").arg(&kept))?;
        run::stdout(Command::new("cp").arg("-r").arg(cluster.logs()).arg(&kept))?;
        eprintln!("== node: the cluster's logs are kept in {}", kept.display());
    }
    cluster.down()?;
    tally
}

/// Runs cargo with each of these arguments, whatever came of those before.
fn run_all(all: &[&[&str]], env: &[(&str, &OsStr)]) -> Result<Tally> {
    let mut total = Tally::default();
    for arguments in all {
        let tally = run_cargo(run::cargo().args(*arguments).envs(env.iter().copied()))?;
        total.passed += tally.passed;
        total.failed += tally.failed;
    }
    Ok(total)
}

fn run_cargo(cargo: &mut Command) -> Result<Tally> {
    cargo.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = cargo.spawn().context("could not start cargo")?;
    let mut tally = Tally::default();
    let lines = BufReader::new(child.stdout.take().context("cargo has no standard output")?).lines();
    for line in lines {
        let line = line?;
        println!("{line}");
        tally.add(&line);
    }
    // Cargo fails for a test, which is counted, and for what stops it from testing, which must count too.
    if !child.wait()?.success() && tally.failed == 0 {
        tally.failed = 1;
    }
    if tally == Tally::default() {
        anyhow::bail!("no test ran");
    }
    Ok(tally)
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
}
