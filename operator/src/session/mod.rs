//! Sessions: the operator's conversations with builders, one for each attempt that runs.
//!
//! [`Sessions`] owns them all. A session is started by a plan's action and ends by itself; how far it is and how it
//! ended is read by `observe`. It never writes to the API server: it asks for its request to be looked at, and the
//! plan decides. In the order of a session's life: [`reach`] finds the builder, [`host_key`] learns whom to expect, [`ssh`]
//! connects, [`pipe`] carries, [`job`] says what to build, [`run`] does it, [`log`] listens, [`meter`] sees that it moves.

mod handed_on;
pub mod host_key;
pub mod job;
pub mod log;
pub mod meter;
pub mod pipe;
mod reach;
mod run;
pub mod ssh;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use drover_api::{BuildRequest, Timings, Transfer};
use drover_session::{Event, Kept};
use futures::FutureExt as _;
use futures::channel::mpsc::UnboundedSender;
use futures::future::{BoxFuture, join_all};
use jiff::Timestamp;
use kube::runtime::reflector::ObjectRef;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tracing::Instrument as _;

use crate::clock::Clock;
use crate::log as lines;
use crate::metrics::Metrics;
use crate::trace::session::Recorder;
use crate::trace::{Span, Tracer};
use crate::world::{SessionEnd, SessionView, Stage};
use handed_on::HandedOn;
use log::LogTail;
pub use run::{Assignment, Talk, talk};

/// Asks for a request to be looked at.
pub type Trigger = UnboundedSender<ObjectRef<BuildRequest>>;

/// All sessions of this process, by the request's uid.
pub struct Sessions {
    by_uid: Mutex<HashMap<String, Entry>>,
    /// What sessions that were stopped have received, for those that come behind them.
    handed_on: HandedOn,
    trigger: Trigger,
    metrics: Arc<Metrics>,
    clock: Clock,
    tracer: Tracer,
    conversation: Arc<dyn Conversation>,
    places: Arc<Semaphore>,
}

/// How a session is held, from a pod that has a node to its end.
pub trait Conversation: Send + Sync {
    /// Runs to the end, or until `stopped` changes. What it reaches, it tells `progress`.
    fn hold(
        &self,
        assignment: Assignment,
        progress: Arc<Progress>,
        stopped: watch::Receiver<bool>,
    ) -> BoxFuture<'static, SessionEnd>;
}

/// The real one: one SSH connection with one `serve` behind it.
#[derive(Debug)]
pub struct Ssh;

impl Conversation for Ssh {
    fn hold(
        &self,
        assignment: Assignment,
        progress: Arc<Progress>,
        stopped: watch::Receiver<bool>,
    ) -> BoxFuture<'static, SessionEnd> {
        run::run(assignment, progress, stopped).boxed()
    }
}

struct Entry {
    progress: Arc<Progress>,
    kept: Arc<Kept>,
    /// Dropped or set to true: the session gives up.
    stop: watch::Sender<bool>,
}

/// What a running session says of itself.
pub struct Progress {
    view: Mutex<SessionView>,
    tail: Mutex<Option<LogTail>>,
    request: ObjectRef<BuildRequest>,
    trigger: Trigger,
    clock: Clock,
    trace: Option<(Tracer, Mutex<Recorder>)>,
}

impl Sessions {
    /// Of which `most` run at the same time: each has threads, a process and buffers.
    pub fn new(
        trigger: Trigger,
        metrics: Arc<Metrics>,
        clock: Clock,
        tracer: Tracer,
        conversation: Arc<dyn Conversation>,
        most: u16,
    ) -> Self {
        Self {
            places: Arc::new(Semaphore::new(most.into())),
            by_uid: Mutex::default(),
            handed_on: HandedOn::default(),
            trigger,
            metrics,
            clock,
            tracer,
            conversation,
        }
    }

    /// Starts a session unless this very one runs already. An older one of the same request is stopped.
    pub fn start(&self, uid: &str, mut assignment: Assignment) {
        let mut by_uid = self.lock();
        if let Some(entry) = by_uid.get(uid) {
            let view = entry.progress.view();
            if (view.attempt, &view.pod_uid) == (assignment.attempt, &assignment.pod_uid) {
                return;
            }
        }
        let namespace = assignment.request.namespace.clone().unwrap_or_default();
        let span = lines::of_request(&namespace, &assignment.request.name, uid, Some(assignment.attempt));
        let (request, pod_uid) = (assignment.request.clone(), assignment.pod_uid.clone());
        let (trigger, clock) = (self.trigger.clone(), self.clock.clone());
        let recorder =
            Recorder::new(assignment.trace.clone(), assignment.attempt, &assignment.pod, clock.now());
        let progress = Progress::new(request, assignment.attempt, pod_uid, trigger, clock);
        let progress = Arc::new(progress.traced(self.tracer.clone(), recorder));
        let (stop, mut stopped) = watch::channel(false);
        let places = self.places.clone();
        let kept = self.handed_on.take(uid, assignment.attempt, &assignment.pod_uid);
        assignment.kept = kept.clone();
        by_uid.insert(uid.to_owned(), Entry { progress: progress.clone(), kept, stop });
        let sessions = self.metrics.sessions.clone();
        sessions.inc();
        let conversation = self.conversation.clone();
        let told = stopped.clone();
        let session = async move {
            let held = async {
                let Some(_place) = place(places, &progress, &mut stopped).await else {
                    return run::gave_up();
                };
                conversation.hold(assignment, progress.clone(), stopped).await
            };
            // The builder lingers; what it says to the next session is worth more than a request without an end.
            let end = AssertUnwindSafe(held).catch_unwind().await.unwrap_or_else(|_| run::fault());
            sessions.dec();
            // Told to, or forgotten by whoever held the other half.
            let was_stopped = *told.borrow() || told.has_changed().is_err();
            progress.end(end, was_stopped);
        };
        tokio::spawn(session.instrument(span));
    }

