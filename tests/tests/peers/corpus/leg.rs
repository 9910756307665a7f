//! One implementation that builds the whole corpus: a session of the serve protocol with it, on a store of its own that
//! gets what each build needs and nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result};
use drover_nix::derivation::modulo;
use drover_nix::{Derivation, OutputName, StoreDir, StorePath};
use drover_serve::{BuildOptions, BuildResult, BuildStatus, Client};
use drover_store::{Access, LocalStore, StoreLayout};
use drover_tests::corpus::{Case, FEATURES, VARIABLE};
use drover_tests::{Peer, program};

use super::outcome::{Outcome, Outcomes, Output};
use crate::store_parts::{Root, Session, with_nix};

/// Who runs the implementation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum User {
    Root,
    Ordinary,
}

/// The ordinary user.
const NOBODY: u32 = 65534;

pub(super) struct Leg {
    session: Session,
    root: PathBuf,
    /// Where the outputs of what was built are.
    known: BTreeMap<(StorePath, OutputName), StorePath>,
    /// Inputs that were built, or why not.
    tried: BTreeMap<StorePath, Option<String>>,
}

impl Leg {
    /// `nix-store --serve --write` with its store at `/nix` and its sandbox on; root's builds have ids of their own.
    pub(super) fn nix(peer: &Peer, root: &Root, shell: &Path, user: User) -> Result<Self> {
        let at = root.path().join("nix");
        std::fs::create_dir_all(&at)?;
        let peer = with_nix(peer, root);
        let mut command = match user {
            User::Root => peer.command("nix-store")?,
            User::Ordinary => {
                std::os::unix::fs::chown(&at, Some(NOBODY), Some(NOBODY))?;
                let mut command = peer.command("/usr/sbin/chroot")?;
                command.args([
                    &format!("--userspec={NOBODY}:{NOBODY}"),
                    "--groups=",
                    "/",
                    "env",
                    "HOME=/nix",
                    "nix-store",
                ]);
                command
            }
        };
        // Not what an ordinary user gets otherwise, a store in the home directory.
        command.args(["--serve", "--write", "--store", "local"]).env("NIX_CONFIG", nix_config(shell, user));
        Self::start(command, root)
    }

    /// `drover-builder serve --write`. `tools` has the shell, and is where an ordinary user finds the program.
    pub(super) fn drover(root: &Root, tools: &Path, user: User, options: &[&str]) -> Result<Self> {
        let mut command = match user {
            User::Root => Command::new(program("drover-builder")?),
            User::Ordinary => {
                let copy = tools.join("drover-builder");
                std::fs::copy(program("drover-builder")?, &copy)?;
                std::os::unix::fs::chown(root.path(), Some(NOBODY), Some(NOBODY))?;
                let mut command = Command::new(copy);
                command.current_dir("/").uid(NOBODY).gid(NOBODY);
                command
            }
        };
        command.args(["serve", "--write", "--store"]).arg(root.path());
        command.arg("--sandbox-shell").arg(tools.join("bin/busybox")).args(options);
        Self::start(command, root)
    }

    fn start(mut command: Command, root: &Root) -> Result<Self> {
        command.env(VARIABLE.0, VARIABLE.1);
        let session = Session::start(command)?;
        Ok(Self { session, root: root.path().to_owned(), known: BTreeMap::new(), tried: BTreeMap::new() })
    }

    /// Builds every case and what it needs. `source` has the `.drv` files and the sources.
    pub(super) fn build_all(mut self, source: &LocalStore, cases: &[&Case]) -> Result<Outcomes> {
        let mut outcomes = Outcomes::new();
        for case in cases {
            let outcome = self.case(source, case).with_context(|| case.name.clone())?;
            outcomes.insert(case.name.clone(), outcome);
        }
        self.session.end()?;
        Ok(outcomes)
    }

