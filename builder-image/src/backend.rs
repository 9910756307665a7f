//! The serve protocol's requests, answered from a local store and this builder.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};

use drover_nix::{BasicDerivation, OutputName, PathInfo, StorePath};
use drover_serve::{Backend, BoxError, BuildOptions, BuildResult, BuildStatus, BuildTarget, ReceivedPath};
use drover_store::TempRoots;

use crate::build::log::Log;
use crate::build::supervise::Cancel;
use crate::build::{Builder, Request};
use crate::error::Error;

/// One session. Its locks last as long as it does.
pub(crate) struct Session {
    builder: Builder,
    /// None in a session that may not write.
    roots: Option<TempRoots>,
    log: Log,
    cancel: Cancel,
}

impl Session {
    pub(crate) fn new(builder: Builder, write: bool, log: Log, cancel: Cancel) -> Result<Self, Error> {
        let roots = if write { Some(builder.store.temp_roots()?) } else { None };
        Ok(Self { builder, roots, log, cancel })
    }

    fn roots(&self) -> Result<&TempRoots, BoxError> {
        self.roots.as_ref().ok_or_else(|| "this session is read-only".into())
    }

    fn build(
        &self,
        drv_path: &StorePath,
        drv: &BasicDerivation,
        options: &BuildOptions,
    ) -> Result<BuildResult, BoxError> {
        let (roots, log, cancel) = (self.roots()?, &self.log, &self.cancel);
        Ok(self.builder.build(&Request { drv_path, drv, options, roots, log, cancel }))
    }
}

impl Backend for Session {
    fn query_valid_paths(
        &mut self,
        paths: &BTreeSet<StorePath>,
        lock: bool,
        _substitute: bool,
    ) -> Result<BTreeSet<StorePath>, BoxError> {
        if lock && let Some(roots) = &self.roots {
            roots.add_all(paths)?;
        }
        Ok(self.builder.store.valid_paths(paths)?)
    }

    fn path_info(&mut self, path: &StorePath) -> Result<Option<PathInfo>, BoxError> {
        Ok(self.builder.store.path_info(path)?)
    }

    fn dump(&mut self, path: &StorePath, nar: &mut dyn Write) -> Result<(), BoxError> {
        self.builder.store.dump(path, nar)?;
        Ok(())
    }

    fn add_nar(&mut self, path: ReceivedPath, nar: &mut dyn Read) -> Result<(), BoxError> {
        self.roots()?.add(&path.info.path)?;
        self.builder.store.add_nar(&path.info, path.ultimate, path.registration_time, nar)?;
        Ok(())
    }

    fn build_derivation(
        &mut self,
        drv_path: &StorePath,
        derivation: &BasicDerivation,
        options: &BuildOptions,
    ) -> Result<BuildResult, BoxError> {
        let result = self.build(drv_path, derivation, options)?;
        if self.cancel.is_cancelled() {
            return Err("the build was cancelled, and there is nobody to tell".into());
        }
        Ok(result)
    }

    fn query_closure(
        &mut self,
        paths: &BTreeSet<StorePath>,
        include_outputs: bool,
    ) -> Result<BTreeSet<StorePath>, BoxError> {
        let store = &self.builder.store;
        let mut closure = store.closure(paths)?;
        if !include_outputs {
            return Ok(closure);
        }
        let mut seen = BTreeSet::new();
        loop {
            let drvs: Vec<_> =
                closure.iter().filter(|p| p.is_derivation() && !seen.contains(*p)).cloned().collect();
            if drvs.is_empty() {
                return Ok(closure);
            }
            let mut outputs = BTreeSet::new();
            for drv in drvs {
                outputs.extend(store.derivation_outputs(&drv)?.into_values());
                seen.insert(drv);
            }
            closure.extend(store.closure(&store.valid_paths(&outputs)?)?);
        }
    }

    fn build_paths(
        &mut self,
        targets: &[BuildTarget],
        options: &BuildOptions,
    ) -> Result<Result<(), (BuildStatus, String)>, BoxError> {
        for target in targets {
            let failed = if target.path.is_derivation() {
                self.build_drv(&target.path, target.outputs.as_ref(), options)?
            } else if self.builder.store.is_valid(&target.path)? {
                None
            } else {
                let why = format!("path '{}' is not valid, and nothing is substituted here", target.path);
                Some((BuildStatus::NoSubstituters, why))
            };
            if let Some(failed) = failed {
                return Ok(Err(failed));
            }
        }
        Ok(Ok(()))
    }

    fn spool(&mut self) -> Result<File, BoxError> {
        let dir = self.builder.store.temp_dir()?;
        let path = dir.path().join("spool");
        let mut options = File::options();
        // The guard deletes the name; the file lives as long as it is open.
        Ok(options.read(true).write(true).create_new(true).open(path)?)
    }
}

impl Session {
    /// Builds a `.drv` of the store whose inputs are all valid. None if it went well.
    fn build_drv(
        &self,
        path: &StorePath,
        wanted: Option<&BTreeSet<OutputName>>,
        options: &BuildOptions,
    ) -> Result<Option<(BuildStatus, String)>, BoxError> {
        let store = &self.builder.store;
        let drv = store.read_derivation(path)?;
        let unknown = wanted.into_iter().flatten().find(|name| !drv.basic.outputs.contains_key(*name));
        if let Some(name) = unknown {
            return Ok(Some((
                BuildStatus::InputRejected,
                format!("derivation '{path}' has no output `{name}`"),
            )));
        }
        let resolved = drv.resolve(|input, output| {
            let outputs = store.derivation_outputs(input).ok()?;
            outputs.get(output).cloned()
        });
        let resolved = match resolved {
            Ok(resolved) => resolved,
            Err(error) => return Ok(Some((BuildStatus::InputRejected, error.to_string()))),
        };
        let result = self.build(path, &resolved, options)?;
        Ok((!result.status.is_success()).then_some((result.status, result.error_message)))
    }
}
