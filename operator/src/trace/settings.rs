//! What the environment says of where spans go, in OpenTelemetry's own names (its specification, "OpenTelemetry Environment
//! Variable Specification" and "OpenTelemetry Protocol Exporter"). Pure: whoever calls brings the environment.
//!
//! The operator reads these itself, so that what makes no sense keeps it from starting, instead of being passed over.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::Span;
use crate::error::Error;

/// What a request to the collector may be given at most.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(60);
/// What it has if nothing is said, as the specification has it.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// The one protocol that is spoken.
const PROTOCOL: &str = "http/protobuf";

/// A collector, and what it is told.
#[derive(Clone, PartialEq)]
pub struct Settings {
    /// Whole URL of a POST, without a user.
    pub endpoint: String,
    /// Names and values, which are secrets.
    pub headers: Vec<(String, String)>,
    /// For a request with all its repeats.
    pub timeout: Duration,
    /// PEM file of authorities to believe beside the system's.
    pub certificates: Option<PathBuf>,
    /// `service.name`, if it is given.
    pub service: Option<String>,
    /// What else is said of this operator.
    pub resource: Vec<(String, String)>,
    pub sampler: Sampler,
}

/// Which traces are kept.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sampler {
    /// Of those that began elsewhere, the ones that are kept there, whatever the ratio.
    pub follows_parent: bool,
    /// Share of traces, from 0 to 1.
    pub ratio: f64,
}

impl Settings {
    /// None where nothing is to be sent. `variable` gives what one is set to, if it is.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, Error> {
        // Set to nothing is as good as not set.
        let set = |name: &'static str| {
            variable(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
        };
        // The name for traces alone comes first.
        let either = |own: &'static str, general: &'static str| {
            set(own).map(|text| (own, text)).or_else(|| set(general).map(|text| (general, text)))
        };
        if set("OTEL_SDK_DISABLED").is_some_and(|text| text.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        match set("OTEL_TRACES_EXPORTER").as_deref() {
            None | Some("otlp") => {}
            Some("none") => return Ok(None),
            Some(_) => return fail("OTEL_TRACES_EXPORTER", "the exporters that there are: otlp, none"),
        }
        let endpoint = match either("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT") {
            None => return Ok(None),
            Some((name @ "OTEL_EXPORTER_OTLP_ENDPOINT", base)) => {
                format!("{}/v1/traces", checked_url(name, &base)?.trim_end_matches('/'))
            }
            Some((name, whole)) => checked_url(name, &whole)?.to_owned(),
        };
        if let Some((name, protocol)) =
            either("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
            && protocol != PROTOCOL
        {
            let why = "only http/protobuf is spoken: leave this out, and name the collector's port for HTTP, which is mostly 4318";
            return fail(name, why);
        }
        if let Some((name, compression)) =
            either("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "OTEL_EXPORTER_OTLP_COMPRESSION")
            && compression != "none"
        {
            return fail(name, "spans are not compressed: leave it out");
        }
        let pairs_of = |found: Option<(&'static str, String)>, check: fn(&str, &str) -> bool| match found {
            Some((name, text)) => pairs(name, &text, check),
            None => Ok(vec![]),
        };
        let headers = either("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS");
        let resource = set("OTEL_RESOURCE_ATTRIBUTES").map(|text| ("OTEL_RESOURCE_ATTRIBUTES", text));
        let certificates = either("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "OTEL_EXPORTER_OTLP_CERTIFICATE");
        Ok(Some(Self {
            endpoint,
            headers: pairs_of(headers, is_header)?,
            timeout: timeout(either("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"))?,
            certificates: certificates.map(|(_, path)| path.into()),
            service: set("OTEL_SERVICE_NAME"),
            resource: pairs_of(resource, |_, _| true)?,
            sampler: Sampler::read(set("OTEL_TRACES_SAMPLER"), set("OTEL_TRACES_SAMPLER_ARG"))?,
        }))
    }
}

/// Without secrets.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("timeout", &self.timeout)
            .field("sampler", &self.sampler)
            .finish_non_exhaustive()
    }
}

impl Sampler {
    /// Whether the span's trace is kept: the same for all spans of a trace, and the same that OpenTelemetry's own libraries say.
    pub fn keeps(&self, span: &Span) -> bool {
        if let (true, Some(is_sampled)) = (self.follows_parent, span.is_sampled) {
            return is_sampled;
        }
        let [.., a, b, c, d, e, f, g, h] = span.trace.0;
        let place = u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 1;
        // From 0 to 2^63, which f64 has exactly; both ends of the ratio are exact as well.
        place < (self.ratio * (1_u64 << 63) as f64) as u64
    }

