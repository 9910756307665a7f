//! What a collector of traces receives: the operator's spans over real HTTP, decoded from the bytes.

#![allow(clippy::unwrap_used)] // all of it is tests

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

use drover_api::conditions::{self, Status};
use drover_api::{BuildRequest, Reason, Timings, Transfer};
use drover_operator::status::Draft;
use drover_operator::trace::export::Export;
use drover_operator::trace::session::Recorder;
use drover_operator::trace::settings::Settings;
use drover_operator::trace::{Context, NAMES, Tracer, context, transition};
use drover_operator::world::SessionEnd;
use drover_serve::{BuildResult, BuildStatus, LATEST};
use drover_session::Event;
use drover_tests::collector::{self, Collector, Received, text};
use jiff::Timestamp;
use opentelemetry_proto::tonic::trace::v1::Span;
use prometheus_client::metrics::counter::Counter;

const LONG: Duration = Duration::from_secs(60);
const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn export(address: SocketAddr, more: &[(&str, &str)], dropped: &Counter) -> Export {
    let endpoint = format!("http://{address}");
    let settings = Settings::read(|name| {
        let more = more.iter().find(|(known, _)| *known == name).map(|(_, text)| (*text).to_owned());
        more.or_else(|| (name == "OTEL_EXPORTER_OTLP_ENDPOINT").then(|| endpoint.clone()))
    });
    Export::start(settings.unwrap().as_ref(), "drover-operator-0", dropped.clone()).unwrap()
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn request(annotation: Option<&str>) -> BuildRequest {
    let mut request = BuildRequest::new("hello", Default::default());
    request.metadata.namespace = Some("ci".into());
    request.metadata.uid = Some("3f1d".into());
    request.metadata.creation_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(100)));
    let annotation = annotation.map(|text| (context::TRACEPARENT.to_owned(), text.to_owned()));
    request.metadata.annotations = Some(annotation.into_iter().collect());
    request
}

/// As the operator writes it.
fn write(request: &mut BuildRequest, tracer: &Tracer, second: i64, change: impl FnOnce(&mut Draft)) {
    let mut draft = Draft::new(request, at(second));
    change(&mut draft);
    let status = draft.finish().unwrap();
    tracer.say(|| transition::spans_of(request, &status, at(second)));
    request.status = Some(status);
}

/// From a request to its outputs. Its build fails unless it `succeeds`.
fn live(request: &mut BuildRequest, tracer: &Tracer, succeeds: bool) {
    write(request, tracer, 110, |draft| draft.begin_attempt(1, None));
    write(request, tracer, 120, |draft| {
        draft.phase(conditions::SCHEDULED, Status::True, Reason::Scheduled, "on node n1");
    });
    let mut session = Recorder::new(Context::of(request), 1, "hello-1", at(121));
    let built = if succeeds { BuildStatus::Built } else { BuildStatus::PermanentFailure };
    let events = [
        Event::Connected { version: LATEST },
        Event::Locked { valid: 1, missing: 2, missing_bytes: 30 },
        Event::FetchStarted { paths: 2, bytes: 30 },
        Event::Fetched { paths: 1, bytes: 10 },
        Event::CopyStarted { path: "f8g8x4m83da3b2f79iv84q2r3qlc58lr-lib".parse().unwrap(), nar_size: 20 },
        Event::InputsCopied { paths: 1, bytes: 20 },
        Event::BuildStarted,
        Event::Built { result: BuildResult::new(built) },
        Event::OutputsVerified { outputs: 1, bytes: 5 },
        Event::OutputsCollected,
    ];
    let heard = if succeeds { events.len() } else { 8 };
    for (second, event) in (122..).zip(&events[..heard]) {
        tracer.say(|| session.event(event, at(second)).into_iter().collect());
    }
    write(request, tracer, 123, |draft| {
        draft.phase(conditions::BUILDER_READY, Status::True, Reason::BuilderReady, "");
    });
    let end = if succeeds {
        SessionEnd::Finished {
            outputs: BTreeMap::new(),
            transfer: Transfer::default(),
            timings: Timings::default(),
        }
    } else {
        let message = "what the tenant's build said".to_owned();
        SessionEnd::Failed { reason: Reason::BuildFailed, message, infrastructure: false }
    };
    tracer.say(|| session.end(&end, false, at(140)));
    write(request, tracer, 141, |draft| match succeeds {
        true => draft.succeed(Reason::Built, BTreeMap::new()),
        false => draft.fail(Reason::BuildFailed, "what the tenant's build said", &[]),
    });
}

/// With seconds and what failed.
fn tree(spans: &[Span], parent: &[u8]) -> String {
    collector::tree(spans, parent, &|span| {
        let second = |nanos: u64| nanos / 1_000_000_000;
        let (begin, end) = (second(span.start_time_unix_nano), second(span.end_time_unix_nano));
        let error = collector::error(span).map(|why| format!(" {why}")).unwrap_or_default();
        format!("{} {begin}-{end}{error}", span.name)
    })
}

