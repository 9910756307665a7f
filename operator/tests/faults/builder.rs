//! Conversations with builders of the double: what a session reaches, from the builder's side of it.
//!
//! The builder itself is [`crate::cluster`]'s: it goes on building when its session breaks off, and the next one finds the
//! same build. Outputs that are received are in a real cache, as far as a narinfo file makes them so.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use drover_api::{OutputStatus, Reason, Timings, Transfer};
use drover_nix::{Sha256, StoreDir, StorePath};
use drover_operator::session::{Assignment, Conversation, Progress};
use drover_operator::world::{SessionEnd, Stage};
use futures::FutureExt as _;
use futures::future::{self, BoxFuture};
use jiff::Timestamp;
use tokio::sync::watch;

use crate::cluster::{Answer, World};

/// From one stage to the next.
const STAGE: Duration = Duration::from_millis(20);

pub(crate) struct Talk {
    pub(crate) world: Arc<World>,
    /// Whether the operator lives.
    pub(crate) alive: Arc<AtomicBool>,
}

impl Conversation for Talk {
    fn hold(
        &self,
        assignment: Assignment,
        progress: Arc<Progress>,
        mut stopped: watch::Receiver<bool>,
    ) -> BoxFuture<'static, SessionEnd> {
        let session = Session { world: self.world.clone(), alive: self.alive.clone(), assignment, progress };
        async move {
            tokio::select! {
                end = session.run() => end,
                _ = stopped.changed() => failed(Reason::InfrastructureFailure, "given up"),
            }
        }
        .boxed()
    }
}

struct Session {
    world: Arc<World>,
    alive: Arc<AtomicBool>,
    assignment: Assignment,
    progress: Arc<Progress>,
}

impl Session {
    async fn run(&self) -> SessionEnd {
        match self.stages().await {
            Ok(end) => end,
            Err(Lost) => failed(Reason::ConnectionLost, "the connection broke"),
        }
    }

    async fn stages(&self) -> Result<SessionEnd, Lost> {
        self.wait_for(|builder| *builder != Answer::NotYet).await?;
        self.reach(Stage::Ready).await?;
        self.reach(Stage::CopyingInputs).await?;
        let dir = StoreDir::default();
        let job = &self.assignment.job;
        for input in &job.derivation.input_srcs {
            if !self.narinfo(input).exists() {
                return Ok(failed(Reason::InputMissing, &format!("no cache has {}", dir.full(input))));
            }
        }
        self.reach(Stage::InputsCopied).await?;
        let Answer::Until(done) = self.world.build(&self.assignment.pod_uid, &job.drv_path) else {
            return Err(Lost);
        };
        self.reach(Stage::Building).await?;
        self.wait_until(done).await?;
        if job.derivation.env("fail").is_some() {
            return Ok(failed(Reason::BuildFailed, "builder failed with exit code 1"));
        }
        self.reach(Stage::Built).await?;
        self.reach(Stage::Collecting).await?;
        let mut outputs = BTreeMap::new();
        for (name, path) in job.derivation.output_paths(&dir).expect("paths that are right") {
            let path = path.expect("paths that are known before the build");
            outputs.insert(name.to_string(), self.keep(&path));
        }
        Ok(SessionEnd::Finished { outputs, transfer: Transfer::default(), timings: Timings::default() })
    }

    async fn reach(&self, stage: Stage) -> Result<(), Lost> {
        tokio::time::sleep(STAGE).await;
        self.while_alive().await;
        if self.world.builder(&self.assignment.pod_uid) == Answer::Lost {
            return Err(Lost);
        }
        self.progress.reach(stage);
        Ok(())
    }

    async fn wait_until(&self, done: Timestamp) -> Result<(), Lost> {
        let left = done.duration_since(self.world.time.now());
        let sleep = tokio::time::sleep(Duration::try_from(left).unwrap_or_default());
        tokio::select! {
            () = sleep => Ok(()),
            lost = self.wait_for(|_| false) => lost,
        }
    }

    async fn wait_for(&self, enough: impl Fn(&Answer) -> bool) -> Result<(), Lost> {
        let mut changed = self.world.changed();
        let mut objects = self.world.server.changed();
        loop {
            self.while_alive().await;
            match self.world.builder(&self.assignment.pod_uid) {
                Answer::Lost => return Err(Lost),
                answer if enough(&answer) => return Ok(()),
                _ => {}
            }
            tokio::select! {
                _ = changed.changed() => {}
                _ = objects.changed() => {}
            }
        }
    }

    /// What a dead operator's sessions want has no effect.
    async fn while_alive(&self) {
        if !self.alive.load(Ordering::Relaxed) {
            future::pending::<()>().await;
        }
    }

    fn narinfo(&self, path: &StorePath) -> std::path::PathBuf {
        let name = path.to_string();
        let (hash, _) = name.split_once('-').expect("a store path has a hash");
        self.world.cache().join(format!("{hash}.narinfo"))
    }

    /// Puts the output into the cache.
    fn keep(&self, path: &StorePath) -> OutputStatus {
        let dir = StoreDir::default();
        let hash = Sha256::of(path.to_string().as_bytes()).to_string();
        let full = dir.full(path);
        let narinfo = format!(
            "StorePath: {full}\nURL: nar/x.nar\nCompression: none\nNarHash: {hash}\nNarSize: 120\nReferences: \n"
        );
        std::fs::write(self.narinfo(path), narinfo).expect("a cache that takes files");
        OutputStatus { path: full, nar_hash: hash, nar_size: 120, ..OutputStatus::default() }
    }
}

/// The builder is not there any more.
struct Lost;

fn failed(reason: Reason, message: &str) -> SessionEnd {
    let infrastructure = matches!(reason, Reason::ConnectionLost | Reason::InfrastructureFailure);
    SessionEnd::Failed { reason, message: message.to_owned(), infrastructure }
}
