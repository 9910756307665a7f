//! A request that is deleted is gone at once, whatever it was doing, and nothing stays of it: no pod, no session.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use drover_operator::world::Stage;
use xtask::run;

use crate::ledger::pods_created;
use crate::play::{Build, Builders, Node};
use crate::world::{BUILDERS, LIMIT, TEAM, World};

#[test]
fn deletion_in_every_phase_leaves_nothing() -> Result<()> {
    let world = World::start()?;
    world.class("small")?;
    let (builders, node) = (Builders::default(), Node::start(&world)?);
    let operator = world.operator_with(Arc::new(builders.clone()))?;

    for (name, build) in [
        ("connects", Build::Until(Stage::Connecting)),
        ("copies", Build::Until(Stage::CopyingInputs)),
        ("builds", Build::Until(Stage::Building)),
        ("collects", Build::Until(Stage::Collecting)),
        ("retries", Build::Until(Stage::Building)),
        ("fails", Build::Fails),
    ] {
        builders.order(name, build);
    }
    node.refuse("no-room");
    let phases = [
        ("no-class", "  class: nobody", "WaitingForClass"),
        ("held", "  suspend: true", "Suspended"),
        ("no-room", "", "WaitingForNode"),
        ("connects", "", "StartingBuilder"),
        ("copies", "", "CopyingInputs"),
        ("builds", "", "Building"),
        ("collects", "", "CollectingOutputs"),
        ("retries", "", "Building"),
        ("built", "", "Built"),
        ("fails", "", "BuildFailed"),
        ("cancelled", "  cancel: true", "Cancelled"),
    ];
    for (name, more, _) in phases {
        world.request(name, more, "x86_64-linux")?;
    }
    for (name, _, reason) in phases {
        world.wait_reason(name, reason)?;
    }
    in_backoff(&world, "retries")?;

    let mut names: Vec<&str> = phases.iter().map(|(name, ..)| *name).collect();
    // One that the operator has perhaps not even seen.
    world.request("unseen", "", "x86_64-linux")?;
    names.push("unseen");
    let finalizers = ["get", "breq", "-n", TEAM, "-o", "jsonpath={.items[*].metadata.finalizers}"];
    ensure!(world.plane.kubectl(&finalizers)?.is_empty(), "a finalizer would hold them back");
    world.plane.kubectl(&[&["delete", "breq", "-n", TEAM, "--timeout=10s"], &names[..]].concat())?;
    world.no_pods()?;
    run::wait_for("sessions to end", LIMIT, || Ok(builders.sessions().is_empty()))?;

    // Whatever was on its way when they went: nothing is made for them any more, nor written of them.
    let deleted = world.plane.audit()?.iter().rposition(|entry| entry.act() == "delete buildrequests");
    world.request("last", "", "x86_64-linux")?;
    world.wait("last", "True")?;
    world.no_pods()?;
    let audit = world.plane.audit()?.split_off(deleted.context("they were deleted")?);
    for name in names {
        let made = pods_created(&audit, name);
        ensure!(made.is_empty() || name == "unseen", "{name}: {made:?} was made for a request that was gone");
    }
    drop(node);
    operator.stop()?;
    world.ensure_invariants()
}

/// Has the request lose its pod until it waits for seconds before the next attempt.
fn in_backoff(world: &World, request: &str) -> Result<()> {
    let evicted = r#"{"phase": "Failed", "reason": "Evicted", "message": "low on memory"}"#;
    for attempt in 1..=3 {
        let pod = world.pod(request, attempt)?;
        run::wait_for("a pod that runs", LIMIT, || {
            let args = ["get", "pod", &pod, "-n", BUILDERS, "-o", "jsonpath={.status.phase}"];
            Ok(world.plane.kubectl(&args)? == "Running")
        })?;
        world.pod_status(&pod, evicted)?;
    }
    run::wait_for("the third attempt to end", Duration::from_secs(20), || {
        let status = world.status(request)?;
        let attempts = status["attempts"].as_array().context("it has attempts")?;
        Ok(attempts.len() == 3 && attempts.iter().all(|attempt| !attempt["endTime"].is_null()))
    })
}
