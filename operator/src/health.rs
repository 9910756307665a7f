//! What `/healthz` and `/readyz` say: is this process alive, and can it do its part?
//!
//! Owns the signs of life of the process's own loops and what is known of its watches and its lease. It asks nobody anything:
//! who does the work says here that it is done. The two answers are for two who act on them:
//!
//! - A kubelet restarts a process that is not *live*. So that says what a restart mends, and nothing else: a loop of our own
//!   that stands still, or a task that ended. An API server that is away is no such thing; builds go on through it.
//! - A rollout waits for a process that is *ready*, and people look there first. So that says as well whether the watches have
//!   delivered and go on, and whether the lease is known: held, or seen in another's hands.
//!
//! Synchronous; times are this process's monotonic clock, and come in as an argument where something is judged.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::gate::Gate;
use crate::ready::Watch;

/// A watch that has been broken for so long makes the operator unready; it has tried at least twice by then (kube-runtime's
/// backoff has 30 s at most).
const BROKEN_LIMIT: Duration = Duration::from_secs(60);
/// A broken watch fails again within this: the longest backoff, and a connection that is not made in 30 s. One that is silent for
/// longer goes on; success is not told before the next change of an object.
const STREAK: Duration = Duration::from_secs(75);
/// A Lease that was not seen for so long may be anybody's.
const VIEW_LIMIT: Duration = Duration::from_secs(60);

/// A loop that goes on for as long as the process does, and says so.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loop {
    /// The async runtime itself: its threads and its timers.
    Runtime,
    /// Keeping the lease, or standing by for it.
    Lease,
    /// The controller: what is asked to be looked at is looked at.
    Reconciles,
    /// Clearing away what lost its request.
    Sweeps,
}

impl Loop {
    const ALL: [Self; 4] = [Self::Runtime, Self::Lease, Self::Reconciles, Self::Sweeps];

    pub fn name(self) -> &'static str {
        match self {
            Self::Runtime => "runtime",
            Self::Lease => "lease-loop",
            Self::Reconciles => "reconcile-loop",
            Self::Sweeps => "sweep-loop",
        }
    }

    /// How long it may be silent: well above what it takes with an API server that answers nothing, where every call has its limit.
    const fn patience(self) -> Duration {
        match self {
            Self::Runtime => Duration::from_secs(30),
            // Two calls of 3 s and a retry period.
            Self::Lease => Duration::from_secs(90),
            // All places taken by passes that wait for caches (60 s) and calls (15 s each).
            Self::Reconciles | Self::Sweeps => Duration::from_secs(900),
        }
    }
}

/// One line of an answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Check {
    pub name: Cow<'static, str>,
    /// Why not.
    pub result: Result<(), String>,
}

/// Shared by all that have to say something and by those who ask. Cheap to use: a lock that is held for a moment.
#[derive(Debug)]
pub struct Health(Mutex<State>);

#[derive(Debug)]
struct State {
    /// The last sign of life of each loop that has begun.
    beats: [Option<Instant>; Loop::ALL.len()],
    /// Tasks that ended and should not have.
    ended: BTreeSet<&'static str>,
    /// None until the process leads.
    watches: Option<Vec<(Source, WatchState)>>,
    lease: Lease,
    stopping: bool,
}

/// One connection to the API server that tells of one kind of objects.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Source {
    pub watch: Watch,
    /// None: the only connection of its watch.
    pub namespace: Option<String>,
}

impl From<Watch> for Source {
    fn from(watch: Watch) -> Self {
        Self { watch, namespace: None }
    }
}

impl Source {
    /// `watch-requests`, or `watch-requests/NAMESPACE`.
    fn check(&self) -> Cow<'static, str> {
        match &self.namespace {
            None => self.watch.check().into(),
            Some(namespace) => format!("{}/{namespace}", self.watch.check()).into(),
        }
    }
}

#[derive(Clone, Copy, Default, Debug)]
struct WatchState {
    has_listed: bool,
    /// First and last failure since it last delivered something.
    failures: Option<(Instant, Instant)>,
}

