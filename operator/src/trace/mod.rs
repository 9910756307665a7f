//! Spans of requests' lives, for whoever collects traces by OpenTelemetry.
//!
//! Owns what a span is ([`Span`]), what there is to be said of a change of status ([`transition`]) and of a session
//! ([`session`]), the ids ([`context`]), and the way out ([`queue`], [`export`]). All of it is always compiled but the last step:
//! with the feature `otel` alone, spans become OpenTelemetry's and leave over HTTP. The first three are pure. Nothing in here may
//! hold up a build or fail one: a [`Sink`] takes spans without waiting for anything.
//!
//! No span is kept while it runs: each is made at its end, from what the status or the session's thread knows then. Ids of spans of
//! the status follow from the request's uid alone, so that an operator that is started again goes on with the same trace.

pub mod context;
pub mod export;
#[cfg(feature = "otel")]
mod otlp;
pub mod queue;
pub mod session;
pub mod settings;
pub mod transition;

use std::fmt;
use std::sync::Arc;

use jiff::Timestamp;

pub use context::{Context, SpanId, TraceId};

/// Something that has ended.
#[derive(Clone, PartialEq, Debug)]
pub struct Span {
    /// One of [`NAMES`].
    pub name: &'static str,
    pub trace: TraceId,
    pub id: SpanId,
    pub parent: Option<SpanId>,
    /// The parent is not Drover's: a BuildRequest's annotation has named it.
    pub has_remote_parent: bool,
    /// Whether the one who began the trace keeps it; None: nobody began it before us.
    pub is_sampled: Option<bool>,
    pub start: Timestamp,
    /// Never before `start`.
    pub end: Timestamp,
    /// Why it failed: a word, mostly a [`drover_api::Reason`]. Messages may tell what tenants build, and stay in the status.
    pub error: Option<&'static str>,
    pub attributes: Vec<(&'static str, Value)>,
}

/// What an attribute says.
#[derive(Clone, PartialEq, Debug)]
pub enum Value {
    Text(String),
    Number(i64),
    Flag(bool),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

/// The largest there is, where it is more than OpenTelemetry's integers hold.
impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

/// Every span that there is, and what it is about.
pub const NAMES: [(&str, &str); 13] = [
    ("request", "from a BuildRequest's creation to its end"),
    ("wait", "from the creation, or the end of the attempt before, to the begin of an attempt"),
    ("attempt", "one attempt"),
    ("schedule", "from an attempt's begin until its pod has a node"),
    ("start", "from there until the builder has answered: its image, its containers, the first connection"),
    ("session", "one conversation with a builder, from looking for it to the end"),
    ("connect", "reaching the builder, and the protocol's greeting"),
    ("lock", "finding all that the build needs, and locking it on the builder"),
    ("fetch", "the builder fetches inputs from its caches"),
    ("copy", "the operator sends inputs"),
    ("build", "the builder builds"),
    ("collect", "receiving and checking the outputs"),
    ("push", "storing them in the cache"),
];

/// Where ended spans go.
pub trait Sink: Send + Sync {
    /// Returns at once. What it has no room for is lost.
    fn take(&self, span: Span);
}

/// Hands spans on, or drops them. Clones lead to the same place.
#[derive(Clone, Default)]
pub struct Tracer(Option<Arc<dyn Sink>>);

impl Tracer {
    /// Drops them.
    pub fn off() -> Self {
        Self::default()
    }

    pub fn new(sink: Arc<dyn Sink>) -> Self {
        Self(Some(sink))
    }

    /// The spans are made only where somebody wants them.
    pub fn say(&self, spans: impl FnOnce() -> Vec<Span>) {
        let Some(sink) = &self.0 else { return };
        for span in spans() {
            sink.take(span);
        }
    }
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tracer").field(&self.0.is_some()).finish()
    }
}
