//! What watches over the operators, by a real Prometheus: it reads the page, alerts fire where they must and nowhere else, and
//! alerts and dashboard ask for metrics and labels that there are.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use drover_operator::metrics::Metrics;
use drover_operator::metrics::table::{self, Spec};
use serde_json::Value;
use xtask::parts::go;
use xtask::prometheus::{Prometheus, promtool};
use xtask::{checkout, run};

use crate::world::Running;

const ALERTS: &str = "charts/drover/files/alerts.yaml";
const ALERTS_TEST: &str = "tests/fixtures/alerts.test.yaml";
const DASHBOARD: &str = "charts/drover/files/dashboard.json";
/// Labels that scraping gives to every series.
const TARGET: [&str; 2] = ["namespace", "pod"];

#[test]
fn alerts_fire_where_they_must_and_nowhere_else() -> Result<()> {
    run::stdout(
        promtool()?.args(["check", "rules", "--lint=all", "--lint-fatal"]).arg(checkout().join(ALERTS)),
    )?;
    run::stdout(promtool()?.args(["test", "rules"]).arg(checkout().join(ALERTS_TEST)))?;
    // It would notice one that is deaf, and one that cries wolf.
    for (from, to) in
        [("drover_leader) == 0", "drover_leader) == 9"), ("drover_leader) == 0", "drover_leader) < 9")]
    {
        let alerts = read(ALERTS)?;
        ensure!(alerts.contains(from));
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("alerts.yaml"), alerts.replace(from, to))?;
        let test = read(ALERTS_TEST)?.replace(&format!("../../{ALERTS}"), "alerts.yaml");
        std::fs::write(dir.path().join("test.yaml"), test)?;
        let tried = run::output(promtool()?.args(["test", "rules"]).arg(dir.path().join("test.yaml")))?;
        ensure!(!tried.status.success(), "{to:?} was not noticed");
    }

    let runbooks = read("docs/runbooks.md")?;
    let tests: Value = serde_yaml::from_str(&read(ALERTS_TEST)?)?;
    let tested = |name: &str, fires: bool| {
        let all = tests["tests"].as_array().into_iter().flatten();
        let mut all = all.filter_map(|test| test["alert_rule_test"].as_array()).flatten();
        all.any(|test| {
            test["alertname"] == name
                && test["exp_alerts"].as_array().is_some_and(|alerts| alerts.is_empty() != fires)
        })
    };
    for rule in rules()? {
        let name = rule["alert"].as_str().context("an alert has a name")?;
        ensure!(
            ["warning", "critical"].iter().any(|word| rule["labels"]["severity"] == *word),
            "{name}: severity"
        );
        for annotation in ["summary", "description"] {
            ensure!(rule["annotations"][annotation].is_string(), "{name} has no {annotation}");
        }
        let anchor = format!("docs/runbooks.md#{}", name.to_lowercase());
        ensure!(rule["annotations"]["runbook_url"] == *anchor, "{name} links elsewhere than to {anchor}");
        ensure!(
            runbooks.contains(&format!("\n## {name}\n\n**Means**: ")),
            "docs/runbooks.md has no section {name}"
        );
        ensure!(tested(name, true), "{name} is never shown to fire");
        ensure!(tested(name, false), "{name} is never shown not to fire");
        there_is_what_is_asked_for(rule["expr"].as_str().context("an expression")?)
            .with_context(|| format!("in {name}"))?;
    }
    Ok(())
}

#[test]
fn the_dashboard_asks_for_what_there_is() -> Result<()> {
    let mut asked = BTreeSet::new();
    let mut rules_of_queries = Vec::new();
    for (panel, target) in targets()? {
        let expr = target["expr"].as_str().context("a target has a query")?;
        asked
            .extend(there_is_what_is_asked_for(expr).with_context(|| format!("in panel {panel:?}: {expr}"))?);
        // As Grafana fills it in.
        let expr = expr.replace("$__rate_interval", "5m").replace("$namespace", ".*");
        ensure!(!expr.contains('$'), "{panel:?}: a variable that is not known: {expr}");
        let number = rules_of_queries.len().to_string();
        rules_of_queries.push(serde_json::json!({"record": "q", "expr": expr, "labels": {"number": number}}));
    }
    ensure!(rules_of_queries.len() > 20, "the dashboard has no queries");
    let file = tempfile::NamedTempFile::new()?;
    let groups = serde_json::json!({"groups": [{"name": "dashboard", "rules": rules_of_queries}]});
    std::fs::write(file.path(), groups.to_string())?;
    run::stdout(promtool()?.args(["check", "rules"]).arg(file.path()))?;

    for rule in rules()? {
        asked.extend(there_is_what_is_asked_for(rule["expr"].as_str().unwrap_or_default())?);
    }
    let unasked: Vec<_> =
        table::ALL.iter().map(|spec| spec.full_name()).filter(|name| !asked.contains(name)).collect();
    ensure!(unasked.is_empty(), "nobody asks for {unasked:?}");
    // A slip would be noticed.
    for wrong in [
        "sum(drover_bilds_total)",
        "sum(drover_builds)",
        "drover_builds_total{outcome=\"failed\"}",
        "drover_builds_total{result=\"lost\"}",
        "drover_api_requests_total{code=~\"6..\"}",
        "sum by (kind) (drover_builds_total)",
        "drover_leader_bucket",
    ] {
        ensure!(there_is_what_is_asked_for(wrong).is_err(), "{wrong} was not noticed");
    }
    Ok(())
}

