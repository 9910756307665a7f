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

/// Bytes of a text in an attribute. What is longer is cut: it is somebody's who makes requests.
const MAX_TEXT: usize = 1024;

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
        let end = (0..=text.len().min(MAX_TEXT)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        Self::Text(text[..end].to_owned())
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

/// Every span that there is, what it is below of, and what it lasts.
pub const NAMES: [(&str, &str, &str); 13] = [
    ("request", "", "from the BuildRequest's creation to its end"),
    (
        "wait",
        "request",
        "from its creation, or the end of the attempt before, until an attempt begins: look-ups, inputs, the queue",
    ),
    ("attempt", "request", "one attempt; its pod's name and node are attributes"),
    ("schedule", "attempt", "from the attempt's begin until its pod has a node"),
    (
        "start",
        "attempt",
        "from there until the builder has answered: image, containers, the first connection",
    ),
    (
        "session",
        "attempt",
        "one conversation with the builder; after a connection that broke there is another",
    ),
    ("connect", "session", "reaching the builder, and the protocol's greeting"),
    (
        "lock",
        "session",
        "finding all that the build needs, and locking it on the builder; paths and bytes that it lacks",
    ),
    (
        "fetch",
        "session",
        "the builder fetches inputs from its caches, in slices of one span each; paths and bytes that came",
    ),
    ("copy", "session", "the operator sends what is missing then; paths and bytes"),
    ("build", "session", "the builder builds, or waits for one that builds the same"),
    ("collect", "session", "receiving and checking the outputs; outputs and bytes"),
    ("push", "session", "storing them in the cache"),
];

/// The table for the documentation (`cargo xtask docs`).
pub fn markdown() -> String {
    let row = |(name, parent, about): &(&str, &str, &str)| {
        let parent = if parent.is_empty() { String::new() } else { format!("`{parent}`") };
        format!("| `{name}` | {parent} | {about} |\n")
    };
    let head = "| span | below | what it lasts |\n|---|---|---|\n".to_owned();
    [head].into_iter().chain(NAMES.iter().map(row)).collect()
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_have_an_end() {
        let text = |length: usize| Value::from(&*"é".repeat(length));
        assert_eq!(text(3), Value::Text("ééé".into()));
        assert_eq!(text(MAX_TEXT), Value::Text("é".repeat(MAX_TEXT / 2)));
        let odd = format!("x{}", "é".repeat(MAX_TEXT));
        assert_eq!(Value::from(&*odd), Value::Text(odd[..MAX_TEXT - 1].into()));
    }
}
