//! An operator that watches some namespaces and has rights in these alone: none over the cluster as a whole.

use anyhow::{Context as _, Result, ensure};
use drover_tests::rights::{self, Places};
use rustix::process::Signal;
use serde::Deserialize as _;
use serde_json::Value;
use tempfile::TempDir;
use xtask::permissions;

use crate::process::Operator;
use crate::rights::{has_pod, request};
use crate::world::{BUILDERS, SYSTEM, TEAM, World};

/// Another that is watched, which every cluster has.
const SECOND: &str = "default";
/// One that is not.
const ELSEWHERE: &str = "elsewhere";
/// A builder of another operator, in the same namespace as ours.
const FOREIGN: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: foreign
  namespace: drover-builders
  labels: {drover.build/request-uid: 11111111-2222-3333-4444-555555555555, drover.build/attempt: '1'}
  annotations: {drover.build/request: elsewhere/not-ours}
spec: {containers: [{name: builder, image: drover.test/none:1}]}
";

#[test]
fn rights_in_namespaces_are_enough() -> Result<()> {
    let (cache, dir) = (TempDir::new()?, TempDir::new()?);
    let caches =
        format!("class.spec.caches=[{{\"url\": \"file://{}\", \"push\": true}}]", cache.path().display());
    let watched = format!("watchNamespaces={{{TEAM},{SECOND}}}");
    let world = World::start_with(&["--set", &watched, "--set", "class.create=true", "--set-json", &caches])?;
    let list = permissions::list(&xtask::checkout())?;
    let places = Places { watched: &[TEAM, SECOND], builders: BUILDERS, own: SYSTEM };
    let granted = rights::granted(&world.chart, SYSTEM, "drover")?;
    let listed = rights::listed(&list, &places, |_| true);
    rights::ensure_same(&granted, &listed, ["granted by the chart", "in tests/permissions.yaml"])?;
    ensure!(!world.chart.contains("kind: ClusterRole"), "a right over the whole cluster");

    world.plane.kubectl(&["create", "namespace", ELSEWHERE])?;
    world.plane.apply(FOREIGN)?;
    request(&world, ELSEWHERE, "untouched", "")?;
    request(&world, TEAM, "before", "")?;
    let file = dir.path().join("class.yaml");
    std::fs::write(&file, class_file(&world.chart)? + SELECTS)?;
    let watched = format!("--watch-namespaces={TEAM},{SECOND}");
    let file = format!("--class-file={}", file.display());
    let mut operator = Operator::start_with(&world, "only", &[&watched, &file])?;

    // What was there, and what comes.
    has_pod(&world, TEAM, "before", 1)?;
    request(&world, SECOND, "after", "")?;
    has_pod(&world, SECOND, "after", 1)?;
    request(&world, SECOND, "over", "cancel: true, ttlSecondsAfterFailed: 0")?;
    world.plane.kubectl(&["wait", "breq", "over", "-n", SECOND, "--for=delete", "--timeout=60s"])?;

    // The class wants to know labels that the operator may not read.
    request(&world, TEAM, "selected", "class: selects")?;
    world.wait_reason("selected", "WaitingForClass")?;
    let said = world.status("selected")?.to_string();
    ensure!(said.contains("name this one in allowedNamespaces.names"), "{said}");

    // Deleted, it leaves nothing, and what else has no request that this operator knows stays.
    let pod = has_pod(&world, SECOND, "after", 1)?;
    world.plane.kubectl(&["delete", "breq", "-n", SECOND, "after"])?;
    world.wait_gone(&pod)?;
    world.plane.kubectl(&["get", "pod", "-n", BUILDERS, "foreign"])?;
    operator.end(Signal::TERM)?;

    let untouched = world.plane.kubectl(&["get", "breq", "-n", ELSEWHERE, "untouched", "-o", "json"])?;
    let untouched: Value = serde_json::from_str(&untouched)?;
    ensure!(untouched["status"]["conditions"].is_null(), "{untouched:#}");
    let audit = world.audit()?;
    let refused: Vec<_> = audit.iter().filter(|entry| matches!(entry.code, 401 | 403)).collect();
    ensure!(refused.is_empty(), "{refused:#?}");
    let used = rights::used(&audit);
    let beyond: Vec<_> = used.iter().filter(|one| !granted.iter().any(|grant| grant.allows(one))).collect();
    ensure!(beyond.is_empty(), "used, and not granted by the chart: {beyond:#?}");
    ensure!(used.iter().any(|one| one.namespace == SECOND && one.verb == "watch"), "{used:#?}");
    Ok(())
}

const SELECTS: &str = "
---
metadata: {name: selects}
spec: {systems: [x86_64-linux], allowedNamespaces: {selector: {matchLabels: {builds: 'yes'}}}}
";

/// What the chart mounts.
fn class_file(chart: &str) -> Result<String> {
    for document in serde_yaml::Deserializer::from_str(chart) {
        let object = Value::deserialize(document)?;
        if object["kind"] == "ConfigMap" && object["metadata"]["name"] == "drover-class" {
            return Ok(object["data"]["class.yaml"].as_str().context("an entry class.yaml")?.to_owned());
        }
    }
    anyhow::bail!("the chart has no ConfigMap drover-class")
}
