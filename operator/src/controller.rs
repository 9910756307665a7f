//! The wiring: watches in, reconciles out.
//!
//! Each reconcile is observe, plan, execute. Requests come by the controller's own watch; everything else that
//! concerns a request (its pod, its class, its session) asks for a look at it by one channel. Failures back off for
//! each request by itself.

use std::future::{self, Future};
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_api::{BuildRequest, conditions};
use futures::channel::mpsc::unbounded;
use futures::{FutureExt as _, StreamExt as _};
use kube::runtime::Controller;
use kube::runtime::controller::{self, Action};
use kube::runtime::reflector::{ObjectRef, Store};
use kube::{Client, ResourceExt as _};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::{Instrument as _, Span};

use crate::backoff;
use crate::clock::Clock;
use crate::error::Error;
use crate::events::publish::Events;
use crate::execute::{Executed, execute};
use crate::health::{Health, Loop};
use crate::keys::Seed;
use crate::log;
use crate::metrics::{Metrics, census};
use crate::observe::{Freshness, observe};
use crate::operator::Operator;
use crate::plan::{Requeue, plan};
use crate::queue::Queue;
use crate::ready::{Ready, Watch};
use crate::session::{Conversation, Sessions, Trigger};
use crate::settings::Settings;
use crate::sweep;
use crate::trace::Tracer;
use crate::watches::readable::Unreadable;
use crate::watches::{self, Watches, strip};

/// Passes within one reconcile: a plan that changes what is known is followed by another one at once.
const MAX_PASSES: usize = 8;
/// A request that failed so often that it waits for so long gives back the leave to begin that it does not use.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);
/// Caches that have not answered by then have had a request looked at again in any case.
const ANSWER_LIMIT: Duration = Duration::from_secs(300);
/// A request in no namespace: there is none. And how often it is asked for.
const SIGN: &str = "heartbeat";
const SIGN_INTERVAL: Duration = Duration::from_secs(10);
/// How long sessions may take to let go of their builders.
const FAREWELL: Duration = Duration::from_secs(5);
/// How long events that wait may take after that.
const LAST_EVENTS: Duration = Duration::from_secs(2);

/// What an operator is made of.
pub struct Parts {
    pub client: Client,
    pub settings: Settings,
    pub seed: Seed,
    pub metrics: Arc<Metrics>,
    pub health: Arc<Health>,
    pub clock: Clock,
    /// How it talks with builders.
    pub conversation: Arc<dyn Conversation>,
    pub tracer: Tracer,
}

