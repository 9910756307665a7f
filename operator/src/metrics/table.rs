//! Every metric that there is: name, type, unit, labels with all their values, and what it means.
//!
//! Metrics are registered from this table and `docs/metrics.md` is printed from it, so that neither can know one that the
//! other does not. A label's value is a word from a closed list, never a name, a path or a uid: those would grow without
//! bound, and tell whoever may read metrics what tenants build.

use drover_api::{Budget, Reason, ReasonKind as Meaning};
use prometheus_client::registry::Unit;

use crate::error::CATEGORIES;
use crate::ready::Watch;

/// What every name begins with, followed by `_`.
pub const PREFIX: &str = "drover";

/// The value that stands for what no list foresaw.
pub const OTHER: &str = "other";

/// One metric.
#[derive(Debug)]
pub struct Spec {
    /// Without prefix, unit and the suffix of its type.
    pub name: &'static str,
    pub kind: Kind,
    pub unit: Option<Unit>,
    pub labels: &'static [&'static str],
    /// The values of all labels together, for each series that is there from the start, at 0.
    pub series: fn() -> Vec<Vec<&'static str>>,
    /// The same of those that are there once they are not 0.
    pub rare: fn() -> Vec<Vec<&'static str>>,
    /// Without a full stop.
    pub help: &'static str,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Kind {
    Counter,
    Gauge,
    /// With the upper bounds of its buckets, in its unit.
    Histogram(&'static [f64]),
    /// Always 1; what matters are its labels.
    Info,
}

impl Kind {
    /// OpenMetrics' word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram(_) => "histogram",
            Self::Info => "info",
        }
    }
}

impl Spec {
    /// The name as queries have it; of a histogram, what `_bucket`, `_sum` and `_count` follow.
    pub fn full_name(&self) -> String {
        let unit = self.unit.as_ref().map(|unit| format!("_{}", unit.as_str())).unwrap_or_default();
        let suffix = match self.kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram(_) => "",
        };
        format!("{PREFIX}_{}{unit}{suffix}", self.name)
    }

    /// The values that a label can have, in the table's order.
    pub fn values(&self, label: &str) -> Vec<&'static str> {
        let Some(at) = self.labels.iter().position(|name| *name == label) else { return vec![] };
        let mut values = Vec::new();
        for series in (self.series)().into_iter().chain((self.rare)()) {
            if let Some(value) = series.get(at).filter(|value| !values.contains(*value)) {
                values.push(*value);
            }
        }
        values
    }
}

/// Seconds of an API call: 5 ms to 16 s, which is longer than a call may take.
const CALLS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0];
/// Seconds of a pass: 1 ms to about a minute, which a pass may wait for caches.
const PASSES: &[f64] = &[
    0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0,
];
/// Seconds that people wait: one second, which is as exact as times in objects are, to a day.
const WAITS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 14_400.0,
    28_800.0, 86_400.0,
];
/// Seconds of a build's phases: connecting takes milliseconds, and a build may take a day.
const PHASES: &[f64] = &[
    0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0,
    14_400.0, 28_800.0, 86_400.0,
];

const NO_LABELS: &[&str] = &[];

/// One series without labels.
fn one() -> Vec<Vec<&'static str>> {
    vec![vec![]]
}

fn none() -> Vec<Vec<&'static str>> {
    vec![]
}