    fn read(name: Option<String>, argument: Option<String>) -> Result<Self, Error> {
        let name = name.as_deref().unwrap_or("parentbased_always_on");
        let (follows_parent, kind) = match name.strip_prefix("parentbased_") {
            Some(kind) => (true, kind),
            None => (false, name),
        };
        let ratio = match kind {
            "always_on" => 1.0,
            "always_off" => 0.0,
            "traceidratio" => {
                let ratio = argument.map_or(Some(1.0), |text| text.parse::<f64>().ok());
                match ratio.filter(|ratio| (0.0..=1.0).contains(ratio)) {
                    Some(ratio) => ratio,
                    None => return fail("OTEL_TRACES_SAMPLER_ARG", "it must be a number from 0 to 1"),
                }
            }
            _ => {
                let why = "the samplers that there are: always_on, always_off, traceidratio, each also with parentbased_ in front";
                return fail("OTEL_TRACES_SAMPLER", why);
            }
        };
        Ok(Self { follows_parent, ratio })
    }
}

/// Values stay unsaid: they may be secrets, or hold some.
fn fail<T>(variable: &'static str, why: &str) -> Result<T, Error> {
    Err(Error::Tracing { why: format!("the environment's {variable} makes no sense: {why}") })
}

fn checked_url<'a>(variable: &'static str, url: &'a str) -> Result<&'a str, Error> {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    let authority = rest.and_then(|rest| rest.split(['/', '?', '#']).next()).unwrap_or_default();
    if authority.is_empty() {
        return fail(variable, "it must be a URL such as http://otel-collector.observability:4318");
    }
    if authority.contains('@') {
        let why =
            "a user is no part of it: say it in OTEL_EXPORTER_OTLP_HEADERS, as authorization=Basic%20...";
        return fail(variable, why);
    }
    Ok(url)
}

fn timeout(found: Option<(&'static str, String)>) -> Result<Duration, Error> {
    let Some((name, text)) = found else { return Ok(DEFAULT_TIMEOUT) };
    let timeout = text.parse().map(Duration::from_millis).unwrap_or_default();
    if timeout.is_zero() || timeout > LONGEST_TIMEOUT {
        return fail(name, &format!("it must be milliseconds, 1 to {}", LONGEST_TIMEOUT.as_millis()));
    }
    Ok(timeout)
}

/// `NAME=VALUE,NAME=VALUE`, values percent-encoded, as in W3C's Baggage.
fn pairs(
    variable: &'static str,
    text: &str,
    check: fn(&str, &str) -> bool,
) -> Result<Vec<(String, String)>, Error> {
    let mut pairs = Vec::new();
    for (place, entry) in text.split(',').enumerate().filter(|(_, entry)| !entry.trim().is_empty()) {
        let pair =
            entry.split_once('=').and_then(|(name, value)| Some((name.trim(), decoded(value.trim())?)));
        match pair {
            Some((name, value)) if !name.is_empty() && check(name, &value) => {
                pairs.push((name.to_owned(), value));
            }
            _ => return fail(variable, &format!("entry {} of the list is not NAME=VALUE", place + 1)),
        }
    }
    Ok(pairs)
}

/// What HTTP takes for a header.
fn is_header(name: &str, value: &str) -> bool {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    name.bytes().all(is_token) && value.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

/// With each `%xx` undone; None if one is not that, or the result is no text.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                let (high, low) = (digit()?, digit()?);
                u8::try_from(high << 4 | low).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::{SpanId, TraceId};

    fn read(variables: &[(&str, &str)]) -> Result<Option<Settings>, Error> {
        Settings::read(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, text)| (*text).to_owned())
        })
    }

    fn good(variables: &[(&str, &str)]) -> Settings {
        let all = [&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")], variables].concat();
        read(&all).unwrap().unwrap()
    }

    #[test]
    fn nothing_is_sent_unless_somebody_says_where_to() {
        assert_eq!(read(&[]).unwrap(), None);
        assert_eq!(read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")]).unwrap(), None);
        assert_eq!(read(&[("OTEL_TRACES_EXPORTER", "otlp")]).unwrap(), None);
        let there = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318");
        assert_eq!(read(&[there, ("OTEL_SDK_DISABLED", "True")]).unwrap(), None);
        assert_eq!(read(&[there, ("OTEL_TRACES_EXPORTER", "none")]).unwrap(), None);
    }

    #[test]
    fn what_is_said_for_traces_alone_comes_first() {
        let settings = good(&[]);
        assert_eq!(settings.endpoint, "http://collector:4318/v1/traces");
        assert_eq!(settings.timeout, Duration::from_secs(10));
        assert_eq!(settings.sampler, Sampler { follows_parent: true, ratio: 1.0 });
        let settings = good(&[
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://traces.example.org/in?key=s3cret"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=b"),
            ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "authorization=Bearer%20s3cret, x-team = b=c ,"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "1"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2500"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/etc/ca.pem"),
            ("OTEL_SERVICE_NAME", "builds"),
            ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=a%2Cb"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_TRACES_SAMPLER", "traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
        ]);
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(settings.endpoint, "https://traces.example.org/in?key=s3cret");
        assert_eq!(settings.headers, [pair("authorization", "Bearer s3cret"), pair("x-team", "b=c")]);
        assert_eq!(settings.timeout, Duration::from_millis(2500));
        assert_eq!(settings.certificates, Some("/etc/ca.pem".into()));
        assert_eq!(settings.service.as_deref(), Some("builds"));
        assert_eq!(settings.resource, [pair("deployment.environment.name", "a,b")]);
        assert_eq!(settings.sampler, Sampler { follows_parent: false, ratio: 0.25 });
        let shown = format!("{settings:?}");
        assert!(!shown.contains("s3cret"), "{shown}");
        let slash = read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector/base/")]).unwrap().unwrap();
        assert_eq!(slash.endpoint, "http://collector/base/v1/traces");
    }

    #[test]
    fn what_makes_no_sense_is_said_without_its_value() {
        let there = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318");
        for wrong in [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "s3cret:4317"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https:///v1/traces"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://user:s3cret@collector/v1/traces"),
            ("OTEL_TRACES_EXPORTER", "s3cret"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "s3cret"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "=s3cret"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a b=s3cret"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=s3cret%0d%0ab: c"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=s3cret%f"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "0"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "60001"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
            ("OTEL_TRACES_SAMPLER", "s3cret"),
        ] {
            let error = read(&[wrong, there]).unwrap_err().to_string();
            assert!(error.contains(wrong.0) && !error.contains("s3cret"), "{error}");
        }
        for argument in ["s3cret", "1.1", "-0.1", "NaN"] {
            let sampler = ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio");
            let error =
                read(&[there, sampler, ("OTEL_TRACES_SAMPLER_ARG", argument)]).unwrap_err().to_string();
            assert!(error.contains("OTEL_TRACES_SAMPLER_ARG") && !error.contains(argument), "{error}");
        }
    }

    #[test]
    fn a_trace_is_kept_as_a_whole() {
        let span = |low: u64, is_sampled| {
            let mut trace = [7; 16];
            trace[8..].copy_from_slice(&low.to_be_bytes());
            let now = jiff::Timestamp::UNIX_EPOCH;
            Span {
                name: "request",
                trace: TraceId(trace),
                id: SpanId([1; 8]),
                parent: None,
                has_remote_parent: false,
                is_sampled,
                start: now,
                end: now,
                error: None,
                attributes: vec![],
            }
        };
        let of = |follows_parent, ratio| Sampler { follows_parent, ratio };
        let (least, middle, most) = (0, u64::MAX / 2, u64::MAX);
        for low in [least, middle, most] {
            assert!(of(true, 1.0).keeps(&span(low, None)), "{low}");
            assert!(!of(true, 0.0).keeps(&span(low, None)), "{low}");
            // Who began the trace decides, if we are to follow.
            assert!(of(true, 0.0).keeps(&span(low, Some(true))), "{low}");
            assert!(!of(true, 1.0).keeps(&span(low, Some(false))), "{low}");
            assert!(of(false, 1.0).keeps(&span(low, Some(false))), "{low}");
        }
        let half = of(true, 0.5);
        assert_eq!([least, middle, most].map(|low| half.keeps(&span(low, None))), [true, true, false]);
    }
}
