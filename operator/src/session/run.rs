//! One session, from a pod that has a node to the end of the build.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_api::{BuildRequest, Reason};
use drover_serve::SLOWEST_FETCH;
use drover_session::{Event, Job, Kept, Tally};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::sync::watch;

use super::host_key::HostKey;
use super::job::{self, Caches, JobPlan};
use super::log::Log;
use super::meter::{FLOOR, Meter};
use super::pipe::Pipes;
use super::{Progress, reach};
use crate::keys::ClientKey;
use crate::log::carried;
use crate::settings::Timeouts;
use crate::trace::Context;
use crate::world::{SessionEnd, Stage};

/// How long the log may go on after the build has ended.
const LOG_PATIENCE: Duration = Duration::from_secs(5);

/// All that a session needs.
pub struct Assignment {
    pub request: ObjectRef<BuildRequest>,
    pub trace: Context,
    pub request_uid: String,
    pub attempt: u32,
    pub pods: Api<Pod>,
    /// What the watch has seen of them.
    pub pods_seen: Store<Pod>,
    pub pod: String,
    pub pod_uid: String,
    /// The builder's key, if an earlier session has learned it.
    pub host_key: Option<HostKey>,
    pub client_key: ClientKey,
    pub job: JobPlan,
    pub caches: Arc<Caches>,
    pub work_dir: PathBuf,
    pub timeouts: Timeouts,
    /// What earlier sessions with this builder have received; the sessions' keeper fills it in.
    pub kept: Arc<Kept>,
}

/// What there is to be said to a builder that has been reached.
pub struct Talk {
    pub job: JobPlan,
    pub caches: Arc<Caches>,
    pub work_dir: PathBuf,
    /// Copying during which nothing moves for so long is given up.
    pub stall: Duration,
    /// From a pod with a node to a connection.
    pub reached_after: Duration,
    pub kept: Arc<Kept>,
}

/// Runs to the end, or until `stopped`.
pub(super) async fn run(
    assignment: Assignment,
    progress: Arc<Progress>,
    mut stopped: watch::Receiver<bool>,
) -> SessionEnd {
    let begun = Instant::now();
    let timeout = assignment.timeouts.start;
    let reached = tokio::select! {
        reached = tokio::time::timeout(timeout, reach::reach(&assignment, &progress)) => reached,
        _ = stopped.changed() => return gave_up(),
    };
    let (connection, pipes) = match reached {
        Ok(Ok(reached)) => reached,
        Ok(Err(error)) => return unreachable(error.to_string()),
        Err(_) => {
            let (pod, seconds) = (&assignment.pod, timeout.as_secs());
            return unreachable(format!("the builder in pod {pod} did not answer within {seconds} s"));
        }
    };
    let Assignment { job, caches, work_dir, timeouts, kept, .. } = assignment;
    let reached_after = begun.elapsed();
    let talk_of = Talk { job, caches, work_dir, stall: timeouts.stall, reached_after, kept };
    let end = talk(talk_of, pipes, progress, stopped.clone()).await;
    connection.close().await;
    // Whoever waits for the session to be over waits for this half to go.
    drop(stopped);
    end
}

