//! Who writes what, and how often: each writer owns its own fields, and where there is nothing new nothing is written.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drover_operator::world::Stage;
use serde_json::Value;
use xtask::audit::Entry;
use xtask::run;

use crate::ledger::{ensure_once, status_writes};
use crate::monitoring;
use crate::play::{Build, Builders, Node};
use crate::world::{BUILDERS, LIMIT, Running, TEAM, World};

/// Of status, for a build that goes well (DESIGN.md).
const MAX_WRITES: usize = 8;

#[test]
fn only_news_is_written() -> Result<()> {
    let world = World::start()?;
    world.class("small")?;
    let (builders, node) = (Builders::default(), Node::start(&world)?);
    let operator = world.operator_with(Arc::new(builders.clone()))?;
    a_build_costs_few_writes(&world, &builders)?;
    monitoring::a_played_build_is_counted(&operator)?;
    every_writer_owns_its_own(&world, &builders)?;
    a_spec_that_changes_after_the_end_is_noted_once(&world)?;
    where_nothing_is_new_nothing_is_written(&world, &operator, &builders, &node)?;
    a_request_goes_when_its_time_is_over(&world)?;
    drop(node);
    operator.stop()?;
    nothing_was_refused(&world)?;
    world.ensure_invariants()
}

/// Every stage takes its time, so that each is seen.
fn a_build_costs_few_writes(world: &World, builders: &Builders) -> Result<()> {
    builders.order("stages", Build::Succeeds(Duration::from_millis(500)));
    world.request("stages", "", "x86_64-linux")?;
    world.wait("stages", "True")?;
    let audit = world.audit()?;
    ensure_once(&audit, "stages")?;
    let writes = status_writes(&audit, "stages");
    let reasons: Vec<_> = writes.iter().map(|entry| summary(entry)).collect();
    ensure!(writes.len() <= MAX_WRITES, "{} writes: {reasons:?}", writes.len());
    for stage in ["CopyingInputs", "Building", "CollectingOutputs", "Built"] {
        ensure!(reasons.contains(&stage), "nobody could see {stage}: {reasons:?}");
    }
    for pair in writes.windows(2) {
        ensure!(pair[0].body["status"] != pair[1].body["status"], "a write without news: {:#}", pair[1].body);
    }
    Ok(())
}

