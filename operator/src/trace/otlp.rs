//! Spans as OpenTelemetry's protocol has them, over HTTP: the one place that knows its libraries.
//!
//! Blocks, and must not be made or used on threads of an async runtime. Messages of its errors have no URL and no header: both may
//! hold secrets.

use std::collections::HashMap;
use std::future::{Future, ready};
use std::io::Read as _;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures::FutureExt as _;
use opentelemetry::trace::{self as api, SpanContext, SpanKind, Status, TraceFlags, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use reqwest::blocking::Client;
use reqwest::{Url, redirect};

use super::queue::Deliver;
use super::settings::Settings;
use super::{Span, Value};

/// What the resource is called unless somebody says otherwise.
const SERVICE: &str = "drover-operator";
/// Largest answer that is read; what the protocol says in one is far less.
const MAX_ANSWER: u64 = 64 << 10;
/// How long a connection may take, within the time of the request.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Delivers to one collector.
#[derive(Debug)]
pub(super) struct Otlp {
    exporter: SpanExporter,
    scope: InstrumentationScope,
    /// Why the last request failed: the exporter keeps that to itself.
    trouble: Trouble,
    collector: String,
}

type Trouble = Arc<Mutex<Option<String>>>;

impl Otlp {
    /// The error is a sentence. Nothing is sent yet.
    pub(super) fn new(settings: &Settings, instance: &str) -> Result<Self, String> {
        let url: Url =
            settings.endpoint.parse().map_err(|error| format!("the collector's URL is none: {error}"))?;
        let trouble = Trouble::default();
        let http = Http { client: client(settings, &url)?, trouble: trouble.clone() };
        let mut exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(http)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(&settings.endpoint)
            .with_timeout(settings.timeout)
            .with_headers(settings.headers.iter().cloned().collect::<HashMap<_, _>>())
            .build()
            .map_err(|_| "the exporter does not take the settings; see the collector's URL".to_owned())?;
        exporter.set_resource(&resource(settings, instance));
        let scope = InstrumentationScope::builder(SERVICE).with_version(env!("CARGO_PKG_VERSION")).build();
        let port = url.port_or_known_default().map(|port| format!(":{port}")).unwrap_or_default();
        let collector = format!("{}://{}{port}", url.scheme(), url.host_str().unwrap_or_default());
        Ok(Self { exporter, scope, trouble, collector })
    }

    /// Scheme, host and port, for messages.
    pub(super) fn collector(&self) -> &str {
        &self.collector
    }
}

impl Deliver for Otlp {
    fn deliver(&mut self, spans: Vec<Span>) -> Result<(), String> {
        let batch = spans.into_iter().map(|span| data(span, &self.scope)).collect();
        // Nothing in there waits by itself: requests block, and so do the pauses between them.
        let result = self.exporter.export(batch).now_or_never();
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner).take();
        match result {
            Some(Ok(())) => Ok(()),
            Some(Err(OTelSdkError::InternalFailure(said))) => {
                Err(format!("{}: {}", self.collector, trouble.unwrap_or(said)))
            }
            Some(Err(error)) => Err(format!("{}: {error}", self.collector)),
            None => Err(format!("{}: the exporter did not come to its end", self.collector)),
        }
    }
}

/// Our own client, because of its TLS: ring alone, and the system's authorities.
#[derive(Debug)]
struct Http {
    client: Client,
    trouble: Trouble,
}

impl Http {
    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let answer = self.client.execute(request.try_into()?)?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        let mut body = Vec::new();
        answer.take(MAX_ANSWER).read_to_end(&mut body)?;
        let mut answer = Response::new(Bytes::from(body));
        (*answer.status_mut(), *answer.headers_mut()) = (status, headers);
        Ok(answer)
    }
}

impl HttpClient for Http {
    fn send_bytes<'a, 'b>(
        &'a self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        let result = self.send(request);
        let trouble = match &result {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(format!("it answered with {}", answer.status())),
            Err(error) => Some(cause(error.as_ref())),
        };
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
        Box::pin(ready(result))
    }
}

fn client(settings: &Settings, url: &Url) -> Result<Client, String> {
    let tls = drover_cache::tls::client_config(settings.certificates.as_deref(), url.scheme() == "https")?;
    Client::builder()
        .user_agent(concat!("drover-operator/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT.min(settings.timeout))
        .timeout(settings.timeout)
        // Headers are for the collector that was named.
        .redirect(redirect::Policy::none())
        .tls_backend_preconfigured(tls)
        .build()
        .map_err(|error| error.without_url().to_string())
}

/// The innermost reason, which is what one can do something about; the outer ones name the URL.
fn cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    match innermost.downcast_ref::<reqwest::Error>() {
        Some(error) if error.is_timeout() => "it gave no answer in time".into(),
        Some(_) => "the request failed".into(),
        None => innermost.to_string(),
    }
}

fn resource(settings: &Settings, instance: &str) -> Resource {
    let given = settings.resource.iter().map(|(name, value)| KeyValue::new(name.clone(), value.clone()));
    // Of two with one name, the later counts.
    let mut attributes = vec![
        KeyValue::new("service.name", SERVICE),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", instance.to_owned()),
    ];
    attributes.extend(given);
    attributes.extend(settings.service.as_ref().map(|name| KeyValue::new("service.name", name.clone())));
    Resource::builder_empty().with_attributes(attributes).build()
}

fn data(span: Span, scope: &InstrumentationScope) -> SpanData {
    let trace = api::TraceId::from_bytes(span.trace.0);
    let id = api::SpanId::from_bytes(span.id.0);
    let value = |value| match value {
        Value::Text(text) => text.into(),
        Value::Number(number) => opentelemetry::Value::I64(number),
        Value::Flag(flag) => opentelemetry::Value::Bool(flag),
    };
    let attributes = span.attributes.into_iter().map(|(name, said)| KeyValue::new(name, value(said)));
    SpanData {
        span_context: SpanContext::new(trace, id, TraceFlags::SAMPLED, false, TraceState::NONE),
        parent_span_id: span.parent.map_or(api::SpanId::INVALID, |parent| api::SpanId::from_bytes(parent.0)),
        parent_span_is_remote: span.has_remote_parent,
        span_kind: SpanKind::Internal,
        name: span.name.into(),
        start_time: SystemTime::from(span.start),
        end_time: SystemTime::from(span.end),
        attributes: attributes.collect(),
        dropped_attributes_count: 0,
        events: Default::default(),
        links: Default::default(),
        status: span.error.map_or(Status::Unset, Status::error),
        instrumentation_scope: scope.clone(),
    }
}
