//! One attempt at a build, from locks to registered outputs. Whatever it made is gone when it ends, however it ends.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use drover_nix::derivation::DerivationType;
use drover_nix::{BasicDerivation, PathInfo, StorePath};
use drover_serve::{BuildOptions, BuildStatus};
use drover_store::{LocalStore, TempRoots};
use ring::rand::{SecureRandom as _, SystemRandom};

use super::attrs::Attributes;
use super::cancel::Interest;
use super::confine::Site;
use super::evidence::Watch;
use super::graph::Known;
use super::ids::BuildIds;
use super::log::BuildLog;
use super::scratch::BUILD_DIR;
use super::supervise::Limits;
use super::targets::Paths;
use super::{
    Builder, Wanted, bare, builtins, confine, connect, env, graph, locks, outputs, supervise, targets,
    verdict,
};
use crate::error::Error;
use crate::network::Network;
use crate::sandbox::group::Group;
use crate::sandbox::plan::{Command, Layout, Program};
use crate::sandbox::rungs::Rung;

/// How often a uid is looked for when all are in use, which no lock tells.
const RETRY: Duration = Duration::from_millis(200);

pub(super) struct Attempt<'a> {
    pub builder: &'a Builder,
    pub drv_path: &'a StorePath,
    pub drv: &'a BasicDerivation,
    pub kind: DerivationType,
    pub attributes: &'a Attributes<'a>,
    pub options: &'a BuildOptions,
    pub wanted: &'a Wanted,
    /// Keeps from the collector what gets its path only in the build.
    pub roots: &'a TempRoots,
    pub log: &'a BuildLog,
    pub interest: &'a Interest<'a>,
}

