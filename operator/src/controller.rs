//! The wiring: watches in, reconciles out.
//!
//! Each reconcile is observe, plan, execute. Requests come by the controller's own watch; everything else that
//! concerns a request (its pod, its class, its session) asks for a look at it by one channel. Failures back off for
//! each request by itself.

use std::collections::HashMap;
use std::future::{self, Future};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use drover_api::{BuildRequest, BuilderClass, conditions};
use futures::StreamExt as _;
use futures::channel::mpsc::unbounded;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::controller::{self, Action};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{Controller, WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::Notify;

use crate::clock::Clock;
use crate::error::Error;
use crate::execute::{Executed, execute};
use crate::keys::Seed;
use crate::metrics::{ErrorLabels, Metrics};
use crate::observe::{Freshness, observe, request_of};
use crate::operator::Operator;
use crate::plan::{Requeue, plan};
use crate::pod;
use crate::queue::Queue;
use crate::ready::{Ready, Watch};
use crate::session::{Conversation, Sessions, Trigger};
use crate::settings::Settings;
use crate::sweep;

/// Passes within one reconcile: a plan that changes what is known is followed by another one at once.
const MAX_PASSES: usize = 8;
/// Wait after a pass that failed: first and longest.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LONGEST_BACKOFF: Duration = Duration::from_secs(300);
/// Caches that have not answered by then have had a request looked at again in any case.
const ANSWER_LIMIT: Duration = Duration::from_secs(300);

/// What an operator is made of.
pub struct Parts {
    pub client: Client,
    pub settings: Settings,
    pub seed: Seed,
    pub metrics: Arc<Metrics>,
    pub clock: Clock,
    /// How it talks with builders.
    pub conversation: Arc<dyn Conversation>,
}

/// Runs until `shutdown` resolves and the reconciles that run have ended.
pub async fn run(parts: Parts, shutdown: impl Future<Output = ()> + Send + Sync + 'static) {
    let Parts { client, settings, seed, metrics, clock, conversation } = parts;
    let (trigger, triggered) = unbounded();
    let concurrency = settings.concurrency;
    // Not `Controller::new`: its watch says nothing of deletions, and a pod would live on until the next sweep.
    let (known, writer) = reflector::store();
    let requests = watcher(Api::<BuildRequest>::all(client.clone()), watcher::Config::default())
        .default_backoff()
        .modify(|request| request.managed_fields_mut().clear());
    let ready = Arc::new(Ready::new());
    let queue = Arc::new(Queue::new(trigger.clone()));
    let requests = requests.inspect(feed(&queue));
    let requests =
        reflector::reflector(writer, requests).inspect(note(&ready, Watch::Requests)).touched_objects();
    let controller = Controller::for_stream(requests, known.clone())
        .with_config(controller::Config::default().concurrency(concurrency))
        .graceful_shutdown_on(shutdown)
        .reconcile_on(triggered);
    let pods = watch_pods(&client, &settings, &ready, trigger.clone());
    let classes = watch_classes(&client, known.clone(), &ready, trigger.clone());
    let operator = Arc::new(Operator {
        client,
        settings,
        seed,
        metrics: metrics.clone(),
        ready,
        classes,
        pods,
        sessions: Sessions::new(trigger, metrics, clock.clone(), conversation),
        clock,
        caches: Arc::default(),
        queue,
        doors: Default::default(),
        refusals: Default::default(),
    });
    let wake = Arc::new(Notify::new());
    tokio::spawn(report_ready(operator.clone()));
    tokio::spawn(sweep::run(operator.clone(), known, wake.clone()));
    let context = Arc::new(Context { operator, backoffs: Mutex::default() });
    controller
        .run(reconcile, on_error, context)
        .for_each(|result| {
            match result {
                Ok(_) => {}
                // Deleted, or not seen yet. Its pods, if it has any, go now.
                Err(controller::Error::ObjectNotFound(_)) => wake.notify_one(),
                // Logged where it happened.
                Err(controller::Error::ReconcilerFailed(..)) => {}
                Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "watching requests"),
            }
            future::ready(())
        })
        .await;
}

struct Context {
    operator: Arc<Operator>,
    /// Failures in a row, by the request's uid.
    backoffs: Mutex<HashMap<String, u32>>,
}