    /// What the request's session says; None if there is none.
    pub fn view(&self, uid: &str) -> Option<SessionView> {
        let progress = self.lock().get(uid)?.progress.clone();
        Some(progress.view())
    }

    /// Ends the request's session, if there is one, and forgets it.
    pub fn stop(&self, uid: &str) {
        if let Some(entry) = self.lock().remove(uid) {
            // Nobody listens any more if it has ended.
            let _ = entry.stop.send(true);
            let Entry { progress, kept, .. } = entry;
            let view = progress.view();
            self.handed_on.put(uid, view.attempt, view.pod_uid, kept);
        }
    }

    /// Ends all sessions and waits until they have let go of their builders, at most so long. Builders go on without us.
    pub async fn close(&self, limit: Duration) {
        let entries: Vec<Entry> = self.lock().drain().map(|(_, entry)| entry).collect();
        let ended = entries.iter().map(|entry| {
            let _ = entry.stop.send(true);
            // A session has the other half until its end.
            entry.stop.closed()
        });
        if tokio::time::timeout(limit, join_all(ended)).await.is_err() {
            tracing::warn!("not all sessions were closed in time");
        }
    }

    /// Uids of all requests that have a session.
    pub fn uids(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Entry>> {
        // Each change is one insertion or removal: a panic leaves the map whole.
        self.by_uid.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for a place among those that run. None if the session is stopped before it has one.
async fn place(
    places: Arc<Semaphore>,
    progress: &Progress,
    stopped: &mut watch::Receiver<bool>,
) -> Option<OwnedSemaphorePermit> {
    if let Ok(place) = places.clone().try_acquire_owned() {
        return Some(place);
    }
    progress.wait(true);
    let place = tokio::select! {
        // It is never closed.
        place = places.acquire_owned() => place.ok(),
        _ = stopped.changed() => None,
    };
    progress.wait(false);
    place
}

impl Progress {
    /// Of a session that begins.
    pub fn new(
        request: ObjectRef<BuildRequest>,
        attempt: u32,
        pod_uid: String,
        trigger: Trigger,
        clock: Clock,
    ) -> Self {
        let view = SessionView {
            attempt,
            pod_uid,
            started: clock.now(),
            waits: false,
            stage: Stage::Connecting,
            sandbox: None,
            host_key: None,
            log_tail: vec![],
            counted: None,
            end: None,
            end_time: None,
        };
        Self { view: Mutex::new(view), tail: Mutex::default(), request, trigger, clock, trace: None }
    }

    /// What it goes through is said there.
    #[must_use]
    pub fn traced(self, tracer: Tracer, recorder: Recorder) -> Self {
        Self { trace: Some((tracer, Mutex::new(recorder))), ..self }
    }

    /// What the session says so far.
    pub fn view(&self) -> SessionView {
        let mut view = self.lock().clone();
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        view.log_tail = tail.as_ref().map(LogTail::lines).unwrap_or_default();
        view
    }

    fn follow(&self, tail: LogTail) {
        *self.tail.lock().unwrap_or_else(PoisonError::into_inner) = Some(tail);
    }

    /// Whether it has to wait for its turn.
    fn wait(&self, waits: bool) {
        let mut view = self.lock();
        (view.waits, view.started) = (waits, self.clock.now());
        drop(view);
        self.notify();
    }

    /// The rung that the builder names.
    pub fn sandbox(&self, sandbox: Option<String>) {
        self.lock().sandbox = sandbox;
    }

    /// The builder's public key, as a line of text.
    pub fn host_key(&self, key: String) {
        self.lock().host_key = Some(key);
    }

    /// The session has come so far, or farther.
    pub fn reach(&self, stage: Stage) {
        let mut view = self.lock();
        if view.stage < stage {
            view.stage = stage;
            drop(view);
            self.notify();
        }
    }

    /// The session's thread says so.
    fn heard(&self, event: &Event) {
        self.trace(|recorder, now| recorder.event(event, now).into_iter().collect());
    }

    /// What it has done, of a session that failed.
    pub fn count(&self, counted: (Transfer, Timings)) {
        self.lock().counted = Some(counted);
    }

    fn end(&self, end: SessionEnd, was_stopped: bool) {
        self.trace(|recorder, now| recorder.end(&end, was_stopped, now));
        let mut view = self.lock();
        (view.end, view.end_time) = (Some(end), Some(self.clock.now()));
        drop(view);
        self.notify();
    }

    fn trace(&self, spans: impl FnOnce(&mut Recorder, Timestamp) -> Vec<Span>) {
        if let Some((tracer, recorder)) = &self.trace {
            // Taken for one step of it: after a panic, at worst a span is missing.
            let mut recorder = recorder.lock().unwrap_or_else(PoisonError::into_inner);
            tracer.say(|| spans(&mut recorder, self.clock.now()));
        }
    }

    fn notify(&self) {
        // The receiver is gone only while the process ends.
        let _ = self.trigger.unbounded_send(self.request.clone());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, SessionView> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