fn every_writer_owns_its_own(world: &World, builders: &Builders) -> Result<()> {
    let (file, apply) =
        (tempfile::NamedTempFile::new()?, ["apply", "--server-side", "--field-manager=gitops", "-f"]);
    for (name, apply) in [("client", &["apply", "-f"][..]), ("server", &apply)] {
        std::fs::write(file.path(), REQUEST.replace("NAME", name))?;
        let apply = || world.plane.kubectl(&[apply, &[&file.path().to_string_lossy()]].concat());
        builders.order(name, Build::Until(Stage::Building));
        apply()?;
        world.wait_reason(name, "Building")?;
        // What people do while it builds.
        world.plane.kubectl(&["label", "breq", name, "-n", TEAM, "color=red"])?;
        world.plane.kubectl(&["annotate", "breq", name, "-n", TEAM, "note=hello"])?;
        world.change(name, r#"{"suspend": true, "priority": 7}"#)?;
        pods_are_the_operators(world, name)?;
        builders.order(name, Build::Succeeds(Duration::ZERO));
        world.wait(name, "True")?;

        let object = managed(world, &["breq", name, "-n", TEAM])?;
        ensure!(object["metadata"]["labels"]["color"] == "red", "{object:#}");
        ensure!(object["metadata"]["annotations"]["note"] == "hello", "{object:#}");
        ensure!(object["spec"]["suspend"] == true && object["spec"]["priority"] == 7, "{object:#}");
        let mut owners = BTreeSet::new();
        for entry in object["metadata"]["managedFields"].as_array().context("who owns what")? {
            let (manager, fields) = (entry["manager"].as_str().unwrap_or_default(), &entry["fieldsV1"]);
            let parts: Vec<&str> =
                fields.as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
            if manager.starts_with("drover-operator") {
                let kind = (&entry["operation"], &entry["subresource"]);
                ensure!(kind.0 == "Apply" && kind.1 == "status", "{entry:#}");
                ensure!(manager == "drover-operator-status" && parts == ["f:status"], "{entry:#}");
            } else {
                ensure!(!parts.contains(&"f:status"), "{manager} owns part of the status");
            }
            ensure!(
                owners.insert((manager.to_owned(), entry["subresource"].to_string())),
                "{manager} is there twice"
            );
        }
        ensure!(owners.iter().any(|(manager, _)| manager == "drover-operator-status"), "{owners:?}");

        // The same file again changes nothing, and conflicts with nobody.
        let version = world.version(name)?;
        apply()?;
        ensure!(world.version(name)? == version, "applying the same again changed something");
    }
    Ok(())
}

/// The operator makes them and writes nothing of them afterwards.
fn pods_are_the_operators(world: &World, request: &str) -> Result<()> {
    let pod = world.pod(request, 1)?;
    let object = managed(world, &["pod", &pod, "-n", BUILDERS])?;
    for entry in object["metadata"]["managedFields"].as_array().context("who owns what")? {
        let of_status = entry["subresource"] == "status";
        ensure!(entry["manager"] == if of_status { "node" } else { "drover-operator" }, "{entry:#}");
    }
    Ok(())
}

/// `kubectl wait`, kstatus and Helm take a status of an older generation for old news.
fn a_spec_that_changes_after_the_end_is_noted_once(world: &World) -> Result<()> {
    let before = world.status("stages")?;
    let writes = status_writes(&world.audit()?, "stages").len();
    world.change("stages", r#"{"ttlSecondsAfterSucceeded": 86400, "priority": 3, "suspend": true}"#)?;
    world.wait("stages", "True")?;
    run::wait_for("the new generation to be seen", LIMIT, || {
        Ok(world.status("stages")?["observedGeneration"] == 2)
    })?;
    // Nothing but the generation is another.
    let restated = before.to_string().replace("\"observedGeneration\":1", "\"observedGeneration\":2");
    let after = world.status("stages")?.to_string();
    ensure!(after == restated, "{after}\nis not\n{restated}");
    ensure!(status_writes(&world.audit()?, "stages").len() == writes + 1);
    Ok(())
}

/// Settled or waiting, touched by somebody: the operator looks, and has nothing to say.
fn where_nothing_is_new_nothing_is_written(
    world: &World,
    operator: &Running,
    builders: &Builders,
    node: &Node,
) -> Result<()> {
    builders.order("fails", Build::Fails);
    builders.order("builds", Build::Until(Stage::Building));
    builders.order("starts", Build::Until(Stage::Connecting));
    node.refuse("no-room");
    for (name, more, reason) in [
        ("fails", "  class: small", "BuildFailed"),
        ("cancelled", "  cancel: true", "Cancelled"),
        ("no-class", "  class: nobody", "WaitingForClass"),
        ("no-room", "", "WaitingForNode"),
        ("held", "  suspend: true", "Suspended"),
        ("builds", "", "Building"),
        ("starts", "", "StartingBuilder"),
    ] {
        world.request(name, more, "x86_64-linux")?;
        world.wait_reason(name, reason)?;
    }
    // Builders of what has ended are on their way out.
    run::wait_for("the pods of what has ended to go", LIMIT, || {
        let pods = world.plane.kubectl(&["get", "pods", "-n", BUILDERS, "-o", "name"])?;
        Ok(pods.lines().count() == ["no-room", "builds", "starts"].len())
    })?;
    let requests = world.plane.kubectl(&["get", "breq", "-n", TEAM, "-o", "name"])?.lines().count() as u64;
    let before = world.audit()?.len();
    for round in 0..3 {
        let looks = operator.looks()?;
        let note = format!("round={round}");
        world.plane.kubectl(&["annotate", "breq", "--all", "-n", TEAM, "--overwrite", &note])?;
        run::wait_for("the operator to look at all of them", LIMIT, || {
            Ok(operator.looks()? >= looks + requests)
        })?;
    }
    let audit = world.audit()?;
    // Whoever leads says so all the time.
    let written: Vec<_> =
        audit[before..].iter().filter(|entry| entry.is_write() && entry.resource != "leases").collect();
    ensure!(written.is_empty(), "{written:#?}");
    Ok(())
}

fn a_request_goes_when_its_time_is_over(world: &World) -> Result<()> {
    world.request("short", "  ttlSecondsAfterSucceeded: 0", "x86_64-linux")?;
    world.request(
        "failure",
        "  cancel: true\n  ttlSecondsAfterFailed: 0\n  ttlSecondsAfterSucceeded: 86400",
        "x86_64-linux",
    )?;
    world.request("other", "  cancel: true\n  ttlSecondsAfterSucceeded: 0", "x86_64-linux")?;
    for name in ["short", "failure"] {
        world.plane.kubectl(&["wait", "breq", name, "-n", TEAM, "--for=delete", "--timeout=60s"])?;
    }
    world.wait("other", "False")
}

/// What is asked for is allowed. Whether what is allowed is asked for is the matter of `rights.rs`.
fn nothing_was_refused(world: &World) -> Result<()> {
    let audit = world.audit()?;
    let refused: Vec<_> = audit.iter().filter(|entry| matches!(entry.code, 401 | 403)).collect();
    ensure!(refused.is_empty(), "{refused:#?}");
    Ok(())
}

fn managed(world: &World, what: &[&str]) -> Result<Value> {
    let args = [&["get", "-o", "json", "--show-managed-fields"], what].concat();
    Ok(serde_json::from_str(&world.plane.kubectl(&args)?)?)
}

/// Reason of the condition Succeeded in a write of status.
fn summary(entry: &Entry) -> &str {
    let conditions = entry.body["status"]["conditions"].as_array().into_iter().flatten();
    let succeeded = conditions.into_iter().find(|condition| condition["type"] == "Succeeded");
    succeeded.and_then(|condition| condition["reason"].as_str()).unwrap_or_default()
}

const REQUEST: &str = "\
apiVersion: drover.build/v1alpha1
kind: BuildRequest
metadata: {name: NAME, namespace: team, labels: {size: small}}
spec:
  derivation:
    name: NAME
    system: x86_64-linux
    builder: /bin/sh
    args: [-c, 'echo hello > $out']
    outputs: {out: {}}
";
