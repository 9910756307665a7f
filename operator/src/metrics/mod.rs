//! What `/metrics` says. [`table`] lists every metric; nothing is counted that is not in it.
//!
//! Ends are counted from what a status was and what it became ([`transition`]), as soon as the write that says so was taken.
//! A verdict is written once, whoever leads, so it is counted once; counters of a process that ends begin at 0 in the next
//! one, which Prometheus' `rate` and `increase` allow for. How many there are now ([`census`]) is counted when somebody asks.
//! [`api`] counts requests to the API server.

pub mod api;
pub mod census;
pub mod series;
pub mod table;
pub mod transition;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry};

use crate::error::Error;
use crate::ready::Watch;
use census::Census;
use series::Series;
use table::{Kind, Spec};
use transition::Observation;

/// All of the operator's metrics. Cheap to share by `Arc`.
pub struct Metrics {
    registry: Registry,
    census: Mutex<Option<Count>>,
    builds: Series<Counter>,
    request_duration: Series<Histogram>,
    builds_saved: Series<Counter>,
    attempts: Series<Counter>,
    retries: Series<Counter>,
    reconnects: Counter,
    pub pods_created: Counter,
    queue_wait: Histogram,
    pod_start: Histogram,
    phase_duration: Series<Histogram>,
    transfer: Series<Counter>,
    transfer_paths: Series<Counter>,
    requests: Series<Gauge>,
    oldest_waiting: Series<Gauge>,
    builders: Series<Gauge>,
    builders_orphaned: Gauge,
    pub sessions: Gauge,
    cache_questions: Series<Counter>,
    cache_errors: Counter,
    cache_paths_wrong: Counter,
    reconcile_duration: Histogram,
    reconcile_errors: Series<Counter>,
    pub status_writes: Counter,
    pub event_errors: Counter,
    pub trace_spans_dropped: Counter,
    api_requests: Series<Counter>,
    api_request_duration: Series<Histogram>,
    watch_errors: Series<Counter>,
    unreadable_objects: Series<Gauge>,
    pub leader: Gauge,
    ready: Gauge,
}

/// Counts what there is now.
type Count = Box<dyn Fn() -> Census + Send + Sync>;

impl Metrics {
    pub fn new() -> Self {
        let mut page = Page(Registry::with_prefix(table::PREFIX));
        let version =
            table::BUILD.labels.iter().copied().zip([env!("CARGO_PKG_VERSION")]).collect::<Vec<_>>();
        Self {
            census: Mutex::default(),
            builds: page.counters(&table::BUILDS),
            request_duration: page.histograms(&table::REQUEST_DURATION),
            builds_saved: page.counters(&table::BUILDS_SAVED),
            attempts: page.counters(&table::ATTEMPTS),
            retries: page.counters(&table::RETRIES),
            reconnects: page.add(&table::RECONNECTS, Counter::default()),
            pods_created: page.add(&table::PODS_CREATED, Counter::default()),
            queue_wait: page.add(&table::QUEUE_WAIT, histogram(&table::QUEUE_WAIT)),
            pod_start: page.add(&table::POD_START, histogram(&table::POD_START)),
            phase_duration: page.histograms(&table::PHASE_DURATION),
            transfer: page.counters(&table::TRANSFER),
            transfer_paths: page.counters(&table::TRANSFER_PATHS),
            requests: page.gauges(&table::REQUESTS),
            oldest_waiting: page.gauges(&table::OLDEST_WAITING),
            builders: page.gauges(&table::BUILDERS),
            builders_orphaned: page.add(&table::BUILDERS_ORPHANED, Gauge::default()),
            sessions: page.add(&table::SESSIONS, Gauge::default()),
            cache_questions: page.counters(&table::CACHE_QUESTIONS),
            cache_errors: page.add(&table::CACHE_ERRORS, Counter::default()),
            cache_paths_wrong: page.add(&table::CACHE_PATHS_WRONG, Counter::default()),
            reconcile_duration: page.add(&table::RECONCILE_DURATION, histogram(&table::RECONCILE_DURATION)),
            reconcile_errors: page.counters(&table::RECONCILE_ERRORS),
            status_writes: page.add(&table::STATUS_WRITES, Counter::default()),
            event_errors: page.add(&table::EVENT_ERRORS, Counter::default()),
            trace_spans_dropped: page.add(&table::TRACE_SPANS_DROPPED, Counter::default()),
            api_requests: page.counters(&table::API_REQUESTS),
            api_request_duration: page.histograms(&table::API_REQUEST_DURATION),
            watch_errors: page.counters(&table::WATCH_ERRORS),
            unreadable_objects: page.gauges(&table::UNREADABLE_OBJECTS),
            leader: page.add(&table::LEADER, Gauge::default()),
            ready: page.add(&table::READY, Gauge::default()),
            registry: page.finish(version),
        }
    }

    /// Ready to do its part, as `/readyz` says it ([`crate::health`]).
    pub fn set_ready(&self, ready: bool) {
        self.ready.set(ready.into());
    }