impl Attempt<'_> {
    /// Built, or already valid since someone else was faster; and where the outputs are.
    pub(super) fn run(&self) -> Result<(BuildStatus, Paths), Error> {
        let (store, known) = (&self.builder.store, &self.wanted.known);
        let mut names: Vec<String> = targets::lock_names(self.drv_path, known).into_iter().collect();
        // What it works in has the derivation's name, whatever a client says that its outputs are. Of that the hash will
        // do: a name as long as they may be is too long for a file with one more suffix.
        names.push(format!("{}-chroot", self.drv_path.hash_part()));
        let waiting = || self.log.note(&format!("waiting for another build of {}", self.drv_path));
        let _held = locks::lock(store, names, self.interest, waiting)?;
        if let Some(paths) = self.builder.made_before(self.wanted, self.roots)? {
            return Ok((BuildStatus::AlreadyValid, paths));
        }
        let known: BTreeSet<StorePath> = known.values().flatten().cloned().collect();
        let valid = store.valid_paths(&known)?;
        for path in known.difference(&valid) {
            drover_store::fs::delete(&store.real_path(path))?;
        }
        let paths = self.build(&valid)?;
        self.builder.remember(self.wanted, &paths);
        Ok((BuildStatus::Built, paths))
    }

    fn ids(&self) -> Result<BuildIds, Error> {
        loop {
            let state_dir = &self.builder.store.layout().state_dir;
            if let Some(ids) = BuildIds::take(self.builder.settings.ids, state_dir)? {
                return Ok(ids);
            }
            self.interest.wait(&[], Some(RETRY))?;
            self.interest.check()?;
        }
    }

    /// From directories to registered outputs. `valid` are those that are there already.
    fn build(&self, valid: &BTreeSet<StorePath>) -> Result<Paths, Error> {
        let Self { builder, drv, kind, attributes, options, .. } = *self;
        let store = &builder.store;
        let dir = store.store_dir();
        let rung = builder.rung()?;
        let inputs = self.inputs()?;
        let targets = targets::targets(dir, self.drv_path, drv, random_hash_part)?;
        let outputs: Paths =
            targets.iter().map(|(name, target)| (name.clone(), target.scratch.clone())).collect();
        let ids = self.ids()?;
        let graphs = graph::graphs(dir, attributes, &inputs, store)?;
        let prepared = env::prepare(&env::Inputs {
            dir,
            drv,
            attributes,
            kind,
            outputs: &outputs,
            build_dir: BUILD_DIR,
            cores: builder.settings.cores,
            impure: &|name| {
                std::env::var_os(name).map(|value| std::os::unix::ffi::OsStringExt::into_vec(value).into())
            },
            graphs: &graphs,
        })?;
        let mut scratch = self.scratch(rung, &ids, &outputs, valid)?;
        for (name, contents) in &prepared.files {
            scratch.build_file(name, contents)?;
        }
        let made: BTreeSet<&StorePath> = outputs.values().collect();
        let visible = inputs.iter().filter(|path| !made.contains(path)).collect();
        let network = builder.network_of(kind)?;
        let command = self.command(prepared.command, &outputs)?;
        let group = builder.settings.cgroups.then(Group::make).flatten();
        let site = Site { rung, network: &network, scratch: &scratch, ids: &ids, group: group.as_ref() };
        let plan = self.plan(&site, &visible, command)?;
        let seconds = |seconds: u64| (seconds > 0).then(|| Duration::from_secs(seconds));
        let limits = Limits {
            timeout: seconds(options.timeout_seconds),
            max_silent: seconds(options.max_silent_seconds),
            max_log_bytes: Some(options.max_log_bytes).filter(|bytes| *bytes > 0),
        };
        self.interest.check()?;
        let watch = Watch::begin(&builder.company, group.as_ref().map(Group::dir), rung != Rung::Pod);
        let (running, connection) = connect::start(&plan, &ids, &network, scratch.top())?;
        self.interest.runs();
        let ended = supervise::supervise(running, &limits, self.log, self.interest);
        let evidence = watch.end(store.layout(), &scratch.build_dir());
        drop(connection);
        // Kills what might have escaped every other net.
        drop(group);
        if rung == Rung::Pod {
            bare::take_outputs(store, &scratch, &outputs)?;
        }
        let (end, tail) = ended?;
        let result = match verdict::failure(&dir.full(self.drv_path), kind, &end, &tail, &evidence) {
            None => outputs::Finished {
                store,
                drv_path: self.drv_path,
                drv,
                attributes,
                scratch: &scratch,
                ids: &ids,
                targets: &targets,
                valid,
                inputs: &inputs,
                roots: self.roots,
                self_references: builder.settings.self_references,
                interest: self.interest,
            }
            .register(),
            Some(error) => Err(error),
        };
        // Of a build that was cancelled nobody is there to look at anything. What built-in builders work with may be secret.
        if options.keep_failed && !builtins::is_builtin(drv) && matches!(result, Err(Error::Verdict { .. })) {
            self.log.note(&match scratch.keep() {
                Ok(kept) => format!("keeping build directory {}", kept.display()),
                Err(error) => format!("the build directory is not kept: {error}"),
            });
        }
        result
    }

    /// What runs in the sandbox: `program`, unless the derivation names a builder that is part of this one.
    fn command(&self, program: Program, outputs: &Paths) -> Result<Command, Error> {
        let Self { builder, drv, kind, .. } = *self;
        if !builtins::is_builtin(drv) {
            return Ok(Command::Program(program));
        }
        let (dir, fetching) = (builder.store.store_dir(), &builder.settings.fetching);
        builtins::job(dir, drv, kind, outputs, &program, fetching).map(Command::Builtin)
    }

    /// The closure of the derivation's inputs, all of it valid.
    fn inputs(&self) -> Result<BTreeSet<StorePath>, Error> {
        let named = &self.drv.input_srcs;
        let valid = self.builder.store.valid_paths(named)?;
        let missing: Vec<String> =
            named.difference(&valid).map(|path| self.builder.store.store_dir().full(path)).collect();
        if !missing.is_empty() {
            return Err(Error::Verdict {
                status: BuildStatus::MiscFailure,
                message: format!(
                    "cannot build '{}': these inputs are not valid in this store; add them first:\n  {}",
                    self.builder.store.store_dir().full(self.drv_path),
                    missing.join("\n  ")
                ),
            });
        }
        Ok(self.builder.store.closure(named)?)
    }

    /// Makes the mount points of the inputs and says what goes where.
    pub(super) fn layout(&self, site: &Site<'_>, inputs: &BTreeSet<&StorePath>) -> Result<Layout, Error> {
        let (store, scratch) = (&self.builder.store, site.scratch);
        let skeleton = self.builder.skeleton(self.kind, site.network, site.ids)?;
        let mut binds = skeleton.binds;
        binds.push((scratch.tmp(), "/tmp".into()));
        binds.push((scratch.build_dir(), BUILD_DIR.into()));
        let extra = self.builder.extra_store_paths()?;
        for path in inputs.iter().copied().chain(&extra).collect::<BTreeSet<_>>() {
            let source = store.real_path(path);
            if scratch.input(&source, path)? {
                binds.push((source, store.store_dir().full(path).into()));
            }
        }
        Ok(Layout {
            root: skeleton.root,
            store: scratch.store(),
            store_dir: store.store_dir().as_str().into(),
            binds,
            build_dir: BUILD_DIR.into(),
            private_network: !matches!(site.network, Network::Host(_)),
            linux32: confine::is_32_bit(&self.drv.system.to_string()),
            shm: Path::new("/dev/shm").is_dir(),
            cgroup: site.group.is_some(),
            move_root: site.rung == Rung::NestedAdmin,
        })
    }
}

/// 20 bytes that nobody can foresee.
fn random_hash_part() -> Result<[u8; 20], Error> {
    let mut bytes = [0; 20];
    let failed = |_| Error::system("get random bytes")(std::io::Error::other("the system gives none"));
    SystemRandom::new().fill(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

impl Known for LocalStore {
    fn info(&self, path: &StorePath) -> Result<PathInfo, Error> {
        let info = self.path_info(path)?;
        info.ok_or_else(|| drover_store::Error::NotValid { path: path.clone() }.into())
    }

    fn outputs(&self, drv: &StorePath) -> Result<Vec<StorePath>, Error> {
        let known = self.derivation_outputs(drv)?;
        if self.read_derivation(drv)?.basic.outputs.len() > known.len() {
            return Err(Error::input(format!(
                "exportReferencesGraph: the outputs of {} have paths that are not known from it",
                self.store_dir().full(drv)
            )));
        }
        Ok(known.into_values().collect())
    }
}
