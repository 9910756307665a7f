//! What a builder can see of where it runs, under real Nix 2.34 and under Drover, as root and as an ordinary user. Every
//! line that differs stands here with its reason; one that is not here fails, and so does one that no longer differs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use drover_nix::{OutputName, StoreDir};
use drover_serve::{BuildOptions, BuildStatus};
use drover_store::Access;
use drover_tests::corpus::{self, Case};
use drover_tests::{Nix, Peer};
use xtask::checkout;

use super::leg::{Leg, User};
use crate::store_parts::Root;

/// The derivation prints many more.
const ENOUGH_LINES: usize = 150;

/// A derivation that prints all this, sandboxed or with the network.
struct Visible {
    peer: Peer,
    source: Root,
    tools: tempfile::TempDir,
    case: Case,
}

impl Visible {
    fn new(network: bool) -> Result<Self> {
        let tools = tempfile::tempdir()?;
        corpus::tools(tools.path())?;
        let (peer, source) = (Peer::new(Nix::V2_34)?, Root::new()?);
        let expression = checkout().join("tests/derivations");
        let file = expression.join("visible.nix").display().to_string();
        let (store, tools_dir) = (source.text(), tools.path().display().to_string());
        let mut nix = peer.clone().with(&expression).command("nix-instantiate")?;
        nix.args(["--store", &store, &file, "--argstr", "tools", &tools_dir]);
        nix.args(["--arg", "network", if network { "true" } else { "false" }]);
        nix.env("NIX_CONFIG", format!("extra-experimental-features = {}\n", corpus::FEATURES));
        let drv = xtask::run::stdout(&mut nix)?;
        let case = Case {
            name: "visible".into(),
            drv: StoreDir::default().parse(drv.trim().as_bytes())?,
            expect: BuildStatus::Built,
            options: BuildOptions::default(),
            not_in_cluster: None,
            not_by_drover_build: None,
        };
        Ok(Self { peer, source, tools, case })
    }

    fn shell(&self) -> PathBuf {
        self.tools.path().join("bin/busybox")
    }

    /// What a build by this leg sees.
    fn by(&self, leg: Leg) -> Result<Vec<String>> {
        let outcomes = leg.build_all(&self.source.store(Access::ReadOnly)?, &[&self.case])?;
        let outcome = &outcomes[&self.case.name];
        let output = outcome.outputs.get(&OutputName::out()).with_context(|| outcome.ended())?;
        let text = String::from_utf8(output.text().to_vec())?;
        // Content-addressed, a path says nothing else than that the content differs.
        let path = output.info.path.hash_part();
        Ok(text.lines().map(|line| settled(&line.replace(path, "OUT"))).collect())
    }
}

#[test]
fn sandboxed_builders_see_the_same() -> Result<()> {
    compare(false, &[EXPLAINED, OF_ETC].concat())
}

#[test]
fn builders_with_the_network_see_the_same() -> Result<()> {
    compare(true, &[EXPLAINED, OF_ETC_WITH_THE_NETWORK].concat())
}

