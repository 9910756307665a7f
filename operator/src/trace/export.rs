//! From what the environment says to spans that go out: where the feature `otel` begins.
//!
//! Owns the exporter's life. Built without the feature, it says so where somebody wants spans.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;

use super::Tracer;
use super::settings::Settings;
use crate::error::Error;

/// How long spans may take to get out when the process ends.
pub const LAST_SPANS: Duration = Duration::from_secs(5);

/// What there is while spans are exported, if they are.
#[derive(Default)]
pub struct Export {
    #[cfg(feature = "otel")]
    queue: Option<std::sync::Arc<super::queue::Queue>>,
}

impl Export {
    /// Starts what `settings` ask for, nothing if there are none. `instance`: what tells this process from others of its kind. Not
    /// to be called on threads of an async runtime.
    pub fn start(settings: Option<&Settings>, instance: &str, dropped: Counter) -> Result<Self, Error> {
        match settings {
            None => Ok(Self::default()),
            Some(settings) => Self::begin(settings, instance, dropped),
        }
    }

    /// Where spans are to be said.
    pub fn tracer(&self) -> Tracer {
        #[cfg(feature = "otel")]
        if let Some(queue) = &self.queue {
            return Tracer::new(queue.clone());
        }
        Tracer::off()
    }

    /// Gets out what is left, within the limit.
    pub fn close(&self, limit: Duration) {
        #[cfg(feature = "otel")]
        if let Some(queue) = &self.queue
            && !queue.close(limit)
        {
            tracing::warn!("not all spans reached the collector within {limit:?}");
        }
        #[cfg(not(feature = "otel"))]
        let _ = limit;
    }

    #[cfg(feature = "otel")]
    fn begin(settings: &Settings, instance: &str, dropped: Counter) -> Result<Self, Error> {
        use super::otlp::Otlp;
        use super::queue::{Limits, Queue};

        let fail = |why: String| Error::Tracing { why };
        let otlp = Otlp::new(settings, instance).map_err(fail)?;
        tracing::info!(collector = otlp.collector(), ratio = settings.sampler.ratio, "spans are exported");
        let queue = Queue::start(otlp, settings.sampler, Limits::default(), dropped)
            .map_err(|error| fail(format!("no thread: {error}")))?;
        Ok(Self { queue: Some(queue) })
    }

    #[cfg(not(feature = "otel"))]
    fn begin(_: &Settings, _: &str, _: Counter) -> Result<Self, Error> {
        let why = "this operator was built without the feature `otel`: take one that was built with it, as released images are, \
                   or unset OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
        Err(Error::Tracing { why: why.into() })
    }
}

#[cfg(all(test, not(feature = "otel")))]
mod tests {
    use super::*;

    #[test]
    fn without_the_feature_it_says_what_to_do() {
        let settings = Settings::read(|name| {
            (name == "OTEL_EXPORTER_OTLP_ENDPOINT").then(|| "http://collector:4318".to_owned())
        });
        let wanted = settings.unwrap();
        let error = Export::start(wanted.as_ref(), "a", Counter::default()).err().unwrap().to_string();
        assert!(error.contains("`otel`") && error.contains("OTEL_EXPORTER_OTLP_ENDPOINT"), "{error}");
        assert!(Export::start(None, "a", Counter::default()).is_ok());
    }
}