    fn case(&mut self, source: &LocalStore, case: &Case) -> Result<Outcome> {
        let derivation = source.read_derivation(&case.drv)?;
        for input in derivation.input_drvs.keys() {
            if let Some(message) = self.need(source, input)? {
                return Ok(Outcome {
                    status: BuildStatus::DependencyFailed,
                    message,
                    outputs: BTreeMap::new(),
                });
            }
        }
        let result = self.build(source, &case.drv, &derivation, &case.options)?;
        let paths: BTreeSet<StorePath> =
            result.built_outputs.values().map(|built| built.path.clone()).collect();
        let mut infos = self.client().query_path_infos(&paths)?;
        let mut outputs = BTreeMap::new();
        for (name, built) in &result.built_outputs {
            let info =
                infos.get_mut(&built.path).with_context(|| format!("{} is not valid", built.path))?.clone();
            outputs.insert(name.clone(), Output::look(info, &self.store()?)?);
        }
        Ok(Outcome { status: result.status, message: result.error_message, outputs })
    }

    /// Builds an input and what it needs in turn, once. Why not, if that fails.
    fn need(&mut self, source: &LocalStore, drv: &StorePath) -> Result<Option<String>> {
        if let Some(tried) = self.tried.get(drv) {
            return Ok(tried.clone());
        }
        let derivation = source.read_derivation(drv)?;
        let mut trouble = None;
        for input in derivation.input_drvs.keys() {
            trouble = trouble.or(self.need(source, input)?);
        }
        if trouble.is_none() {
            let result = self.build(source, drv, &derivation, &BuildOptions::default())?;
            trouble = (!result.status.is_success())
                .then(|| format!("its input {drv}: {:?}: {}", result.status, result.error_message));
        }
        self.tried.insert(drv.clone(), trouble.clone());
        Ok(trouble)
    }

    fn build(
        &mut self,
        source: &LocalStore,
        drv: &StorePath,
        derivation: &Derivation,
        options: &BuildOptions,
    ) -> Result<BuildResult> {
        let dir = StoreDir::default();
        let known = &self.known;
        let resolved =
            derivation.resolve(&dir, |drv, output| known.get(&(drv.clone(), output.clone())).cloned())?;
        let resolved_drv = match derivation.resolves_to_another()? {
            true => modulo::basic_drv_path(&dir, &resolved)?,
            false => drv.clone(),
        };
        // The sources with all that they refer to, as any client sends them.
        let wanted = source.closure(&derivation.basic.input_srcs)?;
        let there = self.client().query_valid_paths(&wanted, true, false)?;
        let mut left: BTreeSet<StorePath> = wanted.difference(&there).cloned().collect();
        while !left.is_empty() {
            for path in left.clone() {
                let info = source.path_info(&path)?.context("a closure is valid")?;
                if info.other_references().any(|reference| left.contains(reference)) {
                    continue;
                }
                let mut nar = Vec::new();
                source.dump(&path, &mut nar)?;
                self.client().add_to_store_nar(&info, &mut nar.as_slice())?;
                left.remove(&path);
            }
        }
        let result = self.client().build_derivation(&resolved_drv, &resolved, options)?;
        for (name, built) in &result.built_outputs {
            self.known.insert((drv.clone(), name.clone()), built.path.clone());
        }
        Ok(result)
    }

    fn store(&self) -> Result<LocalStore> {
        Ok(LocalStore::open(StoreLayout::in_root(&self.root), Access::ReadOnly)?)
    }

    fn client(&mut self) -> &mut Client<ChildStdout, ChildStdin> {
        &mut self.session.client
    }
}

/// Root's builds get ids that no other store on this machine gives out: who ends a build kills all that has its id.
fn nix_config(shell: &Path, user: User) -> String {
    let common = format!(
        "sandbox = true\nsandbox-fallback = false\nsandbox-paths = /bin/sh={}\nsubstitute = false\n\
         extra-experimental-features = {FEATURES} auto-allocate-uids\n",
        shell.display()
    );
    static LEGS: AtomicU32 = AtomicU32::new(0);
    let place = std::process::id().wrapping_mul(16).wrapping_add(LEGS.fetch_add(1, Ordering::Relaxed));
    let start = 872_415_232 + u64::from(place % 16_384) * 65_536;
    match user {
        User::Root => format!("{common}auto-allocate-uids = true\nstart-id = {start}\nid-count = 65536\n"),
        User::Ordinary => common,
    }
}