/// Monitors select the Service, or the pods, by labels and a port that these have; and what is in files arrives whole.
#[test]
fn the_chart_points_at_its_operators() -> Result<()> {
    let values = "tests/golden/chart/monitoring.values.yaml";
    let objects = template(&["--values", &checkout().join(values).to_string_lossy()])?;
    let of = |kind: &str| {
        let wanted = |object: &&Value| object["kind"] == kind;
        objects.iter().find(wanted).with_context(|| format!("no {kind} is rendered"))
    };
    let (service, monitor, deployment) = (of("Service")?, of("ServiceMonitor")?, of("Deployment")?);
    let pod = &deployment["spec"]["template"];
    ensure!(service["metadata"]["name"] == "drover-metrics");
    ensure!(is_within(&monitor["spec"]["selector"]["matchLabels"], &service["metadata"]["labels"]));
    ensure!(is_within(&service["spec"]["selector"], &pod["metadata"]["labels"]));
    let port = &service["spec"]["ports"][0];
    ensure!(monitor["spec"]["endpoints"][0]["port"] == port["name"] && port["port"] == 9090, "{port}");
    let container_ports = pod["spec"]["containers"][0]["ports"].as_array().context("ports")?;
    ensure!(container_ports.iter().any(|one| one["name"] == port["targetPort"]), "{container_ports:?}");
    ensure!(monitor["spec"]["endpoints"][0]["interval"] == "30s");
    for object in [service, monitor, of("PrometheusRule")?] {
        ensure!(object["metadata"]["namespace"] == "drover-system", "{object}");
    }

    let groups = &of("PrometheusRule")?["spec"]["groups"];
    let rendered = groups[0]["rules"].as_array().context("rules")?;
    ensure!(
        rendered.len() == rules()?.len() - 1 && groups[1]["name"] == "ours",
        "one is left out, one group is added"
    );
    ensure!(!rendered.iter().any(|rule| rule["alert"] == "DroverQueueWaitHigh"));
    let link =
        |rule: &Value| rule["annotations"]["runbook_url"].as_str().map(str::to_owned).unwrap_or_default();
    ensure!(rendered.iter().all(|rule| link(rule).starts_with("https://runbooks.example.org/drover#drover")));
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), serde_json::json!({"groups": groups}).to_string())?;
    run::stdout(promtool()?.args(["check", "rules"]).arg(file.path()))?;

    let wanted = |object: &&Value| object["data"]["drover.json"].is_string();
    let dashboard = objects.iter().find(wanted).context("the dashboard's ConfigMap")?;
    ensure!(
        dashboard["metadata"]["namespace"] == "grafana"
            && dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    );
    let arrived: Value = serde_json::from_str(dashboard["data"]["drover.json"].as_str().unwrap_or_default())?;
    ensure!(arrived == serde_json::from_str::<Value>(&read(DASHBOARD)?)?);

    let objects = template(&["--set", "metrics.enabled=false", "--set", "metrics.podMonitor.enabled=true"])?;
    let kinds: Vec<_> = objects.iter().filter_map(|object| object["kind"].as_str()).collect();
    ensure!(!kinds.contains(&"Service") && !kinds.contains(&"ServiceMonitor"), "{kinds:?}");
    let monitor = objects.iter().find(|object| object["kind"] == "PodMonitor").context("a PodMonitor")?;
    ensure!(is_within(&monitor["spec"]["selector"]["matchLabels"], &pod["metadata"]["labels"]));
    ensure!(monitor["spec"]["podMetricsEndpoints"][0]["port"] == port["targetPort"]);
    for (wrong, word) in [
        (
            &["--set", "metrics.enabled=false", "--set", "metrics.serviceMonitor.enabled=true"][..],
            "metrics.enabled",
        ),
        (
            &["--set", "metrics.podMonitor.enabled=true", "--set", "metrics.serviceMonitor.enabled=true"],
            "twice",
        ),
    ] {
        let refused = template(wrong).err().with_context(|| format!("{wrong:?} was rendered"))?;
        ensure!(format!("{refused:#}").contains(word), "{refused:#}");
    }
    let plain = template(&[])?;
    ensure!(
        plain.iter().all(|object| object["apiVersion"] != "monitoring.coreos.com/v1"),
        "they are off by default"
    );
    Ok(())
}