fn each(values: impl IntoIterator<Item = &'static str>) -> Vec<Vec<&'static str>> {
    values.into_iter().map(|value| vec![value]).collect()
}

fn reasons(of: impl Fn(Meaning) -> bool) -> impl Iterator<Item = Reason> {
    Reason::ALL.iter().copied().filter(move |reason| of(reason.kind()))
}

/// Results of a request, and whose fault the end of an attempt was.
pub const SUCCEEDED: &str = "succeeded";
pub const FAILED: &str = "failed";
pub const NOBODY: &str = "none";
pub const OF_BUILD: &str = "build";
pub const OF_INFRASTRUCTURE: &str = "infrastructure";

pub const BUILDS: Spec = Spec {
    name: "builds",
    kind: Kind::Counter,
    unit: None,
    labels: &["result", "reason"],
    series: || {
        let result = |reason: Reason| if reason.kind() == Meaning::Success { SUCCEEDED } else { FAILED };
        reasons(|kind| kind != Meaning::Progress)
            .map(|reason| vec![result(reason), reason.as_str()])
            .collect()
    },
    rare: none,
    help: "Requests that came to their end. Counted when the end is written, which happens once whoever leads; an \
           operator that dies in that moment counts it not at all",
};

pub const REQUEST_DURATION: Spec = Spec {
    name: "request_duration",
    kind: Kind::Histogram(WAITS),
    unit: Some(Unit::Seconds),
    labels: &["result"],
    series: || each([SUCCEEDED, FAILED]),
    rare: none,
    help: "From the creation of a request to its end, all attempts and all waiting in it; exact to a second",
};

/// How a request got what it asked for without a build of its own.
pub const BY_CACHE: &str = "cache";
pub const BY_SAME_BUILD: &str = "same_build";

pub const BUILDS_SAVED: Spec = Spec {
    name: "builds_saved",
    kind: Kind::Counter,
    unit: None,
    labels: &["by"],
    series: || each([BY_CACHE, BY_SAME_BUILD]),
    rare: none,
    help: "Requests that came to their end without an attempt of their own: by outputs that were in the cache, or by \
           another request's build of the same that they waited for",
};

pub const ATTEMPTS: Spec = Spec {
    name: "attempts",
    kind: Kind::Counter,
    unit: None,
    labels: &["fault", "reason"],
    series: || {
        let fault = |reason: Reason| match reason.kind() {
            Meaning::Infrastructure => OF_INFRASTRUCTURE,
            Meaning::Failure => OF_BUILD,
            Meaning::Success | Meaning::Progress => NOBODY,
        };
        let ends = |reason: &Reason| *reason != Reason::AlreadyBuilt;
        reasons(|kind| kind != Meaning::Progress)
            .filter(ends)
            .map(|reason| vec![fault(reason), reason.as_str()])
            .collect()
    },
    // A cache that gives wrong input is the machinery's fault as long as another one may have it right.
    rare: || {
        let failures =
            reasons(|kind| kind == Meaning::Failure).map(|reason| vec![OF_INFRASTRUCTURE, reason.as_str()]);
        let others =
            reasons(|kind| kind == Meaning::Infrastructure).map(|reason| vec![OF_BUILD, reason.as_str()]);
        failures.chain(others).chain([vec![OF_BUILD, OTHER]]).collect()
    },
    help: "Attempts that ended, by whose fault it was and how",
};

pub const RETRIES: Spec = Spec {
    name: "retries",
    kind: Kind::Counter,
    unit: None,
    labels: &["budget", "reason"],
    series: || {
        let budget = |reason: &Reason| match reason.budget()? {
            Budget::Build => Some(OF_BUILD),
            Budget::Infrastructure => Some(OF_INFRASTRUCTURE),
        };
        Reason::ALL.iter().filter_map(|reason| Some(vec![budget(reason)?, reason.as_str()])).collect()
    },
    rare: || {
        let failures =
            reasons(|kind| kind == Meaning::Failure).map(|reason| vec![OF_INFRASTRUCTURE, reason.as_str()]);
        failures.chain([vec![OF_BUILD, OTHER]]).collect()
    },
    help: "Attempts that failed and are followed by another one, by the budget that pays for it and by what went wrong",
};

pub const RECONNECTS: Spec = Spec {
    name: "reconnects",
    kind: Kind::Counter,
    unit: None,
    labels: NO_LABELS,
    series: one,
    rare: none,
    help: "Connections to builders that broke and were made again within the same attempt",
};

pub const PODS_CREATED: Spec = Spec {
    name: "pods_created",
    kind: Kind::Counter,
    unit: None,
    labels: NO_LABELS,
    series: one,
    rare: none,
    help: "Builder pods that the API server made for this operator",
};

pub const QUEUE_WAIT: Spec = Spec {
    name: "queue_wait",
    kind: Kind::Histogram(WAITS),
    unit: Some(Unit::Seconds),
    labels: NO_LABELS,
    series: one,
    rare: none,
    help: "From the creation of a request, or the end of the attempt before, to the begin of an attempt, whatever it waited \
           for and whatever becomes of it; exact to a second",
};

pub const POD_START: Spec = Spec {
    name: "pod_start",
    kind: Kind::Histogram(WAITS),
    unit: Some(Unit::Seconds),
    labels: NO_LABELS,
    series: one,
    rare: none,
    help: "From the begin of an attempt to its builder's first answer: finding a node, pulling the image, starting. Each \
           attempt whose builder answered counts, whatever becomes of it; exact to a second",
};

/// The phases of an attempt, in order.
pub const PHASE_NAMES: [&str; 5] = ["start", "connect", "copy_in", "build", "collect"];

pub const PHASE_DURATION: Spec = Spec {
    name: "phase_duration",
    kind: Kind::Histogram(PHASES),
    unit: Some(Unit::Seconds),
    labels: &["phase"],
    series: || each(PHASE_NAMES),
    rare: none,
    help: "Phases that came to their end, whatever became of their attempt: start (from a pod that has a node to a builder that answers), connect, \
           copy_in, build, collect",
};

/// The ways that bytes take.
pub const SENT: &str = "sent";
pub const FETCHED: &str = "fetched";
pub const RECEIVED: &str = "received";
pub const STORED: &str = "stored";
pub const PRESENT: &str = "present";

pub const TRANSFER: Spec = Spec {
    name: "transfer",
    kind: Kind::Counter,
    unit: Some(Unit::Bytes),
    labels: &["route"],
    series: || each([SENT, FETCHED, RECEIVED, STORED]),
    rare: none,
    help: "Bytes that attempts have moved, whatever became of them: sent to the builder, fetched by the builder from caches, received \
           from it (as archives), stored in the cache (compressed)",
};

pub const TRANSFER_PATHS: Spec = Spec {
    name: "transfer_paths",
    kind: Kind::Counter,
    unit: None,
    labels: &["source"],
    series: || each([PRESENT, FETCHED, SENT]),
    rare: none,
    help: "Inputs of attempts, whatever became of these: present in the builder, fetched by it from caches, sent by the operator",
};

pub const REQUESTS: Spec = Spec {
    name: "requests",
    kind: Kind::Gauge,
    unit: None,
    labels: &["reason"],
    series: || each(reasons(|kind| kind == Meaning::Progress).map(Reason::as_str).chain([OTHER])),
    rare: none,
    help: "Requests that have not come to their end, by what they do or wait for. Of the operator that leads",
};

/// What requests can wait for that somebody may have to do something about.
pub const WAITING: [Reason; 10] = [
    Reason::Pending,
    Reason::WaitingForClass,
    Reason::WaitingForInput,
    Reason::WaitingForSameBuild,
    Reason::WaitingForConcurrency,
    Reason::WaitingForQuota,
    Reason::WaitingForNode,
    Reason::StartingBuilder,
    Reason::ImagePull,
    Reason::Retrying,
];

pub const OLDEST_WAITING: Spec = Spec {
    name: "oldest_waiting",
    kind: Kind::Gauge,
    unit: Some(Unit::Seconds),
    labels: &["reason"],
    series: || each(WAITING.map(Reason::as_str)),
    rare: none,
    help: "Of the requests that wait for this, how long ago the one that waits longest began its attempt or, without one, \
           was created; 0 where none waits",
};

/// How far a builder's pod is.
pub const BUILDER_STATES: [&str; 4] = ["pending", "starting", "running", "ending"];

pub const BUILDERS: Spec = Spec {
    name: "builders",
    kind: Kind::Gauge,
    unit: None,
    labels: &["state"],
    series: || each(BUILDER_STATES),
    rare: none,
    help: "Builder pods that are there: pending (no node yet), starting, running, ending. Of the operator that leads",
};

pub const BUILDERS_ORPHANED: Spec = Spec {
    name: "builders_orphaned",
    kind: Kind::Gauge,
    unit: None,
    labels: NO_LABELS,
    series: one,
    rare: none,
    help: "Builder pods without a request. The sweep deletes them within a minute",
};

pub const SESSIONS: Spec = Spec {
    name: "sessions",
    kind: Kind::Gauge,
    unit: None,
    labels: NO_LABELS,
    series: one,
    rare: none,
    help: "Conversations with builders that run now",
};

pub const CACHE_QUESTIONS: Spec = Spec {
    name: "cache_questions",
    kind: Kind::Counter,
    unit: None,
    labels: &["answered_by"],
    series: || each(["memory", "cache"]),
    rare: none,
    help: "Whether a cache has a path: answered by what is remembered of it, or by the cache itself",
};

pub const CACHE_ERRORS: Spec = Spec {
    name: "cache_errors",
    kind: Kind::Counter,
    unit: None,
    labels: NO_LABELS,
    series: one,
    rare: none,
    help: "Look-ups of outputs or inputs that met a cache which could not be asked",
};

pub const CACHE_PATHS_WRONG: Spec = Spec {
    name: "cache_paths_wrong",
    kind: Kind::Counter,
    unit: None,
    labels: NO_LABELS,
    series: one,
    rare: none,
    help: "Paths that a cache gave otherwise than it had announced them, for which it was set aside",
};

pub const RECONCILE_DURATION: Spec = Spec {
    name: "reconcile_duration",
    kind: Kind::Histogram(PASSES),
    unit: Some(Unit::Seconds),
    labels: NO_LABELS,
    series: one,
    rare: none,
    help: "Time of one look at one request, with all that was done for it",
};

pub const RECONCILE_ERRORS: Spec = Spec {
    name: "reconcile_errors",
    kind: Kind::Counter,
    unit: None,
    labels: &["kind"],
    series: || each(CATEGORIES.iter().copied().chain([OTHER])),
    rare: none,
    help: "Looks at requests, and deletions of orphaned builders, that failed and are tried again",
};

pub const STATUS_WRITES: Spec = Spec {
    name: "status_writes",
    kind: Kind::Counter,
    unit: None,
    labels: NO_LABELS,
    series: one,
    rare: none,
    help: "Writes of a request's status that the API server took",
};

pub const EVENT_ERRORS: Spec = Spec {
    name: "event_errors",
    kind: Kind::Counter,
    unit: None,
    labels: NO_LABELS,
    series: one,
    rare: none,
    help: "Kubernetes Events that were not recorded: refused, or too many at once; nothing depends on them",
};

pub const TRACE_SPANS_DROPPED: Spec = Spec {
    name: "trace_spans_dropped",
    kind: Kind::Counter,
    unit: None,
    labels: NO_LABELS,
    series: one,
    rare: none,
    help: "Spans of traces that did not reach the collector: it was away, or too slow; nothing depends on them",
};

/// What is asked of the API server, as its own audit log calls it.
pub const VERBS: [&str; 8] = ["get", "list", "watch", "create", "update", "patch", "delete", OTHER];
/// Answers: HTTP status codes, and `none` where there was no answer.
pub const NO_ANSWER: &str = "none";
pub const CODES: [&str; 20] = [
    "200", "201", "202", "400", "401", "403", "404", "405", "406", "409", "410", "415", "422", "429", "500",
    "502", "503", "504", NO_ANSWER, OTHER,
];

pub const API_REQUESTS: Spec = Spec {
    name: "api_requests",
    kind: Kind::Counter,
    unit: None,
    labels: &["verb", "code"],
    series: none,
    rare: || VERBS.iter().flat_map(|verb| CODES.map(|code| vec![*verb, code])).collect(),
    help: "Requests to the API server that were answered, by HTTP status code, or were not (none). Repetitions by the client \
           itself are one request",
};

pub const API_REQUEST_DURATION: Spec = Spec {
    name: "api_request_duration",
    kind: Kind::Histogram(CALLS),
    unit: Some(Unit::Seconds),
    labels: &["verb"],
    series: || each(VERBS),
    rare: none,
    help: "Time until the API server began its answer",
};

fn watches() -> Vec<Vec<&'static str>> {
    each([Watch::Classes, Watch::Pods, Watch::Requests].map(Watch::name))
}