#[derive(Debug)]
enum Lease {
    /// Nobody has said anything yet.
    Unknown,
    /// This process leads without one.
    Unused,
    /// Somebody else's, as of then.
    Seen(Instant),
    /// Ours for as long as the gate is open.
    Held(Gate),
}

impl Health {
    pub fn new() -> Self {
        Self(Mutex::new(State {
            beats: [None; Loop::ALL.len()],
            ended: BTreeSet::new(),
            watches: None,
            lease: Lease::Unknown,
            stopping: false,
        }))
    }

    /// A sign of life. With the first one, the loop has begun and is expected to go on.
    pub fn beat(&self, of: Loop) {
        self.beat_at(of, Instant::now());
    }

    pub(crate) fn beat_at(&self, of: Loop, now: Instant) {
        self.lock().beats[of as usize] = Some(now);
    }

    /// Beats for the runtime that polls it, for ever.
    pub async fn beat_runtime(self: Arc<Self>) {
        loop {
            self.beat(Loop::Runtime);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Runs a task that is not to end. If it does, the process is no longer live.
    pub async fn never_ends(self: Arc<Self>, name: &'static str, task: impl Future<Output = ()>) {
        struct Ended(Arc<Health>, &'static str);
        impl Drop for Ended {
            fn drop(&mut self) {
                self.0.lock().ended.insert(self.1);
            }
        }
        // Dropped by a panic as well.
        let _ended = Ended(self, name);
        task.await;
    }

    /// The process leads, and its watches begin: these, each of which counts by itself. One that goes on says nothing for
    /// another that does not.
    pub fn watches_begin(&self, sources: impl IntoIterator<Item = Source>) {
        let sources = sources.into_iter().map(|source| (source, WatchState::default()));
        self.lock().watches = Some(sources.collect());
    }

    /// A watch has delivered something; `listed`: all that there is.
    pub fn watch_delivered(&self, source: &Source, listed: bool) {
        self.watch(source, |state| {
            state.has_listed |= listed;
            state.failures = None;
        });
    }

    /// A watch broke, and will be tried again.
    pub fn watch_failed(&self, source: &Source) {
        self.watch_failed_at(source, Instant::now());
    }

    fn watch_failed_at(&self, source: &Source, now: Instant) {
        self.watch(source, |state| {
            let first = match state.failures {
                Some((first, last)) if now.duration_since(last) < STREAK => first,
                _ => now,
            };
            state.failures = Some((first, now));
        });
    }

    fn watch(&self, source: &Source, change: impl FnOnce(&mut WatchState)) {
        let mut state = self.lock();
        let found = state.watches.iter_mut().flatten().find(|(known, _)| known == source);
        if let Some((_, state)) = found {
            change(state);
        }
    }

    /// There is no lease to hold.
    pub fn lease_unused(&self) {
        self.lock().lease = Lease::Unused;
    }

    /// The lease was read, and is another's.
    pub fn lease_seen(&self) {
        self.lock().lease = Lease::Seen(Instant::now());
    }

    /// The lease was taken, and opens this gate.
    pub fn lease_held(&self, gate: Gate) {
        self.lock().lease = Lease::Held(gate);
    }

    /// The process was told to end. It is not ready for anything from here on.
    pub fn stopping(&self) {
        self.lock().stopping = true;
    }

    /// For `/healthz`.
    pub fn live(&self, now: Instant) -> Vec<Check> {
        let state = self.lock();
        let mut checks: Vec<Check> = Loop::ALL
            .into_iter()
            .filter_map(|of| {
                let silent = now.saturating_duration_since(state.beats[of as usize]?);
                let result = match silent > of.patience() {
                    true => Err(format!(
                        "no sign of life for {} s; {} s would be long",
                        silent.as_secs(),
                        of.patience().as_secs()
                    )),
                    false => Ok(()),
                };
                Some(Check { name: of.name().into(), result })
            })
            .collect();
        let ended: Vec<&str> = state.ended.iter().copied().collect();
        let result = match ended.as_slice() {
            // What is told to end ends.
            _ if state.stopping => Ok(()),
            [] => Ok(()),
            names => Err(format!("ended, and should not have: {}", names.join(", "))),
        };
        checks.push(Check { name: "tasks".into(), result });
        checks
    }

    /// For `/readyz`.
    pub fn ready(&self, now: Instant) -> Vec<Check> {
        let state = self.lock();
        let stopping = if state.stopping { Err("the process was told to end".to_owned()) } else { Ok(()) };
        let mut checks = vec![Check { name: "shutdown".into(), result: stopping }];
        checks.push(Check { name: "lease".into(), result: state.lease(now) });
        match (&state.watches, &state.lease) {
            (Some(watches), _) => checks.extend(
                watches
                    .iter()
                    .map(|(source, state)| Check { name: source.check(), result: state.judge(now) }),
            ),
            // It stands by: to be there is all that it can do, and it is.
            (None, Lease::Seen(_)) => {}
            (None, _) => {
                let result = Err("they have not begun yet".into());
                checks.push(Check { name: "watches".into(), result });
            }
        }
        checks
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment or insertion: whole after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn lease(&self, now: Instant) -> Result<(), String> {
        match &self.lease {
            Lease::Unused => Ok(()),
            Lease::Unknown => Err("it has not been read yet".into()),
            Lease::Seen(at) => match now.saturating_duration_since(*at) {
                ago if ago > VIEW_LIMIT => {
                    Err(format!("another held it {} s ago, and it could not be read since", ago.as_secs()))
                }
                _ => Ok(()),
            },
            Lease::Held(gate) if gate.is_open() => Ok(()),
            Lease::Held(_) => Err("it was lost or given back; this process writes no more".into()),
        }
    }
}

impl WatchState {
    fn judge(&self, now: Instant) -> Result<(), String> {
        let broken = self.failures.filter(|(_, last)| now.saturating_duration_since(*last) < STREAK);
        let broken_for = broken.map(|(first, _)| now.saturating_duration_since(first));
        match broken_for {
            _ if !self.has_listed => Err("the first list has not come in yet".into()),
            Some(long) if long > BROKEN_LIMIT => Err(format!("broken for {} s", long.as_secs())),
            _ => Ok(()),
        }
    }
}

impl Default for Health {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn failing(checks: &[Check]) -> Vec<&str> {
        checks.iter().filter(|check| check.result.is_err()).map(|check| &*check.name).collect()
    }

    /// A leader with one connection for each watch.
    fn begin(health: &Health) {
        health.watches_begin(Watch::ALL.map(Source::from));
    }

    fn list_all(health: &Health) {
        Watch::ALL.into_iter().for_each(|watch| health.watch_delivered(&watch.into(), true));
    }

    #[test]
    fn a_loop_that_stands_still_is_not_live() {
        let health = Health::new();
        let begin = Instant::now();
        // One that has not begun is not expected.
        assert!(failing(&health.live(begin + SECOND * 10_000)).is_empty());
        for of in Loop::ALL {
            health.beat(of);
        }
        let now = Instant::now();
        assert!(failing(&health.live(now + SECOND * 29)).is_empty());
        assert_eq!(failing(&health.live(now + SECOND * 31)), ["runtime"]);
        assert_eq!(failing(&health.live(now + SECOND * 91)), ["runtime", "lease-loop"]);
        assert_eq!(failing(&health.live(now + SECOND * 901)).len(), Loop::ALL.len());
    }

    #[tokio::test]
    async fn a_task_that_ended_is_not_live_however_it_ended() {
        let health = Arc::new(Health::new());
        let waits = tokio::spawn(health.clone().never_ends("waits", std::future::pending()));
        tokio::task::yield_now().await;
        assert!(failing(&health.live(Instant::now())).is_empty());
        tokio::spawn(health.clone().never_ends("returns", async {})).await.unwrap();
        assert_eq!(failing(&health.live(Instant::now())), ["tasks"]);
        let panics =
            tokio::spawn(health.clone().never_ends("panics", async { panic!("as the test wants it") }));
        assert!(panics.await.is_err());
        let said = health.live(Instant::now()).pop().unwrap().result.unwrap_err();
        assert!(said.ends_with(": panics, returns"), "{said}");
        // They all do when the process ends, and that is in order.
        health.stopping();
        assert!(failing(&health.live(Instant::now())).is_empty());
        waits.abort();
    }

    #[test]
    fn a_leader_is_ready_when_every_watch_has_listed() {
        let health = Health::new();
        let now = Instant::now();
        assert_eq!(failing(&health.ready(now)), ["lease", "watches"]);
        health.lease_held(Gate::open());
        assert_eq!(failing(&health.ready(now)), ["watches"]);
        begin(&health);
        assert_eq!(failing(&health.ready(now)), ["watch-classes", "watch-pods", "watch-requests"]);
        health.watch_delivered(&Watch::Pods.into(), true);
        health.watch_delivered(&Watch::Classes.into(), false);
        assert_eq!(failing(&health.ready(now)), ["watch-classes", "watch-requests"]);
        health.watch_delivered(&Watch::Classes.into(), true);
        health.watch_delivered(&Watch::Requests.into(), true);
        assert!(failing(&health.ready(now)).is_empty());
        health.stopping();
        assert_eq!(failing(&health.ready(now)), ["shutdown"]);
    }

    #[test]
    fn a_watch_that_stays_broken_is_not_ready_and_still_live() {
        let health = Health::new();
        health.lease_unused();
        begin(&health);
        list_all(&health);
        let begin = Instant::now();
        let fail_at = |seconds: u32| health.watch_failed_at(&Watch::Pods.into(), begin + SECOND * seconds);
        fail_at(0);
        fail_at(30);
        assert!(failing(&health.ready(begin + SECOND * 60)).is_empty(), "not for long enough");
        fail_at(60);
        assert_eq!(failing(&health.ready(begin + SECOND * 61)), ["watch-pods"]);
        assert!(failing(&health.live(begin + SECOND * 61)).is_empty());
        // It goes on when it delivers, or when no further failure comes.
        assert!(failing(&health.ready(begin + SECOND * 136)).is_empty());
        // Another one, long after: the streak begins anew.
        fail_at(200);
        fail_at(230);
        assert!(failing(&health.ready(begin + SECOND * 231)).is_empty());
        fail_at(261);
        assert_eq!(failing(&health.ready(begin + SECOND * 262)), ["watch-pods"]);
        health.watch_delivered(&Watch::Pods.into(), false);
        assert!(failing(&health.ready(begin + SECOND * 262)).is_empty());
    }

    #[test]
    fn one_namespace_does_not_speak_for_another() {
        let health = Health::new();
        health.lease_unused();
        let source =
            |namespace: &str| Source { watch: Watch::Requests, namespace: Some(namespace.to_owned()) };
        let (good, bad) = (source("good"), source("bad"));
        health.watches_begin([good.clone(), bad.clone()]);
        health.watch_delivered(&good, true);
        // What is not watched is nobody's business.
        health.watch_delivered(&source("other"), true);
        let now = Instant::now();
        let checks = health.ready(now);
        assert_eq!(failing(&checks), ["watch-requests/bad"]);
        assert!(checks.iter().any(|check| check.name == "watch-requests/good" && check.result.is_ok()));
        health.watch_delivered(&bad, true);
        assert!(failing(&health.ready(now)).is_empty());
        for seconds in [0, 30, 60] {
            health.watch_failed_at(&bad, now + SECOND * seconds);
            health.watch_delivered(&good, true);
        }
        assert_eq!(failing(&health.ready(now + SECOND * 61)), ["watch-requests/bad"]);
    }

    #[test]
    fn a_standby_is_ready_while_it_sees_the_lease() {
        let health = Health::new();
        health.lease_seen();
        let now = Instant::now();
        assert!(failing(&health.ready(now + SECOND * 59)).is_empty());
        assert_eq!(failing(&health.ready(now + SECOND * 61)), ["lease"]);
        assert!(
            failing(&health.live(now + SECOND * 61)).is_empty(),
            "a restart does not bring the API server back"
        );
    }

    #[test]
    fn a_leader_that_lost_its_lease_is_not_ready() {
        let (health, gate) = (Health::new(), Gate::open());
        health.lease_held(gate.clone());
        begin(&health);
        list_all(&health);
        assert!(failing(&health.ready(Instant::now())).is_empty());
        gate.close();
        assert_eq!(failing(&health.ready(Instant::now())), ["lease"]);
    }
}
