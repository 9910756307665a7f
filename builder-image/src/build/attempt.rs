//! One attempt at a build, from locks to registered outputs. Whatever it made is gone when it ends, however it ends.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use drover_nix::derivation::DerivationType;
use drover_nix::{BasicDerivation, OutputName, PathInfo, StorePath};
use drover_serve::{BuildOptions, BuildStatus};
use drover_store::{LocalStore, PathLock, Wait};

use super::attrs::Attributes;
use super::cancel::{Event, Interest};
use super::evidence::Watch;
use super::graph::Known;
use super::ids::BuildIds;
use super::log::BuildLog;
use super::scratch::{BUILD_DIR, Scratch};
use super::supervise::Limits;
use super::{Builder, builtins, confine, env, graph, outputs, supervise, verdict};
use crate::error::Error;
use crate::sandbox::launch;
use crate::sandbox::plan::{Command, Layout, Program};

/// How often a uid is looked for when all are in use, which no lock tells.
const RETRY: Duration = Duration::from_millis(200);

pub(super) struct Attempt<'a> {
    pub builder: &'a Builder,
    pub drv_path: &'a StorePath,
    pub drv: &'a BasicDerivation,
    pub kind: DerivationType,
    pub attributes: &'a Attributes<'a>,
    pub options: &'a BuildOptions,
    pub outputs: &'a BTreeMap<OutputName, StorePath>,
    pub log: &'a BuildLog,
    pub interest: &'a Interest<'a>,
}

/// Locks that are taken off the disk when they are let go. Nix leaves the files of builds that failed; whoever waits
/// for one looks again whether it still has its name, so that nothing needs them.
struct Held(Option<PathLock>);

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(lock) = self.0.take() {
            lock.release_deleting();
        }
    }
}