pub const WATCH_ERRORS: Spec = Spec {
    name: "watch_errors",
    kind: Kind::Counter,
    unit: None,
    labels: &["watch"],
    series: watches,
    rare: none,
    help: "Watches that broke and began anew",
};

pub const UNREADABLE_OBJECTS: Spec = Spec {
    name: "unreadable_objects",
    kind: Kind::Gauge,
    unit: None,
    labels: &["watch"],
    series: watches,
    rare: none,
    help: "Objects that are there and cannot be read. They are left alone",
};

pub const LEADER: Spec = Spec {
    name: "leader",
    kind: Kind::Gauge,
    unit: None,
    labels: NO_LABELS,
    series: one,
    rare: none,
    help: "Whether this process leads: 1, or 0 while it stands by",
};

pub const READY: Spec = Spec {
    name: "ready",
    kind: Kind::Gauge,
    unit: None,
    labels: NO_LABELS,
    series: one,
    rare: none,
    help: "Whether this process can do its part, which is to lead or to stand by: 1 or 0",
};

pub const BUILD: Spec = Spec {
    name: "build",
    kind: Kind::Info,
    unit: None,
    labels: &["version"],
    series: || each([env!("CARGO_PKG_VERSION")]),
    rare: none,
    help: "The operator's version",
};

