//! One session, from a pod that has a node to the end of the build.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_api::{BuildRequest, Reason};
use drover_session::{Event, Job};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::sync::watch;

use super::Progress;
use super::host_key;
use super::job::{self, Caches, JobPlan};
use super::log::Log;
use super::ssh::{Connection, Pipes, Target};
use crate::error::Error;
use crate::keys::ClientKey;
use crate::pod;
use crate::settings::BUILDER_PORT;
use crate::world::{SessionEnd, Stage};

/// From a pod that has a node to a builder that answers; pulling the image is in it.
const REACH_TIMEOUT: Duration = Duration::from_secs(600);
/// Between two looks for the pod's address, which the kubelet reports a moment after the container started.
const ADDRESS_WAIT: Duration = Duration::from_millis(20);
/// How long the log may go on after the build has ended.
const LOG_PATIENCE: Duration = Duration::from_secs(5);

/// All that a session needs.
pub struct Assignment {
    pub request: ObjectRef<BuildRequest>,
    pub request_uid: String,
    pub attempt: u32,
    pub pods: Api<Pod>,
    /// What the watch has seen of them.
    pub pods_seen: Store<Pod>,
    pub pod: String,
    pub pod_uid: String,
    pub client_key: ClientKey,
    pub job: JobPlan,
    pub caches: Arc<Caches>,
    pub work_dir: PathBuf,
}

/// Runs to the end, or until `stopped`.
pub(super) async fn run(
    assignment: Assignment,
    progress: Arc<Progress>,
    mut stopped: watch::Receiver<bool>,
) -> SessionEnd {
    let begun = Instant::now();
    let gave_up = || infrastructure("the operator gave this session up".into());
    let reached = tokio::select! {
        reached = tokio::time::timeout(REACH_TIMEOUT, reach(&assignment, &progress)) => reached,
        _ = stopped.changed() => return gave_up(),
    };
    let (connection, pipes) = match reached {
        Ok(Ok(reached)) => reached,
        Ok(Err(error)) => return unreachable(error.to_string()),
        Err(_) => {
            let seconds = REACH_TIMEOUT.as_secs();
            return unreachable(format!(
                "the builder in pod {} did not answer within {seconds} s",
                assignment.pod
            ));
        }
    };
    let reached_after = begun.elapsed();
    let log = match Log::follow(pipes.stderr, &assignment.work_dir) {
        Ok(log) => log,
        Err(error) => {
            connection.close().await;
            return infrastructure(error.to_string());
        }
    };
    progress.follow(log.tail());
    let Assignment { job: plan, caches, pod, .. } = assignment;
    let (stdin, stdout) = (pipes.stdin, pipes.stdout);
    let mut build = tokio::task::spawn_blocking(move || {
        let job = match plan.open(&caches) {
            Ok(job) => job,
            Err(error) => return infrastructure(error.to_string()),
        };
        let mut observer = |event: Event| observe(&progress, &event);
        // Both pipes are consumed: when this returns, the builder has seen the end of its input.
        let result = drover_session::run(stdout, stdin, &job, &mut observer);
        let tail = log.tail();
        keep_log(&job, log);
        match result {
            Ok(outcome) => job::finished(&job.dir, &outcome, reached_after),
            Err(failure) => job::failed(&failure.with_last_words(&tail.lines())),
        }
    });
    let end = tokio::select! {
        end = &mut build => Some(end),
        _ = stopped.changed() => None,
    };
    connection.close().await;
    match end {
        Some(Ok(end)) => end,
        Some(Err(panic)) => {
            tracing::error!(pod, error = &panic as &dyn std::error::Error, "a session's thread ended badly");
            infrastructure("the session ended by a fault in the operator; its log says more".into())
        }
        // The thread sees its pipes end and goes by itself.
        None => gave_up(),
    }
}

/// Learns the builder's key and address and connects.
async fn reach(assignment: &Assignment, progress: &Progress) -> Result<(Connection, Pipes), Error> {
    let greeting = host_key::greeting(&assignment.pods, &assignment.pod, pod::CONTAINER).await?;
    progress.sandbox(greeting.sandbox);
    let address = address(assignment).await?;
    let target = Target {
        address,
        port: BUILDER_PORT,
        alias: &format!("drover-{}-{}", assignment.request_uid, assignment.attempt),
        host_key: &greeting.host_key,
        client_key: &assignment.client_key,
    };
    Connection::open(&target, &assignment.work_dir).await
}

/// The pod's address, as soon as the kubelet has reported it.
async fn address(assignment: &Assignment) -> Result<IpAddr, Error> {
    let namespace = assignment.pods.namespace().unwrap_or_default().to_owned();
    let key = ObjectRef::new(&assignment.pod).within(&namespace);
    for look in 0u32.. {
        // The watch is nearly always first; asking now and then makes up for one that lags.
        let pod = match assignment.pods_seen.get(&key) {
            Some(pod) => Some(pod),
            None if look % 50 == 0 => {
                let pod = assignment.pods.get_opt(&assignment.pod).await;
                pod.map_err(Error::kube("read the builder's pod"))?.map(Arc::new)
            }
            None => None,
        };
        let address = pod
            .filter(|pod| pod.metadata.uid.as_deref() == Some(&assignment.pod_uid))
            .and_then(|pod| pod.status.as_ref()?.pod_ip.clone());
        if let Some(address) = address {
            return address.parse().map_err(|_| Error::Pod {
                why: format!("pod {} has the address {address:?}", assignment.pod),
            });
        }
        tokio::time::sleep(ADDRESS_WAIT).await;
    }
    // The loop has no other end; the caller bounds its time.
    Err(Error::Pod { why: format!("pod {} has no address", assignment.pod) })
}

fn observe(progress: &Progress, event: &Event) {
    tracing::debug!(request = %progress.request, ?event, "session");
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

fn infrastructure(message: String) -> SessionEnd {
    SessionEnd::Failed { reason: Reason::InfrastructureFailure, message, infrastructure: true }
}

fn unreachable(message: String) -> SessionEnd {
    SessionEnd::Failed { reason: Reason::ConnectionLost, message, infrastructure: true }
}
