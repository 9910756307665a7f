//! The serve protocol's requests, answered from a local store and this builder.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use drover_cache::FrameWriter;
use drover_nix::nar::{Plain, Stream};
use drover_nix::{BasicDerivation, PathInfo, StorePath};
use drover_serve::{
    Backend, Behind, BoxError, BuildOptions, BuildResult, BuildStatus, BuildTarget, ReceivedPath,
};
use drover_store::{Batch, TempRoots};

use crate::build::cancel::Cancel;
use crate::build::goals::{Goal, Made};
use crate::build::log::Log;
use crate::build::trust::Origin;
use crate::build::{Builder, Request};
use crate::error::Error;

/// Paths that become valid together, at most: each holds a lock and its file meanwhile.
const MAX_BATCH: usize = 128;

/// The end of a session whose client went away during a build.
const NOBODY_TO_TELL: &str = "the build was cancelled, and there is nobody to tell";

/// One session. Its locks last as long as it does.
pub(crate) struct Session {
    builder: Builder,
    /// None in a session that may not write.
    roots: Option<TempRoots>,
    /// What was added and is not valid yet.
    batch: Option<Batch>,
    /// Additions of the batch that were in effect when it was settled last.
    settled: usize,
    /// Where requests come from and answers go in the end, if the kernel can move files from and to there.
    input: Option<BorrowedFd<'static>>,
    output: Option<BorrowedFd<'static>>,
    log: Log,
    cancel: Cancel,
    building: Arc<AtomicBool>,
}

impl Session {
    pub(crate) fn new(builder: Builder, write: bool, log: Log, cancel: Cancel) -> Result<Self, Error> {
        let roots = if write { Some(builder.store.temp_roots()?) } else { None };
        Ok(Self {
            builder,
            roots,
            batch: None,
            settled: 0,
            input: None,
            output: None,
            log,
            cancel,
            building: Arc::default(),
        })
    }

    /// Lets archives come from `input` and go to `output` directly, past the buffers. They have to be what the session's
    /// reader reads and its writer writes.
    pub(crate) fn with_ends(mut self, input: BorrowedFd<'static>, output: BorrowedFd<'static>) -> Self {
        (self.input, self.output) = (Some(input), Some(output));
        self
    }

    /// Whether a build is being made or waited for at the moment.
    pub(crate) fn building(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.building)
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
        self.building.store(true, Ordering::SeqCst);
        let result = self.builder.build(&Request {
            drv_path,
            drv,
            origin: Origin::Client,
            options,
            roots,
            log,
            cancel,
        });
        self.building.store(false, Ordering::SeqCst);
        Ok(result)
    }
}

impl Backend for Session {
    fn query_valid_paths(
        &mut self,
        paths: &BTreeSet<StorePath>,
        lock: bool,
        substitute: bool,
    ) -> Result<BTreeSet<StorePath>, BoxError> {
        if let Some(roots) = &self.roots {
            if lock {
                roots.add_all(paths)?;
            }
            if substitute {
                let builder = &self.builder;
                builder.substituter.fetch(&builder.store, paths, roots, &self.log, &self.cancel);
            }
        }
        Ok(self.builder.store.valid_paths(paths)?)
    }

    fn path_info(&mut self, path: &StorePath) -> Result<Option<PathInfo>, BoxError> {
        Ok(self.builder.store.path_info(path)?)
    }

    fn dump(&mut self, path: &StorePath, nar: &mut dyn Write) -> Result<(), BoxError> {
        match self.output {
            Some(end) => self.builder.store.dump_to(path, nar, end)?,
            None => self.builder.store.dump(path, nar)?,
        };
        Ok(())
    }

    fn dump_through(&mut self, path: &StorePath, nar: &mut dyn Write) -> Result<(), BoxError> {
        self.builder.store.dump(path, nar)?;
        Ok(())
    }

    fn makes_frames(&self) -> bool {
        true
    }

    fn dump_frames(
        &mut self,
        path: &StorePath,
        offset: u64,
        frames: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), BoxError> {
        let mut rest = Behind { inner: FrameWriter::new(frames), left: offset };
        let size = self.builder.store.dump(path, &mut rest)?;
        if rest.left > 0 {
            return Err(format!("{path} has {size} bytes, and what is behind {offset} is asked for").into());
        }
        Ok(rest.inner.finish()?)
    }

    fn add_nar(&mut self, path: ReceivedPath, nar: &mut dyn Read) -> Result<(), BoxError> {
        self.add_stream(path, &mut Plain(nar))
    }

    fn add_stream(&mut self, path: ReceivedPath, nar: &mut dyn Stream) -> Result<(), BoxError> {
        self.roots()?;
        let batch = match &mut self.batch {
            Some(batch) => batch,
            none => none.insert(self.builder.store.batch()?),
        };
        if batch.len() == MAX_BATCH {
            batch.commit()?;
        }
        batch.add_nar(&path.info, path.ultimate, path.registration_time, nar)?;
        Ok(())
    }

    fn input(&self) -> Option<BorrowedFd<'static>> {
        self.input
    }

    fn settle(&mut self) -> Result<(), BoxError> {
        if let Some(batch) = &mut self.batch {
            batch.commit()?;
            self.settled = batch.in_effect();
        }
        Ok(())
    }

    fn in_effect(&self) -> usize {
        self.batch.as_ref().map_or(0, Batch::in_effect) - self.settled
    }

    fn build_derivation(
        &mut self,
        drv_path: &StorePath,
        derivation: &BasicDerivation,
        options: &BuildOptions,
    ) -> Result<BuildResult, BoxError> {
        let result = self.build(drv_path, derivation, options)?;
        self.check_client()?;
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
        let mut made = Made::default();
        for target in targets {
            let result = self.make_valid(target, options, &mut made)?;
            self.check_client()?;
            if let Err(error) = result {
                let result = error.to_result();
                return Ok(Err((result.status, result.error_message)));
            }
        }
        Ok(Ok(()))
    }

    fn spool(&mut self) -> Result<File, BoxError> {
        Ok(self.builder.store.spool()?)
    }
}

impl Session {
    /// Whether there is someone to answer after a build.
    fn check_client(&self) -> Result<(), BoxError> {
        if self.cancel.is_cancelled() { Err(NOBODY_TO_TELL.into()) } else { Ok(()) }
    }

    /// What goes wrong with one target is its result, not the session's end.
    fn make_valid(
        &self,
        target: &BuildTarget,
        options: &BuildOptions,
        made: &mut Made,
    ) -> Result<Result<(), Error>, BoxError> {
        let (roots, log, cancel) = (self.roots()?, &self.log, &self.cancel);
        let (drv_path, outputs) = (&target.path, target.outputs.as_ref());
        if drv_path.is_derivation() {
            let goal = Goal { drv_path, outputs, options, roots, log, cancel };
            return Ok(self.builder.realise(&goal, made));
        }
        roots.add(&target.path)?;
        let builder = &self.builder;
        if !builder.store.is_valid(&target.path)? {
            // Where Nix's server would not: it turns substitution off for all that it makes (nix-store.cc, opServe).
            builder.substituter.fetch(&builder.store, &[target.path.clone()].into(), roots, log, cancel);
        }
        if builder.store.is_valid(&target.path)? {
            return Ok(Ok(()));
        }
        let full = builder.store.store_dir().full(&target.path);
        let message = format!("path '{full}' is not valid, and no cache of this builder has it");
        Ok(Err(Error::Verdict { status: BuildStatus::NoSubstituters, message }))
    }
}