/// Lines that only one of the two prints, `-` Nix and `+` Drover, and why.
type Explained = (&'static str, &'static [&'static str]);

const EXPLAINED: &[Explained] = &[
    (
        "What is the same in the root of all builds lies ready and is mounted read-only, so /tmp is a directory of its own.",
        &["- mount: /", "+ mount: / ro", "+ mount: /tmp"],
    ),
    (
        "Inputs are read-only by their mounts, not by their modes alone: an ordinary user's builds own them.",
        &["- mount: /nix/store/tools shared", "+ mount: /nix/store/tools ro"],
    ),
    (
        "Nix adds inputs to a running build, for recursive Nix, which is not offered here.",
        &["- mount: /nix/store shared", "+ mount: /nix/store"],
    ),
    (
        "No build has use for programs, devices or set-id files in these.",
        &[
            "- mount: /proc proc",
            "+ mount: /proc nosuid nodev noexec proc",
            "- mount: /dev/shm",
            "+ mount: /dev/shm nosuid nodev",
        ],
    ),
    (
        "When memory is short, the kernel shall end a build and not the server.",
        &["- oom_score_adj: 0", "+ oom_score_adj: 100"],
    ),
    (
        "Terminals are mounted by the build's own id, for want of an id 0.",
        &[
            "- dev: /dev/pts directory 755 65534 65534 0,0",
            "+ dev: /dev/pts directory 755 1000 100 0,0",
            "- directory: /dev/pts drwxr-xr-x 65534 65534",
            "+ directory: /dev/pts drwxr-xr-x 1000 100",
        ],
    ),
    (
        "The shell may belong to the very user that builds run as.",
        &["- mount: /bin/sh", "+ mount: /bin/sh ro"],
    ),
];

const READ_ONLY: &str = "Nobody may write them, and their modes say so.";

const OF_ETC: &[Explained] = &[(
    READ_ONLY,
    &[
        "- etc: /etc/group mode 644",
        "+ etc: /etc/group mode 444",
        "- etc: /etc/hosts mode 644",
        "+ etc: /etc/hosts mode 444",
        "- etc: /etc/passwd mode 644",
        "+ etc: /etc/passwd mode 444",
    ],
)];

const OF_ETC_WITH_THE_NETWORK: &[Explained] = &[(
    READ_ONLY,
    &[
        "- etc: /etc/group mode 644",
        "+ etc: /etc/group mode 444",
        "- etc: /etc/nsswitch.conf mode 644",
        "+ etc: /etc/nsswitch.conf mode 444",
        "- etc: /etc/passwd mode 644",
        "+ etc: /etc/passwd mode 444",
    ],
)];

/// What a build with the network shares with its machine, and Nix's machine here is a root filesystem of its own.
const SHARED_FILES: [&str; 4] = ["/etc/hosts", "/etc/services", "/etc/resolv.conf", "/etc/ssl"];

/// Beginnings of lines that differ on some machines and not on others. Where builds have control groups of their own,
/// which Nix gives them only if it is told to, they do not see the names of the machine's. And Nix as root shows the device
/// of virtual machines to builds that may not open it: here it has to be open to all.
const BY_MACHINE: [&str; 3] = ["cgroup: ", "dev: /dev/kvm ", "mount: /dev/kvm"];

fn compare(network: bool, explained: &[Explained]) -> Result<()> {
    let expected: BTreeSet<&str> = explained.iter().flat_map(|(_, lines)| *lines).copied().collect();
    let visible = Visible::new(network)?;
    for user in [User::Root, User::Ordinary] {
        let (theirs, ours) = (Root::new()?, Root::new()?);
        let nix = visible.by(Leg::nix(&visible.peer, &theirs, &visible.shell(), user)?)?;
        let drover = visible.by(Leg::drover(&ours, visible.tools.path(), user, &["--network", "host"])?)?;
        ensure!(nix.len() > ENOUGH_LINES, "nothing to compare: {nix:?}");
        let differing = difference(&nix, &drover);
        let of_the_machine = |line: &str| {
            let line = &line[2..];
            let shared =
                line.starts_with("etc: hosts ") || SHARED_FILES.iter().any(|file| line.contains(file));
            (network && shared) || BY_MACHINE.iter().any(|start| line.starts_with(start))
        };
        let found: BTreeSet<&str> =
            differing.iter().map(String::as_str).filter(|line| !of_the_machine(line)).collect();
        let new: Vec<_> = found.difference(&expected).collect();
        let gone: Vec<_> = expected.difference(&found).collect();
        ensure!(
            new.is_empty() && gone.is_empty(),
            "{user:?}: not explained: {new:#?}\nno longer so: {gone:#?}"
        );
        for (why, lines) in explained {
            println!("{user:?}: {why}");
            lines.iter().for_each(|line| println!("    {line}"));
        }
    }
    Ok(())
}

/// Lines of one only, each with its sign: `-` what is with Nix alone, `+` with us alone.
fn difference(nix: &[String], drover: &[String]) -> Vec<String> {
    let mut count: BTreeMap<&str, i32> = BTreeMap::new();
    for line in nix {
        *count.entry(line).or_default() -= 1;
    }
    for line in drover {
        *count.entry(line).or_default() += 1;
    }
    let differs = count.into_iter().filter(|(_, count)| *count != 0);
    differs.map(|(line, count)| format!("{} {line}", if count < 0 { '-' } else { '+' })).collect()
}

/// Without what differs from one process that starts a builder to the next: whether it ignores the two signals that C
/// libraries keep for themselves, which nobody can reset through them.
fn settled(line: &str) -> String {
    const OF_C_LIBRARIES: u64 = 3 << 31;
    let ignored = line.strip_prefix("status: SigIgn: ").and_then(|mask| u64::from_str_radix(mask, 16).ok());
    let others = OF_C_LIBRARIES | of_nohup();
    ignored.map_or_else(|| line.to_owned(), |mask| format!("status: SigIgn: {:016x}", mask & !others))
}

/// SIGHUP, if these tests were started to ignore it: Nix hands that on to its builds.
fn of_nohup() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default() & 1
}