impl Attempt<'_> {
    /// Built, or already valid since someone else was faster.
    pub(super) fn run(&self) -> Result<BuildStatus, Error> {
        let store = &self.builder.store;
        let _held = self.lock()?;
        let paths: BTreeSet<StorePath> = self.outputs.values().cloned().collect();
        let valid = store.valid_paths(&paths)?;
        if valid.len() == paths.len() {
            return Ok(BuildStatus::AlreadyValid);
        }
        let missing = self.outputs.iter().filter(|(_, path)| !valid.contains(*path));
        let missing: BTreeMap<_, _> = missing.map(|(name, path)| (name.clone(), path.clone())).collect();
        for path in missing.values() {
            drover_store::fs::delete(&store.real_path(path))?;
        }
        self.build(&missing)?;
        Ok(BuildStatus::Built)
    }

    /// Waits until nobody else makes these outputs.
    fn lock(&self) -> Result<Held, Error> {
        let store = &self.builder.store;
        if let Some(lock) = PathLock::acquire(store, self.outputs.values(), Wait::Try)? {
            return Ok(Held(Some(lock)));
        }
        self.log.note(&format!("waiting for another build of {}", self.drv_path));
        let arrived = Event::new().map_err(Error::system("make an event descriptor"))?;
        let (sender, receiver) = mpsc::channel();
        let (store, paths, event) = (store.clone(), self.outputs.clone(), arrived.clone());
        // A lock can be waited for only by blocking, so a thread does, and is left behind if the interest ends first: it
        // then lets go of the lock as soon as it has it.
        std::thread::spawn(move || {
            let lock = PathLock::acquire(&store, paths.values(), Wait::Block);
            let held = lock.map(Held);
            let _left_behind = sender.send(held);
            event.set();
        });
        loop {
            self.interest.check()?;
            if arrived.is_set() {
                break;
            }
            self.interest.wait(&[arrived.as_fd()], None)?;
        }
        let gone = || Error::system("wait for a lock")(std::io::ErrorKind::BrokenPipe.into());
        Ok(receiver.recv().map_err(|_| gone())??)
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

    /// From directories to registered outputs.
    fn build(&self, missing: &BTreeMap<OutputName, StorePath>) -> Result<(), Error> {
        let Self { builder, drv, kind, attributes, options, outputs, .. } = *self;
        let store = &builder.store;
        let dir = store.store_dir();
        let rung = builder.rung()?;
        let inputs = self.inputs()?;
        let ids = self.ids()?;
        let graphs = graph::graphs(dir, attributes, &inputs, store)?;
        let prepared = env::prepare(&env::Inputs {
            dir,
            drv,
            attributes,
            kind,
            outputs,
            build_dir: BUILD_DIR,
            cores: builder.settings.cores,
            impure: &|name| {
                std::env::var_os(name).map(|value| std::os::unix::ffi::OsStringExt::into_vec(value).into())
            },
            graphs: &graphs,
        })?;
        let mut scratch = Scratch::create(store.layout(), self.drv_path, &ids)?;
        for (name, contents) in &prepared.files {
            scratch.build_file(name, contents)?;
        }
        let made: BTreeSet<&StorePath> = outputs.values().collect();
        let visible = inputs.iter().filter(|path| !made.contains(path));
        let layout = self.layout(&scratch, &ids, visible)?;
        let command = self.command(prepared.command, outputs)?;
        let plan = confine::nested(rung, &layout, &ids, command);
        let seconds = |seconds: u64| (seconds > 0).then(|| Duration::from_secs(seconds));
        let limits = Limits {
            timeout: seconds(options.timeout_seconds),
            max_silent: seconds(options.max_silent_seconds),
            max_log_bytes: Some(options.max_log_bytes).filter(|bytes| *bytes > 0),
        };
        self.interest.check()?;
        let watch = Watch::begin(&builder.company);
        let running = launch::start(&plan, ids.foreign()).map_err(Error::system("start the sandbox"))?;
        self.interest.runs();
        let (end, tail) = supervise::supervise(running, &limits, self.log, self.interest)?;
        let evidence = watch.end(store.layout());
        let result = match verdict::failure(&dir.full(self.drv_path), kind, &end, &tail, &evidence) {
            None => outputs::Finished {
                store,
                drv_path: self.drv_path,
                drv,
                attributes,
                scratch: &scratch,
                ids: &ids,
                outputs: missing,
                inputs: &inputs,
                interest: self.interest,
            }
            .register(),
            Some(error) => Err(error),
        };
        // Of a build that was cancelled nobody is there to look at anything.
        if options.keep_failed && !builtins::is_builtin(drv) && matches!(result, Err(Error::Verdict { .. })) {
            let kept = scratch.keep();
            self.log.note(&format!("keeping build directory {}", kept.display()));
        }
        result
    }

    /// What runs in the sandbox: `program`, unless the derivation names a builder that is part of this one.
    fn command(&self, program: Program, outputs: &BTreeMap<OutputName, StorePath>) -> Result<Command, Error> {
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
    fn layout<'a>(
        &self,
        scratch: &Scratch,
        ids: &BuildIds,
        inputs: impl Iterator<Item = &'a StorePath>,
    ) -> Result<Layout, Error> {
        let store = &self.builder.store;
        let skeleton = self.builder.skeleton(self.kind, ids)?;
        let mut binds = skeleton.binds;
        binds.push((scratch.tmp(), "/tmp".into()));
        binds.push((scratch.build_dir(), BUILD_DIR.into()));
        for path in inputs {
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
            private_network: self.kind.is_sandboxed(),
            linux32: confine::is_32_bit(&self.drv.system.to_string()),
            shm: Path::new("/dev/shm").is_dir(),
            cgroup: false,
        })
    }
}

impl Known for LocalStore {
    fn info(&self, path: &StorePath) -> Result<PathInfo, Error> {
        let info = self.path_info(path)?;
        info.ok_or_else(|| drover_store::Error::NotValid { path: path.clone() }.into())
    }

    fn outputs(&self, drv: &StorePath) -> Result<Vec<StorePath>, Error> {
        Ok(self.derivation_outputs(drv)?.into_values().collect())
    }
}