/// All of them, in the order in which they are shown.
pub const ALL: &[&Spec] = &[
    &BUILDS,
    &REQUEST_DURATION,
    &BUILDS_SAVED,
    &ATTEMPTS,
    &RETRIES,
    &RECONNECTS,
    &PODS_CREATED,
    &QUEUE_WAIT,
    &POD_START,
    &PHASE_DURATION,
    &TRANSFER,
    &TRANSFER_PATHS,
    &REQUESTS,
    &OLDEST_WAITING,
    &BUILDERS,
    &BUILDERS_ORPHANED,
    &SESSIONS,
    &CACHE_QUESTIONS,
    &CACHE_ERRORS,
    &CACHE_PATHS_WRONG,
    &RECONCILE_DURATION,
    &RECONCILE_ERRORS,
    &STATUS_WRITES,
    &EVENT_ERRORS,
    &TRACE_SPANS_DROPPED,
    &API_REQUESTS,
    &API_REQUEST_DURATION,
    &WATCH_ERRORS,
    &UNREADABLE_OBJECTS,
    &LEADER,
    &READY,
    &BUILD,
];

/// The table for the documentation (`cargo xtask docs`).
pub fn markdown() -> String {
    let mut text = String::from("| metric | type | labels | meaning |\n|---|---|---|---|\n");
    for spec in ALL {
        let labels: Vec<String> = spec
            .labels
            .iter()
            .map(|label| {
                // A release's own version would be another page with each.
                let values = match spec.kind {
                    Kind::Info => "…".to_owned(),
                    _ => spec.values(label).join(", "),
                };
                format!("`{label}`: {values}")
            })
            .collect();
        let (name, kind) = (spec.full_name(), spec.kind.as_str());
        text.push_str(&format!("| `{name}` | {kind} | {} | {}. |\n", labels.join("<br>"), spec.help));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_are_as_prometheus_wants_them() {
        let mut names = Vec::new();
        for spec in ALL {
            let word = |text: &str| {
                text.starts_with(|c: char| c.is_ascii_lowercase())
                    && text.chars().all(|c| c.is_ascii_lowercase() || c == '_')
            };
            assert!(word(spec.name) && spec.labels.iter().all(|label| word(label)), "{spec:?}");
            for suffix in ["_total", "_seconds", "_bytes", "_count", "_sum", "_bucket", "_info"] {
                assert!(!spec.name.ends_with(suffix), "{}: {suffix} is added", spec.name);
            }
            assert!(!spec.help.ends_with('.') && !spec.help.contains(['|', '\n']), "{}", spec.name);
            if let Kind::Histogram(buckets) = spec.kind {
                assert!((spec.rare)().is_empty(), "{}: it cannot tell that it is 0", spec.name);
                assert!(buckets.is_sorted() && buckets.len() <= 20, "{}", spec.name);
            }
            names.push(spec.full_name());
        }
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn series_have_a_value_for_each_label_and_are_few() {
        let mut all = 0;
        for spec in ALL {
            let series: Vec<_> = (spec.series)().into_iter().chain((spec.rare)()).collect();
            assert!(series.iter().all(|values| values.len() == spec.labels.len()), "{}", spec.name);
            let mut distinct = series.clone();
            distinct.sort();
            distinct.dedup();
            assert_eq!(distinct.len(), series.len(), "{}", spec.name);
            let each = if let Kind::Histogram(buckets) = spec.kind { buckets.len() + 3 } else { 1 };
            all += series.len() * each;
        }
        // What one operator can ever show; a thousand is little for Prometheus.
        assert!(all < 1000, "{all}");
    }

    #[test]
    fn the_page_has_them_all() {
        let page = markdown();
        assert_eq!(page.lines().count(), ALL.len() + 2);
        assert!(page.lines().all(|row| row.matches('|').count() == 5), "{page}");
        assert!(page.contains(
            "| `drover_transfer_bytes_total` | counter | `route`: sent, fetched, received, stored |"
        ));
    }
}
