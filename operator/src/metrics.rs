//! Counters and gauges for `/metrics`. Labels are words from closed lists: no name, path or uid ever becomes one.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Result and reason of a build that ended.
#[derive(Clone, Hash, PartialEq, Eq, Debug, EncodeLabelSet)]
pub struct BuildLabels {
    pub result: &'static str,
    pub reason: &'static str,
}

/// Category of an error of the operator's own acts.
#[derive(Clone, Hash, PartialEq, Eq, Debug, EncodeLabelSet)]
pub struct ErrorLabels {
    pub kind: &'static str,
}

/// One of the operator's watches.
#[derive(Clone, Hash, PartialEq, Eq, Debug, EncodeLabelSet)]
pub struct WatchLabels {
    pub watch: &'static str,
}

/// All of the operator's metrics. Cheap to share by `Arc`.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    ready: AtomicBool,
    pub builds: Family<BuildLabels, Counter>,
    pub attempts: Counter,
    pub sessions: Gauge<i64, AtomicI64>,
    pub reconcile_seconds: Histogram,
    pub reconcile_errors: Family<ErrorLabels, Counter>,
    pub status_writes: Counter,
    pub leader: Gauge<i64, AtomicI64>,
    pub watch_errors: Family<WatchLabels, Counter>,
    pub unreadable: Family<WatchLabels, Gauge<i64, AtomicI64>>,
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("drover");
        let builds = Family::default();
        registry.register("builds", "Requests that ended, by result and reason", builds.clone());
        let attempts = Counter::default();
        registry.register("attempts", "Builder pods that were created", attempts.clone());
        let sessions = Gauge::default();
        registry.register("sessions_active", "Sessions with builders that run now", sessions.clone());
        // 1 ms to about 8 s.
        let reconcile_seconds = Histogram::new(exponential_buckets(0.001, 2.0, 14));
        registry.register_with_unit(
            "reconcile_duration",
            "Time of one pass over one request",
            Unit::Seconds,
            reconcile_seconds.clone(),
        );
        let reconcile_errors = Family::default();
        registry.register("reconcile_errors", "Passes that failed, by kind", reconcile_errors.clone());
        let status_writes = Counter::default();
        registry.register("status_writes", "Writes of a request's status", status_writes.clone());
        let leader = Gauge::default();
        registry.register("leader", "Whether this process leads: 1, or 0 while it stands by", leader.clone());
        let watch_errors = Family::default();
        registry.register("watch_errors", "Watches that broke and began anew", watch_errors.clone());
        let unreadable = Family::default();
        registry.register(
            "unreadable_objects",
            "Objects that are there and cannot be read",
            unreadable.clone(),
        );
        Self {
            registry,
            ready: AtomicBool::new(false),
            builds,
            attempts,
            sessions,
            reconcile_seconds,
            reconcile_errors,
            status_writes,
            leader,
            watch_errors,
            unreadable,
        }
    }

    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// Ready to do its part: to lead with watches that have delivered, or to stand by.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// The page in OpenMetrics' text format.
    pub fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail, and nothing else in there can.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_the_dashboards_ask_for() {
        let metrics = Metrics::new();
        metrics.builds.get_or_create(&BuildLabels { result: "succeeded", reason: "Succeeded" }).inc();
        metrics.reconcile_seconds.observe(0.002);
        let page = metrics.render();
        assert!(page.contains("drover_builds_total{result=\"succeeded\",reason=\"Succeeded\"} 1"), "{page}");
        assert!(page.contains("drover_reconcile_duration_seconds_count 1"), "{page}");
        assert!(page.contains("drover_sessions_active 0"), "{page}");
        assert!(page.contains("drover_leader 0"), "{page}");
    }
}
