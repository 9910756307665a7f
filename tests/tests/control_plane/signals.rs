//! What an operator says of itself and of its work: events, health, log lines.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drover_tests::collector::{Collector, error, text, tree};
use rustix::process::Signal;
use serde_json::Value;
use xtask::run;

use crate::play::{Build, Builders, Node};
use crate::process::Operator;
use crate::world::{LIMIT, SYSTEM, TEAM, World};

const BEGIN: [&str; 6] =
    ["Accepted", "PodCreated", "Scheduled", "BuilderReady", "InputsCopied", "BuildStarted"];

/// As `kubectl` shows them: in order, each once, and an operator that is started again adds nothing.
#[test]
fn kubectl_shows_what_happened_to_a_build() -> Result<()> {
    let world = World::start()?;
    world.class("small")?;
    let (builders, node) = (Builders::default(), Node::start(&world)?);
    let operator = world.operator_with(std::sync::Arc::new(builders.clone()))?;
    builders.order("good", Build::Succeeds(Duration::ZERO));
    builders.order("bad", Build::Fails);
    for name in ["good", "bad"] {
        world.request(name, "", "x86_64-linux")?;
    }
    world.wait("good", "True")?;
    world.wait("bad", "False")?;
    // Whatever is left to say is said before it has ended.
    operator.stop()?;
    let all = [&BEGIN[..], &["Succeeded"]].concat();
    ensure!(words(&world, "good")? == all, "{:?}", described(&world, "good")?);
    // It failed in one step, from an answer to a verdict: what lies between is said all the same.
    let bad = described(&world, "bad")?;
    let last = bad.last().context("no events")?;
    ensure!(last.starts_with("Warning Failed") && last.contains("BuildFailed: "), "{bad:#?}");
    ensure!(words(&world, "bad")? == [&BEGIN[..], &["Failed"]].concat(), "{bad:#?}");
    ensure!(bad.iter().all(|line| line.contains("drover.build/operator")), "{bad:#?}");
    let shown = world.plane.kubectl(&["events", "-n", TEAM, "--for=buildrequest.drover.build/good"])?;
    ensure!(shown.lines().count() == all.len() + 1, "{shown}");

    let operator = world.operator_with(std::sync::Arc::new(builders))?;
    world.request("later", "", "x86_64-linux")?;
    world.wait("later", "True")?;
    operator.stop()?;
    ensure!(described(&world, "good")?.len() == all.len() && described(&world, "bad")?.len() == all.len());
    drop(node);
    Ok(())
}

/// A watch that never lists, and a lease that cannot be read, are said; and no restart would mend them.
#[test]
fn readiness_says_what_is_missing_and_liveness_stays_out_of_it() -> Result<()> {
    let world = World::start()?;
    world.class("small")?;
    world.plane.kubectl(&["delete", "clusterrolebinding", "drover"])?;
    let first = Operator::start(&world, "first")?;
    first.wait_leads(&world)?;
    says(
        &first,
        "/readyz",
        &["503", "[+]lease ok", "[-]watch-requests failed: the first list has not come in yet"],
    )?;
    says(&first, "/healthz?verbose", &["200", "[+]runtime ok", "[+]lease-loop ok", "[+]tasks ok"])?;

    let second = Operator::start(&world, "second")?;
    says(&second, "/readyz?verbose", &["200", "[+]lease ok", "readyz check passed"])?;

    world.plane.kubectl(&["delete", "rolebinding", "drover-lease", "-n", SYSTEM])?;
    let third = Operator::start(&world, "third")?;
    says(&third, "/readyz", &["503", "[-]lease failed: it has not been read yet"])?;
    says(&third, "/healthz", &["200"])
}