/// Says it over these pipes, until the end, or until `stopped`, or until nothing moves any more. Threads that are left over
/// then end as soon as they look at a pipe.
pub async fn talk(
    talk: Talk,
    pipes: Pipes,
    progress: Arc<Progress>,
    mut stopped: watch::Receiver<bool>,
) -> SessionEnd {
    let Talk { job: plan, caches, work_dir, stall, reached_after, kept } = talk;
    let Pipes { stdin, stdout, stderr, meter, cut } = pipes;
    let log = match Log::follow(stderr, &work_dir) {
        Ok(log) => log,
        Err(error) => return infrastructure(error.to_string()),
    };
    progress.follow(log.tail());
    let ended = cut.ended();
    let mut build = tokio::task::spawn_blocking({
        let (meter, progress) = (meter.clone(), progress.clone());
        carried(move || {
            let mut job = match plan.open(&caches) {
                Ok(job) => job,
                Err(error) => return infrastructure(error.to_string()),
            };
            job.caches = job.caches.into_iter().map(|cache| meter.watch(cache)).collect();
            job.push = job.push.map(|cache| meter.watch(cache));
            job.kept = kept;
            let mut observer = |event: Event| observe(&progress, &meter, &event);
            // Both pipes are consumed: when this returns, the builder has seen the end of its input.
            let mut tally = Tally::default();
            let result = drover_session::run_counting(stdout, stdin, &job, &mut observer, &mut tally);
            meter.rest(false);
            let tail = log.tail();
            // A session that was given up may have another behind it by now, which has more of the log.
            if !ended.is_over() {
                keep_log(&job, log);
            }
            match result {
                Ok(outcome) => job::finished(&job.dir, &outcome, reached_after),
                Err(failure) => {
                    progress.count(job::counted(&tally, reached_after));
                    job::failed(&failure.with_last_words(&tail.lines()))
                }
            }
        })
    });
    let end = tokio::select! {
        end = &mut build => end,
        _ = stopped.changed() => return gave_up(),
        () = meter.stalled(stall) => return stalled(&progress, stall),
    };
    drop(cut);
    end.unwrap_or_else(|panic| {
        tracing::error!(error = &panic as &dyn std::error::Error, "a session's thread ended badly");
        fault()
    })
}

fn observe(progress: &Progress, meter: &Meter, event: &Event) {
    tracing::debug!(?event, "session");
    progress.heard(event);
    match event {
        Event::CacheSetAside { cache, path, why } => {
            tracing::warn!(cache, %path, why, "a cache is set aside");
        }
        Event::BuildStarted => meter.rest(true),
        Event::Built { .. } => meter.rest(false),
        // The builder gives up what is slower, so that one which says nothing for longer is gone.
        Event::FetchStarted { bytes, .. } => meter.wait(Duration::from_secs(bytes / SLOWEST_FETCH)),
        Event::Fetched { .. } => meter.wait(Duration::ZERO),
        _ => {}
    }
    match event {
        Event::Connected { .. } => progress.reach(Stage::Ready),
        Event::Locked { .. } => progress.reach(Stage::CopyingInputs),
        // Followed at once by the start of the build: one look at the request for both.
        Event::BuildStarted => progress.reach(Stage::Building),
        Event::Built { result } if result.status.is_success() => progress.reach(Stage::Built),
        Event::OutputStarted { .. } => progress.reach(Stage::Collecting),
        _ => {}
    }
}

/// Waits for the log's end, and puts the log where `nix log` finds it. A build whose log is lost is still a build.
fn keep_log(job: &Job, log: Log) {
    let file = log.into_file(LOG_PATIENCE);
    let Some(cache) = &job.push else { return };
    let derivation = &job.drv_path;
    match file {
        Some(mut file) => {
            if let Err(error) = cache.put_log(derivation, &mut file) {
                let (cache, error) = (cache.url(), &error as &dyn std::error::Error);
                tracing::warn!(%derivation, cache, error, "the build's log was not kept");
            }
        }
        None => tracing::warn!(%derivation, "the build's log did not end in time; it was not kept"),
    }
}

/// The session's own fault.
pub(super) fn fault() -> SessionEnd {
    infrastructure("the session ended by a fault in the operator; its log says more".into())
}

pub(super) fn gave_up() -> SessionEnd {
    infrastructure("the operator gave this session up".into())
}

fn stalled(progress: &Progress, stall: Duration) -> SessionEnd {
    let doing = match progress.view().stage {
        Stage::Connecting => "greeting the builder",
        Stage::Ready | Stage::CopyingInputs => "copying inputs",
        Stage::InputsCopied | Stage::Building => "asking for the build",
        Stage::Built | Stage::Collecting => "collecting outputs",
    };
    infrastructure(format!(
        "{doing}: less than {FLOOR} bytes have moved between builder, operator and caches in {} s",
        stall.as_secs()
    ))
}

fn infrastructure(message: String) -> SessionEnd {
    SessionEnd::Failed { reason: Reason::InfrastructureFailure, message, infrastructure: true }
}

fn unreachable(message: String) -> SessionEnd {
    SessionEnd::Failed { reason: Reason::ConnectionLost, message, infrastructure: true }
}
