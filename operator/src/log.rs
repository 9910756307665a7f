//! Log lines: whose they are, and how they look.
//!
//! Whatever is done for a request is done inside a span from [`of_request`], and every line from there carries its fields; work
//! that goes on elsewhere takes the span along ([`carried`] for threads, `instrument` for tasks). In JSON all fields are flat
//! and keep their names, which scripts rely on; as text, a line begins with them.

use std::fmt::Debug;
use std::io::Write as _;

use drover_api::BuildRequest;
use jiff::Timestamp;
use kube::ResourceExt as _;
use serde_json::{Map, Value};
use tracing::field::{Empty, Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Dispatch, Event, Span, Subscriber};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, Layer};

/// Spans and lines of our own are known by this beginning of their target.
const OURS: &str = "drover";

/// The span of all work for a request. Of the highest level, so that no filter of levels takes the fields off a line.
pub fn of_request(namespace: &str, request: &str, uid: &str, attempt: Option<u32>) -> Span {
    let span = tracing::error_span!(parent: None, "request", namespace, request, uid, attempt = Empty);
    if let Some(attempt) = attempt {
        span.record("attempt", attempt);
    }
    span
}

/// The same of a request as it was read.
pub fn of(request: &BuildRequest) -> Span {
    let attempt = request.status.as_ref().and_then(|status| status.attempt);
    let (namespace, uid) = (request.namespace().unwrap_or_default(), request.uid().unwrap_or_default());
    of_request(&namespace, &request.name_any(), &uid, attempt)
}

/// Work for another thread, with the span that it is called in.
pub fn carried<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
    let (span, dispatch) = (Span::current(), tracing::dispatcher::get_default(Dispatch::clone));
    move || tracing::dispatcher::with_default(&dispatch, || span.in_scope(work))
}

/// What writes one JSON object for each line.
pub fn json<W>(filter: EnvFilter, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    tracing_subscriber::registry().with(filter).with(Json { writer })
}

/// What writes a line of text for each.
pub fn text<W>(filter: EnvFilter, writer: W, is_coloured: bool) -> impl Subscriber + Send + Sync
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    // The controller's own span repeats what ours says.
    let ours = filter_fn(|metadata| metadata.is_event() || metadata.target().starts_with(OURS));
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(is_coloured);
    tracing_subscriber::registry().with(filter).with(lines.with_filter(ours))
}

/// Has panics logged as everything else is, with the span that they happened in.
pub fn note_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.payload().downcast_ref::<String>().map(String::as_str);
        let text =
            text.or_else(|| panic.payload().downcast_ref::<&str>().copied()).unwrap_or("it said nothing");
        let location = panic.location().map(ToString::to_string);
        let thread = std::thread::current().name().map(str::to_owned);
        tracing::error!(
            location,
            thread,
            detail = text,
            "the program panicked: this is a mistake in it, please report it"
        );
    }));
}

struct Json<W> {
    writer: W,
}

/// Of a span: kept with it.
struct Fields(Map<String, Value>);

impl<S, W> Layer<S> for Json<W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if !attributes.metadata().target().starts_with(OURS) {
            return;
        }
        let mut fields = Map::new();
        attributes.record(&mut Collect(&mut fields));
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(Fields(fields));
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(Fields(fields)) = span.extensions_mut().get_mut() {
            values.record(&mut Collect(fields));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Map::new();
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(Fields(more)) = span.extensions().get() {
                fields.extend(more.clone());
            }
        }
        event.record(&mut Collect(&mut fields));
        let metadata = event.metadata();
        fields.insert("level".into(), metadata.level().as_str().into());
        fields.insert("target".into(), metadata.target().into());
        fields.insert("timestamp".into(), format!("{:.6}", Timestamp::now()).into());
        let line = format!("{}\n", Value::Object(fields));
        // Nobody is left to be told of a log that cannot be written.
        let _ = self.writer.make_writer_for(metadata).write_all(line.as_bytes());
    }
}

struct Collect<'a>(&'a mut Map<String, Value>);

impl Collect<'_> {
    fn put(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}

impl Visit for Collect<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, value.to_string());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put(field, format!("{value:?}"));
    }
}

pub mod testing {
    //! Log lines for tests to look at.

    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Lines in memory.
    #[derive(Clone, Default)]
    pub struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Lines {
        /// Everything that our own code logs on this thread, and on those that its work is [`carried`] to, from here on.
        pub fn capture(&self) -> tracing::subscriber::DefaultGuard {
            let lines = self.clone();
            let filter = EnvFilter::new("warn,drover_operator=debug");
            tracing::subscriber::set_default(json(filter, move || lines.clone()))
        }

        pub fn parsed(&self) -> Vec<Value> {
            let bytes = self.0.lock().expect("no panic in between").clone();
            let text = String::from_utf8(bytes).expect("lines are text");
            text.lines().map(|line| serde_json::from_str(line).expect("each line is an object")).collect()
        }
    }

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no panic in between").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::Lines;
    use super::*;

    #[test]
    fn a_line_carries_its_request_on_other_threads_as_well() {
        let lines = Lines::default();
        let _captured = lines.capture();
        let error: &dyn std::error::Error = &std::io::Error::other("it broke");
        tracing::warn!(error, count = 3, "alone");
        let span = of_request("team", "hello", "u-1", None);
        span.in_scope(|| {
            tracing::info!("before");
            span.record("attempt", 1);
            span.record("attempt", 2);
            std::thread::spawn(carried(|| tracing::info!(request_count = 7, "{}", "elsewhere")))
                .join()
                .unwrap();
        });
        let mut parsed = lines.parsed();
        for line in &mut parsed {
            let time = line["timestamp"].take();
            assert!(
                time.as_str().unwrap().parse::<Timestamp>().is_ok() && time.as_str().unwrap().ends_with('Z'),
                "{time}"
            );
            line.as_object_mut().unwrap().remove("timestamp");
        }
        let target = "drover_operator::log::tests";
        assert_eq!(
            parsed,
            [
                serde_json::json!({"level": "WARN", "target": target, "message": "alone", "error": "it broke", "count": 3}),
                serde_json::json!({"level": "INFO", "target": target, "message": "before",
                    "namespace": "team", "request": "hello", "uid": "u-1"}),
                serde_json::json!({"level": "INFO", "target": target, "message": "elsewhere", "request_count": 7,
                    "namespace": "team", "request": "hello", "uid": "u-1", "attempt": 2}),
            ]
        );
    }
}