/// Runs until `shutdown` resolves, the reconciles that run have ended and the sessions are closed.
pub async fn run(parts: Parts, shutdown: impl Future<Output = ()> + Send + Sync + 'static) {
    let Parts { client, settings, seed, metrics, health, clock, conversation, tracer } = parts;
    let (trigger, triggered) = unbounded();
    let (concurrency, max_sessions) = (settings.concurrency, settings.max_sessions);
    let queue = Arc::new(Queue::new(trigger.clone()));
    let ready = Arc::new(Ready::new());
    health.watches_begin(watches::sources(&settings.scope.namespaces));
    let watches = Watches {
        client: client.clone(),
        ready: ready.clone(),
        health: health.clone(),
        metrics: metrics.clone(),
        trigger: trigger.clone(),
    };
    let unreadable = watches.unreadable(Watch::Requests);
    // Not `Controller::new`: its watch says nothing of deletions, and a pod would live on until the next sweep.
    let (known, changes) = watches.requests(&settings.scope.namespaces, queue.clone(), unreadable.clone());
    let (pods, watch_pods) = watches.pods(&settings.builder_namespace);
    let (classes, watch_classes) = match &settings.scope.classes {
        Some(given) => (watches.given(given), None),
        None => {
            let (classes, watch) = watches.classes(known.clone());
            (classes, Some(watch))
        }
    };
    let controller = Controller::for_stream(changes, known.clone())
        .with_config(controller::Config::default().concurrency(concurrency))
        .graceful_shutdown_on(shutdown)
        .reconcile_on(triggered);
    let (events, publish) = Events::new(client.clone(), metrics.clone());
    let operator = Arc::new(Operator {
        client,
        settings,
        seed,
        metrics: metrics.clone(),
        ready,
        health: health.clone(),
        classes,
        pods,
        sessions: Sessions::new(
            trigger.clone(),
            metrics.clone(),
            clock.clone(),
            tracer.clone(),
            conversation,
            max_sessions,
        ),
        clock,
        caches: Arc::default(),
        queue,
        doors: Default::default(),
        refusals: Default::default(),
        obstacles: Default::default(),
        backoffs: Default::default(),
        events,
        tracer,
    });
    metrics.count_with(Some(count_of(&operator, &known, &unreadable)));
    let wake = Arc::new(Notify::new());
    // They end with this function, and it with any of them.
    let mut helpers = JoinSet::new();
    helpers.spawn(health.clone().never_ends("watch-pods", watch_pods));
    if let Some(watch_classes) = watch_classes {
        helpers.spawn(health.clone().never_ends("watch-classes", watch_classes));
    }
    let sweeps = sweep::run(operator.clone(), known, unreadable, wake.clone());
    helpers.spawn(health.clone().never_ends("sweeps", sweeps));
    helpers.spawn(health.clone().never_ends("heartbeat", ask_for_a_sign(operator.clone(), trigger)));
    helpers.spawn(health.clone().never_ends("events", publish));
    helpers.spawn(report_ready(operator.clone()));
    let reconciled = controller.run(reconcile, on_error, operator.clone()).for_each(|result| {
        health.beat(Loop::Reconciles);
        match result {
            Ok(_) => {}
            Err(controller::Error::ObjectNotFound(what)) if what.name == SIGN => {}
            // Deleted, or not seen yet. Its pods, if it has any, go now.
            Err(controller::Error::ObjectNotFound(_)) => wake.notify_one(),
            // Logged where it happened.
            Err(controller::Error::ReconcilerFailed(..)) => {}
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "watching requests"),
        }
        future::ready(())
    });
    tokio::select! {
        () = reconciled => {}
        () = watch_over(&mut helpers) => {}
    }
    operator.sessions.close(FAREWELL).await;
    operator.events.settle(LAST_EVENTS).await;
    // Whoever leads from now on says how many there are.
    metrics.count_with(None);
}

/// Counts what the watches have, whenever somebody looks at the metrics. It does not keep the operator alive.
fn count_of(
    operator: &Operator,
    requests: &Store<BuildRequest>,
    unreadable: &Arc<Unreadable>,
) -> Box<dyn Fn() -> census::Census + Send + Sync> {
    let (requests, pods, unreadable) = (requests.clone(), operator.pods.clone(), unreadable.clone());
    let (caches, clock) = (operator.caches.clone(), operator.clock.clone());
    Box::new(move || census::Census {
        caches: caches.counts(),
        cache_errors: caches.troubles(),
        ..census::count(&requests.state(), &pods.state(), |uid| unreadable.contains(uid), clock.now())
    })
}

/// Panics if one of them does: a process with half of its watches is worse than none.
async fn watch_over(helpers: &mut JoinSet<()>) {
    while let Some(ended) = helpers.join_next().await {
        if let Some(panic) = ended.err().and_then(|ended| ended.try_into_panic().ok()) {
            std::panic::resume_unwind(panic);
        }
    }
    future::pending().await
}

/// A failure or a panic is this request's own: it is counted, and this request is looked at again later.
async fn reconcile(request: Arc<BuildRequest>, operator: Arc<Operator>) -> Result<Action, Error> {
    let begun = Instant::now();
    let result = caught(passes(&operator, &request)).instrument(log::of(&request)).await;
    operator.metrics.reconciled(begun.elapsed());
    if result.is_ok() {
        operator.backoffs().succeeded(&request.uid().unwrap_or_default());
    }
    result
}

/// A panic as an error. What is shared is behind locks that say at their place why a panic leaves it whole.
async fn caught<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(Error::Panic { message: text.unwrap_or("it said nothing").to_owned() })
    })
}