impl Context {
    fn backoffs(&self) -> std::sync::MutexGuard<'_, HashMap<String, u32>> {
        self.backoffs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn reconcile(request: Arc<BuildRequest>, context: Arc<Context>) -> Result<Action, Error> {
    let begun = Instant::now();
    let result = passes(&context.operator, &request).await;
    context.operator.metrics.reconcile_seconds.observe(begun.elapsed().as_secs_f64());
    if result.is_ok() {
        context.backoffs().remove(&request.uid().unwrap_or_default());
    }
    result
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
        if plan.status.is_some() || !plan.actions.is_empty() {
            tracing::debug!(request = %ObjectRef::from_obj(&request), actions = ?plan.actions, "plan");
        }
        freshness = if plan.requeue == Requeue::Live { Freshness::Live } else { Freshness::Watched };
        match execute(operator, &world, &plan).await? {
            Executed::Done(written) => {
                if let Some(written) = written {
                    log_transition(&request, &written);
                    request = *written;
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
    Ok(Action::requeue(FIRST_BACKOFF))
}

fn on_error(request: Arc<BuildRequest>, error: &Error, context: Arc<Context>) -> Action {
    context.operator.metrics.reconcile_errors.get_or_create(&ErrorLabels { kind: error.category() }).inc();
    let failures = {
        let mut backoffs = context.backoffs();
        let failures = backoffs.entry(request.uid().unwrap_or_default()).or_default();
        *failures = failures.saturating_add(1);
        *failures
    };
    let wait = FIRST_BACKOFF.saturating_mul(2u32.saturating_pow(failures - 1)).min(LONGEST_BACKOFF);
    tracing::warn!(
        request = %ObjectRef::from_obj(&*request),
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
        && let Some((reason, message, attempt)) = is
    {
        tracing::info!(request = %ObjectRef::from_obj(after), reason, detail = message, attempt, "build");
    }
}

/// Keeps a copy of all builder pods, and asks for a look at the request of each that changes.
fn watch_pods(client: &Client, settings: &Settings, ready: &Arc<Ready>, trigger: Trigger) -> Store<Pod> {
    let api: Api<Pod> = Api::namespaced(client.clone(), &settings.builder_namespace);
    let config = watcher::Config::default().labels(pod::UID_LABEL);
    let (store, writer) = reflector::store();
    let stream =
        watcher(api, config).default_backoff().modify(|pod: &mut Pod| pod.managed_fields_mut().clear());
    let stream = reflector::reflector(writer, stream).inspect(note(ready, Watch::Pods)).touched_objects();
    tokio::spawn(stream.for_each(move |pod| {
        match pod {
            Ok(pod) => {
                if let Some(request) = request_of(&pod) {
                    let _ = trigger.unbounded_send(request);
                }
            }
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "watching pods"),
        }
        future::ready(())
    }));
    store
}

/// Keeps a copy of all classes. A change of one concerns every request that has not come to its end.
fn watch_classes(
    client: &Client,
    requests: Store<BuildRequest>,
    ready: &Arc<Ready>,
    trigger: Trigger,
) -> Store<BuilderClass> {
    let api: Api<BuilderClass> = Api::all(client.clone());
    let (store, writer) = reflector::store();
    let stream = watcher(api, watcher::Config::default()).default_backoff();
    let stream = reflector::reflector(writer, stream).inspect(note(ready, Watch::Classes)).touched_objects();
    tokio::spawn(stream.for_each(move |class| {
        match class {
            Ok(_) => {
                for request in requests.state() {
                    let status = request.status.as_ref();
                    if status.and_then(|status| conditions::verdict(&status.conditions)).is_none() {
                        let _ = trigger.unbounded_send(ObjectRef::from_obj(&*request));
                    }
                }
            }
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "watching classes"),
        }
        future::ready(())
    }));
    store
}

/// Tells the queue what the watch shows, before anybody else hears of it.
fn feed(queue: &Arc<Queue>) -> impl FnMut(&watcher::Result<watcher::Event<BuildRequest>>) + Send + use<> {
    let queue = queue.clone();
    move |event| {
        if let Ok(event) = event {
            queue.note(event);
        }
    }
}

/// Marks the watch as ready when its first list is in the store. For the stream behind the reflector.
fn note<K>(ready: &Arc<Ready>, watch: Watch) -> impl FnMut(&watcher::Result<watcher::Event<K>>) + use<K> {
    let ready = ready.clone();
    move |event| {
        if matches!(event, Ok(watcher::Event::InitDone)) {
            ready.mark(watch);
        }
    }
}

/// Ready as soon as every watch has delivered its first list.
async fn report_ready(operator: Arc<Operator>) {
    operator.ready.wait(&[Watch::Classes, Watch::Pods, Watch::Requests]).await;
    operator.metrics.set_ready(true);
    tracing::info!("ready");
}