/// After one build that was played, and nothing else: what the page says of it, and that Prometheus reads the same.
pub(crate) fn a_played_build_is_counted(operator: &Running) -> Result<()> {
    let page = operator.metrics.render();
    for line in [
        "drover_builds_total{result=\"succeeded\",reason=\"Built\"} 1",
        "drover_builds_total{result=\"succeeded\",reason=\"AlreadyBuilt\"} 0",
        "drover_request_duration_seconds_count{result=\"succeeded\"} 1",
        "drover_attempts_total{fault=\"none\",reason=\"Built\"} 1",
        "drover_pods_created_total 1",
        "drover_queue_wait_seconds_count 1",
        "drover_pod_start_seconds_count 1",
        "drover_requests{reason=\"Building\"} 0",
        "drover_sessions 0",
        "drover_builders_orphaned 0",
        "drover_watch_errors_total{watch=\"requests\"} 0",
    ] {
        ensure!(page.contains(&format!("\n{line}\n")), "{line} is not in\n{page}");
    }
    // The pod, and the seed at the first start.
    ensure!(number(&page, "drover_api_requests_total{verb=\"create\",code=\"201\"}")? >= 1.0, "{page}");
    ensure!(number(&page, "drover_status_writes_total")? >= 4.0, "{page}");
    ensure!(number(&page, "drover_reconcile_duration_seconds_count")? >= 4.0, "{page}");
    lint(&page)?;

    let target = serve(&operator.metrics)?;
    let prometheus = Prometheus::start(Some(target), None)?;
    run::wait_for("Prometheus to read the page", Duration::from_secs(20), || {
        let up = prometheus.query("up")?;
        if up.first().is_some_and(|up| up["value"][1] == "0") {
            let why = prometheus.get("/api/v1/targets")?["activeTargets"][0]["lastError"].take();
            ensure!(why == "", "Prometheus cannot read it: {why}");
        }
        Ok(up.first().is_some_and(|up| up["value"][1] == "1"))
    })?;
    let built = prometheus.query("drover_builds_total{reason=\"Built\"}")?;
    ensure!(built.len() == 1 && built[0]["value"][1] == "1", "{built:?}");
    let known = prometheus.get("/api/v1/targets/metadata")?;
    let known = known.as_array().context("a list")?;
    for spec in table::ALL {
        let full = spec.full_name();
        let base = full.strip_suffix("_total").or_else(|| full.strip_suffix("_info")).unwrap_or(&full);
        let found = known.iter().find(|one| one["metric"] == *base || one["metric"] == *full);
        let found = found.with_context(|| format!("Prometheus does not know {full}"))?;
        ensure!(found["type"] == spec.kind.as_str(), "{found}");
        ensure!(found["unit"] == spec.unit.as_ref().map_or("", |unit| unit.as_str()), "{found}");
        ensure!(found["help"].as_str().is_some_and(|help| help.starts_with(spec.help)), "{found}");
    }
    Ok(())
}

/// `promtool check metrics`, which knows the older format only: there a counter's whole name stands in its head.
fn lint(page: &str) -> Result<()> {
    let counter = |line: &str| {
        let (_, name, _) = head(line)?;
        let spec = table::ALL.iter().find(|spec| spec.full_name() == format!("{name}_total"))?;
        (spec.kind == table::Kind::Counter).then(|| line.replacen(name, &spec.full_name(), 1))
    };
    // A kind that the older format has not, and lines that are comments to it.
    let lines = page.lines().filter(|line| {
        !line.starts_with("# UNIT") && !line.contains("drover_build") | line.contains("drover_builds")
    });
    let older: String = lines
        .filter(|line| *line != "# EOF")
        .map(|line| counter(line).unwrap_or_else(|| line.to_owned()) + "\n")
        .collect();
    run::filter(promtool()?.args(["check", "metrics"]), older.as_bytes()).map(drop)
}

/// `# HELP NAME …` and `# TYPE NAME …`.
fn head(line: &str) -> Option<(&str, &str, &str)> {
    let (kind, rest) = line.strip_prefix("# ")?.split_once(' ')?;
    let (name, rest) = rest.split_once(' ')?;
    Some((kind, name, rest))
}

fn number(page: &str, series: &str) -> Result<f64> {
    let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    Ok(line.with_context(|| format!("no {series}"))?.parse()?)
}