async fn passes(operator: &Operator, request: &BuildRequest) -> Result<Action, Error> {
    // Requests too: nobody may begin before those are known that run already.
    operator.ready.wait(&[Watch::Classes, Watch::Pods, Watch::Requests]).await;
    let mut request = request.clone();
    let mut freshness = Freshness::Watched;
    for _ in 0..MAX_PASSES {
        let Some(world) = observe(operator, &request, freshness).await? else {
            return Ok(Action::await_change());
        };
        let plan = plan(&world, operator.clock.now());
        if plan.status.is_some() && !world.live && strip::is_stripped(&world.request) {
            // It was made from what little the watch keeps, and would write that. What the API server itself has shown is
            // whole, whatever marks somebody has put on it.
            freshness = Freshness::Live;
            continue;
        }
        if plan.status.is_some() || !plan.actions.is_empty() {
            tracing::debug!(actions = ?plan.actions, "plan");
        }
        freshness = if plan.requeue == Requeue::Live { Freshness::Live } else { Freshness::Watched };
        match execute(operator, &world, &plan).await? {
            Executed::Done(written) => {
                if let Some(written) = written {
                    log_transition(&request, &written);
                    request = *written;
                    if let Some(attempt) = request.status.as_ref().and_then(|status| status.attempt) {
                        Span::current().record("attempt", attempt);
                    }
                }
            }
            Executed::Coming => return Ok(Action::requeue(ANSWER_LIMIT)),
            Executed::Stale(current) => {
                request = *current;
                continue;
            }
            Executed::Gone => return Ok(Action::await_change()),
        }
        match plan.requeue {
            Requeue::Now | Requeue::Live => {}
            Requeue::After(wait) => return Ok(Action::requeue(wait)),
        }
    }
    Ok(Action::requeue(backoff::FIRST))
}

fn on_error(request: Arc<BuildRequest>, error: &Error, operator: Arc<Operator>) -> Action {
    let _of = log::of(&request).entered();
    operator.metrics.failed(error);
    // Its keys are random, and others each time.
    let random = RandomState::new().build_hasher().finish();
    let wait = operator.backoffs().failed(&request.uid().unwrap_or_default(), random);
    if wait >= LEAVE_LIMIT {
        operator.queue.release(&request.uid().unwrap_or_default());
    }
    tracing::warn!(
        error = error as &dyn std::error::Error,
        "looking at the request failed; again in {wait:?}"
    );
    Action::requeue(wait)
}

/// One line for each verdict and each new attempt.
fn log_transition(before: &BuildRequest, after: &BuildRequest) {
    let summary = |request: &BuildRequest| {
        let status = request.status.as_ref()?;
        let condition = conditions::find(&status.conditions, conditions::SUCCEEDED)?;
        Some((condition.reason.clone(), condition.message.clone(), status.attempt))
    };
    let (was, is) = (summary(before), summary(after));
    if was != is
        && let Some((reason, message, _)) = is
    {
        let _of = log::of(after).entered();
        tracing::info!(reason, detail = message, "build");
    }
}

/// Asks the controller now and then for something that does not exist. Its answer is the sign that it goes on: it came through
/// the same channel, the same schedule and the same places as everything else.
async fn ask_for_a_sign(operator: Arc<Operator>, trigger: Trigger) {
    // It answers nothing before.
    operator.ready.wait(&[Watch::Requests]).await;
    operator.health.beat(Loop::Reconciles);
    loop {
        // The receiver is gone only while the process ends.
        let _ = trigger.unbounded_send(ObjectRef::new(SIGN));
        tokio::time::sleep(SIGN_INTERVAL).await;
    }
}

/// Ready as soon as every watch has delivered its first list.
async fn report_ready(operator: Arc<Operator>) {
    operator.ready.wait(&[Watch::Classes, Watch::Pods, Watch::Requests]).await;
    tracing::info!("ready");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_error_with_its_words() {
        let error = caught::<()>(async { panic!("no {}", "way") }).await.unwrap_err();
        assert_eq!(error.category(), "panic");
        assert!(error.to_string().contains("no way"), "{error}");
        assert_eq!(caught(async { Ok(1) }).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn a_helper_that_panics_is_not_missed() {
        let mut helpers = JoinSet::new();
        // One that has done its work is.
        helpers.spawn(async {});
        helpers.spawn(async { panic!("the watch broke") });
        assert!(AssertUnwindSafe(watch_over(&mut helpers)).catch_unwind().await.is_err());
    }
}