/// In JSON, flat, whatever is done for a request.
#[test]
fn every_line_of_a_request_names_it() -> Result<()> {
    let world = World::start()?;
    world.class("small")?;
    let mut operator = Operator::start_with(&world, "only", &["--log-format=json"])?;
    operator.wait_leads(&world)?;
    let node = Node::start(&world)?;
    world.request("hello", "", "x86_64-linux")?;
    let pod = world.pod("hello", 1)?;
    world.wait_reason("hello", "StartingBuilder")?;
    world.change("hello", r#"{"cancel": true}"#)?;
    world.wait("hello", "False")?;
    world.wait_gone(&pod)?;
    operator.end(Signal::TERM)?;
    drop(node);
    let log = operator.log();
    let lines = log.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>();
    let lines = lines.with_context(|| log.clone())?;
    let request = world.get("hello")?;
    let uid = &request["metadata"]["uid"];
    let of_process = |line: &Value| {
        let target = line["target"].as_str().unwrap_or_default();
        let parts = ["http", "process", "lease", "watches"];
        !target.starts_with("drover_operator")
            || target == "drover_operator"
            || parts.iter().any(|part| target.starts_with(&format!("drover_operator::{part}")))
            || line["message"] == "ready"
    };
    for line in &lines {
        for field in ["timestamp", "level", "target", "message"] {
            ensure!(line[field].is_string(), "no {field}: {line}");
        }
        let is_flat = line.as_object().is_some_and(|fields| fields.values().all(|one| !one.is_object()));
        ensure!(is_flat, "{line}");
        let named = line["namespace"] == TEAM && line["request"] == "hello" && line["uid"] == *uid;
        ensure!(of_process(line) || named, "whose is it? {line}");
    }
    let of_attempt = lines.iter().filter(|line| !of_process(line) && line["attempt"] == 1);
    ensure!(of_attempt.count() > 0, "{log}");
    let start = lines.first().context("an empty log")?;
    ensure!(start["message"] == "drover-operator starts" && start["version"].is_string(), "{start}");
    Ok(())
}

/// Told by its environment alone; the last spans leave as it ends.
#[test]
fn a_collector_receives_what_happened_to_a_request() -> Result<()> {
    let world = World::start()?;
    world.class("small")?;
    let collector = Collector::start(vec![])?;
    let endpoint = format!("http://{}", collector.address);
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", &*endpoint), ("OTEL_SERVICE_NAME", "drover-test")];
    let mut operator = Operator::start_in(&world, "only", &[], &environment)?;
    operator.wait_leads(&world)?;
    let node = Node::start(&world)?;
    world.request("hello", "", "x86_64-linux")?;
    let pod = world.pod("hello", 1)?;
    world.wait_reason("hello", "StartingBuilder")?;
    world.change("hello", r#"{"cancel": true}"#)?;
    world.wait("hello", "False")?;
    world.wait_gone(&pod)?;
    ensure!(operator.metric("drover_trace_spans_dropped_total")? == "0");
    operator.end(Signal::TERM)?;
    drop(node);
    let received = collector.all();
    let mut spans = Vec::new();
    for one in &received {
        spans.extend(one.spans()?);
        let resource =
            one.message()?.resource_spans.into_iter().find_map(|of| of.resource).unwrap_or_default();
        ensure!(text(&resource.attributes, "service.name") == Some("drover-test"), "{resource:?}");
        ensure!(text(&resource.attributes, "service.instance.id") == Some("only"), "{resource:?}");
    }
    let shown = tree(&spans, &[], &|span| [&*span.name, error(span).unwrap_or_default()].join(" "));
    let wanted = [
        "request Cancelled",
        "  wait ",
        "  attempt Cancelled",
        "    schedule ",
        "    session ",
        "      connect ",
    ];
    ensure!(shown.lines().eq(wanted), "{shown}");
    // As docs/tracing.md finds it.
    let uid = world.get("hello")?["metadata"]["uid"].as_str().context("a uid")?.to_owned();
    let id = run::filter(&mut std::process::Command::new("sha256sum"), uid.as_bytes())?;
    for span in &spans {
        let trace: String = span.trace_id.iter().map(|byte| format!("{byte:02x}")).collect();
        ensure!(id.starts_with(&trace) && trace.len() == 32, "{id} {trace}");
    }
    Ok(())
}

/// Waits until the page has all of that in it.
fn says(operator: &Operator, page: &str, wanted: &[&str]) -> Result<()> {
    let mut answer = String::new();
    let waited = run::wait_for(&format!("{page} to say {wanted:?}"), LIMIT, || {
        answer = operator.page(page).unwrap_or_default();
        Ok(wanted.iter().all(|words| answer.contains(words)))
    });
    waited.with_context(|| format!("{answer}\n{}", operator.log()))
}

/// The events that `kubectl describe` lists, with one space between columns.
fn described(world: &World, request: &str) -> Result<Vec<String>> {
    let text = world.plane.kubectl(&["describe", "breq", request, "-n", TEAM])?;
    let events = text.split("\nEvents:").nth(1).context(text.clone())?;
    let lines = events.lines().filter(|line| {
        let line = line.trim_start();
        line.starts_with("Normal") || line.starts_with("Warning")
    });
    Ok(lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect())
}

fn words(world: &World, request: &str) -> Result<Vec<String>> {
    let word = |line: String| line.split(' ').nth(1).unwrap_or_default().to_owned();
    Ok(described(world, request)?.into_iter().map(word).collect())
}