/// Answers everything with the page, as long as the test's process lives.
fn serve(metrics: &Arc<Metrics>) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let (address, metrics) = (listener.local_addr()?, metrics.clone());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // What is asked for fits into one packet.
            let _ = stream.read(&mut [0; 4096]);
            let page = metrics.render();
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n\
                 Content-Length: {}\r\nConnection: close\r\n\r\n{page}",
                page.len()
            );
        }
    });
    Ok(address)
}

/// The metrics that a query names, by the table's names; fails for a metric, a label or a label's value that there is not.
fn there_is_what_is_asked_for(expr: &str) -> Result<BTreeSet<String>> {
    let (mut asked, mut labels) = (BTreeSet::new(), BTreeSet::from(TARGET));
    let mut rest = expr;
    while let Some(at) = rest.find("drover_") {
        let end = rest[at..]
            .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .map_or(rest.len(), |end| at + end);
        let (name, spec) = (&rest[at..end], spec(&rest[at..end])?);
        asked.insert(spec.full_name());
        labels.extend(spec.labels);
        if matches!(spec.kind, table::Kind::Histogram(_)) {
            labels.insert("le");
        }
        rest = &rest[end..];
        if let Some(matchers) = rest.strip_prefix('{') {
            let (matchers, behind) = matchers.split_once('}').context("a brace is not closed")?;
            matchers
                .split(',')
                .try_for_each(|matcher| check(spec, matcher.trim()).with_context(|| name.to_owned()))?;
            rest = behind;
        }
    }
    ensure!(!asked.is_empty(), "nothing of Drover's is asked for");
    for grouping in expr.split("by (").skip(1) {
        let (by, _) = grouping.split_once(')').context("a parenthesis is not closed")?;
        // `sum by (by)`: what was cut is a label and no grouping.
        for label in by.split(',').map(str::trim).filter(|label| !label.is_empty()) {
            ensure!(
                labels.contains(label) || label.contains("rate("),
                "no metric of these has a label {label:?}"
            );
        }
    }
    Ok(asked)
}

fn spec(name: &str) -> Result<&'static Spec> {
    let found = table::ALL.iter().find(|spec| {
        let full = spec.full_name();
        match spec.kind {
            table::Kind::Histogram(_) => {
                ["_bucket", "_sum", "_count"].iter().any(|end| name == format!("{full}{end}"))
            }
            _ => name == full,
        }
    });
    found.copied().with_context(|| format!("there is no metric {name}"))
}

fn check(spec: &Spec, matcher: &str) -> Result<()> {
    let at = matcher.find(['=', '!']).with_context(|| format!("{matcher:?} compares nothing"))?;
    let (label, rest) = matcher.split_at(at);
    let value = rest.trim_start_matches(['=', '!', '~']).trim_matches('"');
    if TARGET.contains(&label) {
        return Ok(());
    }
    ensure!(spec.labels.contains(&label), "it has no label {label:?}");
    let values = spec.values(label);
    for one in value.split('|') {
        let fits = |value: &&str| {
            value.len() == one.len() && value.chars().zip(one.chars()).all(|(a, b)| b == '.' || a == b)
        };
        ensure!(values.iter().any(fits), "its label {label:?} never is {one:?}");
    }
    Ok(())
}

fn rules() -> Result<Vec<Value>> {
    let mut file: Value = serde_yaml::from_str(&read(ALERTS)?)?;
    match file["groups"][0]["rules"].take() {
        Value::Array(rules) if !rules.is_empty() => Ok(rules),
        _ => bail!("{ALERTS} has no rules"),
    }
}

/// Title of the panel, and one of its targets.
fn targets() -> Result<Vec<(String, Value)>> {
    let dashboard: Value = serde_json::from_str(&read(DASHBOARD)?)?;
    let panels = dashboard["panels"].as_array().context("panels")?;
    let of = |panel: &Value| {
        let title = panel["title"].as_str().unwrap_or_default().to_owned();
        let targets = panel["targets"].as_array().cloned().unwrap_or_default();
        targets.into_iter().map(move |target| (title.clone(), target))
    };
    Ok(panels.iter().flat_map(of).collect())
}

fn template(options: &[&str]) -> Result<Vec<Value>> {
    let mut helm = Command::new(go::helm()?);
    helm.args(["template", "drover", "--namespace", "drover-system"]).arg(checkout().join("charts/drover"));
    let text = run::stdout(helm.args(options))?;
    let objects = serde_yaml::Deserializer::from_str(&text);
    objects.map(|object| Ok(serde::Deserialize::deserialize(object)?)).collect()
}

fn is_within(few: &Value, many: &Value) -> bool {
    few.as_object().is_some_and(|few| !few.is_empty() && few.iter().all(|(key, value)| many[key] == *value))
}

fn read(path: &str) -> Result<String> {
    let path: PathBuf = checkout().join(path);
    std::fs::read_to_string(&path).with_context(|| format!("could not read {}", path.display()))
}