#[test]
fn a_life_arrives_as_one_tree() {
    let (collector, dropped) = (Collector::start(vec![]).unwrap(), Counter::default());
    let headers = ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20s3cret");
    let resource = ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,service.name=no");
    let service = ("OTEL_SERVICE_NAME", "builds");
    let export = export(collector.address, &[headers, resource, service], &dropped);
    live(&mut request(Some(TRACEPARENT)), &export.tracer(), true);
    export.close(LONG);
    let received = collector.next().unwrap();
    assert_eq!(received.line, "POST /v1/traces HTTP/1.1");
    assert_eq!(received.headers["content-type"], "application/x-protobuf");
    assert_eq!(received.headers["authorization"], "Bearer s3cret");
    let message = received.message().unwrap();
    let of = &message.resource_spans[0].resource.as_ref().unwrap().attributes;
    assert_eq!(text(of, "service.name"), Some("builds"));
    assert_eq!(of.iter().filter(|attribute| attribute.key == "service.name").count(), 1);
    assert_eq!(text(of, "service.instance.id"), Some("drover-operator-0"));
    assert_eq!(text(of, "deployment.environment.name"), Some("test"));
    let spans = received.spans().unwrap();
    let trace: Vec<u8> =
        (0..32).step_by(2).map(|i| u8::from_str_radix(&TRACEPARENT[3 + i..5 + i], 16).unwrap()).collect();
    assert!(spans.iter().all(|span| span.trace_id == trace), "{spans:?}");
    let caller = 0xb7ad_6b71_6920_3331_u64.to_be_bytes();
    assert_eq!(
        tree(&spans, &caller),
        "\
request 100-141
  wait 100-110
  attempt 110-141
    schedule 110-120
    start 120-123
    session 121-140
      connect 121-122
      lock 122-123
      fetch 124-125
      copy 126-127
      build 128-129
      collect 129-130
      push 130-131
"
    );
    // Every kind of span that there is, and no other, each where the table has it.
    let mut seen: Vec<&str> = spans.iter().map(|span| &*span.name).collect();
    seen.sort_unstable();
    let mut known = NAMES.map(|(name, ..)| name);
    known.sort_unstable();
    assert_eq!(seen, known);
    for span in &spans {
        let parent = spans.iter().find(|other| other.span_id == span.parent_span_id);
        let (_, below, _) = NAMES.iter().find(|(name, ..)| *name == span.name).unwrap();
        assert_eq!(parent.map_or("", |parent| &*parent.name), *below, "{span:?}");
        assert_eq!(text(&span.attributes, "k8s.namespace.name"), Some("ci"), "{span:?}");
        assert_eq!(text(&span.attributes, "drover.request"), Some("hello"), "{span:?}");
    }
    assert_eq!(dropped.get(), 0);
}

#[test]
fn a_build_that_failed_says_so_and_no_more() {
    let (collector, dropped) = (Collector::start(vec![]).unwrap(), Counter::default());
    let export = export(collector.address, &[], &dropped);
    live(&mut request(None), &export.tracer(), false);
    export.close(LONG);
    let received = collector.next().unwrap();
    assert_eq!(
        tree(&received.spans().unwrap(), &[]),
        "\
request 100-141 BuildFailed
  wait 100-110
  attempt 110-141 BuildFailed
    schedule 110-120
    start 120-123
    session 121-140 BuildFailed
      connect 121-122
      lock 122-123
      fetch 124-125
      copy 126-127
      build 128-129 BuildFailed
"
    );
    // What builds print is the tenant's.
    assert!(!String::from_utf8_lossy(&received.body).contains("tenant"));
}

#[test]
fn a_collector_that_is_busy_is_asked_again() {
    let (collector, dropped) = (Collector::start(vec![503]).unwrap(), Counter::default());
    let export = export(collector.address, &[], &dropped);
    live(&mut request(None), &export.tracer(), true);
    export.close(LONG);
    let tries: Vec<Received> = collector.all();
    assert_eq!(tries.iter().map(|received| received.spans().unwrap().len()).collect::<Vec<_>>(), [13, 13]);
    assert_eq!(dropped.get(), 0);
}

#[test]
fn what_a_collector_does_not_take_is_counted() {
    let refuses = Collector::start(vec![401]).unwrap();
    let gone = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    for address in [refuses.address, gone] {
        let dropped = Counter::default();
        let export = export(address, &[], &dropped);
        live(&mut request(None), &export.tracer(), true);
        export.close(LONG);
        assert_eq!(dropped.get(), 13, "{address}");
    }
    assert_eq!(refuses.all().len(), 1);
}

/// Connections are taken, and nothing ever is said on them: requests end at their timeout, which is what is lost at most.
#[test]
fn a_collector_that_says_nothing_holds_nobody_up() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let dropped = Counter::default();
    let timeout = ("OTEL_EXPORTER_OTLP_TIMEOUT", "50");
    let export = export(listener.local_addr().unwrap(), &[timeout], &dropped);
    live(&mut request(None), &export.tracer(), true);
    export.close(LONG);
    assert_eq!(dropped.get(), 13);
}