    /// Takes in what a write of a status has changed.
    pub fn record(&self, observations: &[Observation]) {
        for observation in observations {
            match *observation {
                Observation::Ended { result, reason, took } => {
                    self.builds.of(&[result, reason]).inc();
                    self.request_duration.of(&[result]).observe(took.as_secs_f64());
                }
                Observation::Saved { by } => _ = self.builds_saved.of(&[by]).inc(),
                Observation::AttemptEnded { fault, reason } => _ = self.attempts.of(&[fault, reason]).inc(),
                Observation::Retried { budget, reason } => _ = self.retries.of(&[budget, reason]).inc(),
                Observation::Reconnected { times } => _ = self.reconnects.inc_by(times.into()),
                Observation::Begun { waited } => self.queue_wait.observe(waited.as_secs_f64()),
                Observation::Answered { took } => self.pod_start.observe(took.as_secs_f64()),
                Observation::Phase { phase, took } => {
                    self.phase_duration.of(&[phase]).observe(took.as_secs_f64())
                }
                Observation::Moved { route, bytes } => _ = self.transfer.of(&[route]).inc_by(bytes),
                Observation::Inputs { source, paths } => _ = self.transfer_paths.of(&[source]).inc_by(paths),
            }
        }
    }

    /// One look at one request is over.
    pub fn reconciled(&self, took: Duration) {
        self.reconcile_duration.observe(took.as_secs_f64());
    }

    /// A look at a request, or a deletion, failed.
    pub fn failed(&self, error: &Error) {
        self.reconcile_errors.of(&[error.category()]).inc();
    }

    /// How often that was so, for errors of this category.
    pub fn failures(&self, category: &str) -> u64 {
        self.reconcile_errors.of(&[category]).get()
    }

    pub fn watch_broke(&self, watch: Watch) {
        self.watch_errors.of(&[watch.name()]).inc();
    }

    /// So many objects of this watch cannot be read.
    pub fn unreadable(&self, watch: Watch, count: usize) {
        self.unreadable_objects.of(&[watch.name()]).set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// How many there are of these.
    pub fn unreadable_now(&self, watch: Watch) -> i64 {
        self.unreadable_objects.of(&[watch.name()]).get()
    }

    /// The API server was asked, and has answered with this code or not at all.
    pub fn asked(&self, verb: &'static str, code: Option<u16>, took: Duration) {
        let code = code.map(|code| code.to_string());
        self.api_requests.of(&[verb, code.as_deref().unwrap_or(table::NO_ANSWER)]).inc();
        self.api_request_duration.of(&[verb]).observe(took.as_secs_f64());
    }

    /// Has this count what there is whenever somebody looks; None: there is nothing any more.
    pub fn count_with(&self, count: Option<Count>) {
        *self.census() = count;
    }

    /// The page in OpenMetrics' text format.
    pub fn render(&self) -> String {
        let census = self.census().as_ref().map(|count| count()).unwrap_or_default();
        self.take_in(&census);
        let mut text = String::new();
        // Writing to a String cannot fail, and nothing else in there can.
        let _ = encode(&mut text, &self.registry);
        text
    }

    fn take_in(&self, census: &Census) {
        for (reason, gauge) in self.requests.each() {
            gauge.set(census.requests.get(reason).copied().unwrap_or(0));
        }
        for (reason, gauge) in self.oldest_waiting.each() {
            gauge.set(census.oldest_seconds.get(reason).copied().unwrap_or(0));
        }
        for (state, gauge) in self.builders.each() {
            gauge.set(census.builders.get(state).copied().unwrap_or(0));
        }
        self.builders_orphaned.set(census.orphans);
        // They are counted elsewhere, and never fewer.
        let raise = |counter: &Counter, to: u64| {
            _ = counter.inner().fetch_max(to, std::sync::atomic::Ordering::Relaxed)
        };
        raise(self.cache_questions.of(&["memory"]), census.caches.recalled);
        raise(self.cache_questions.of(&["cache"]), census.caches.asked);
        raise(&self.cache_paths_wrong, census.caches.wrong);
        raise(&self.cache_errors, census.cache_errors);
    }

    fn census(&self) -> MutexGuard<'_, Option<Count>> {
        // Only taken to look and to change what counts: whole after a panic.
        self.census.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// A registry that is filled from the table.
struct Page(Registry);

impl Page {
    fn add<M: Metric + Clone>(&mut self, spec: &Spec, metric: M) -> M {
        match &spec.unit {
            Some(unit) => self.0.register_with_unit(spec.name, spec.help, unit.clone(), metric.clone()),
            None => self.0.register(spec.name, spec.help, metric.clone()),
        }
        metric
    }

    fn counters(&mut self, spec: &Spec) -> Series<Counter> {
        self.add(spec, Series::new(spec, Counter::default))
    }

    fn gauges(&mut self, spec: &Spec) -> Series<Gauge> {
        self.add(spec, Series::new(spec, Gauge::default))
    }

    fn histograms(&mut self, spec: &Spec) -> Series<Histogram> {
        self.add(spec, Series::new(spec, || histogram(spec)))
    }

    fn finish(mut self, version: Vec<(&'static str, &'static str)>) -> Registry {
        let spec = &table::BUILD;
        self.0.register(spec.name, spec.help, Info::new(version));
        self.0
    }
}

fn histogram(spec: &Spec) -> Histogram {
    let buckets = if let Kind::Histogram(buckets) = spec.kind { buckets } else { &[] };
    Histogram::new(buckets.iter().copied())
}

#[cfg(test)]
mod tests;
