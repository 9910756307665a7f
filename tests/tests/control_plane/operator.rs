//! The operator against a real API server, with the rights that the chart gives it and no more. There is no kubelet and
//! no scheduler: this test plays their parts where a build needs them, by writing the status of pods.

use anyhow::{Result, ensure};
use xtask::run;

use crate::world::{BUILDERS, World, condition};

/// One control plane for all: it takes seconds to start. The parts use requests of their own.
#[test]
fn requests_become_pods() -> Result<()> {
    let world = World::start()?;
    let operator = world.operator()?;
    without_a_class_a_request_waits(&world)?;
    a_pod_is_made_and_its_loss_is_an_attempt(&world)?;
    cancelling_ends_it(&world)?;
    what_cannot_be_built_is_said(&world)?;
    deleting_a_request_deletes_its_pod(&world)?;
    operator.stop()?;
    a_restart_finds_its_pods(&world)?;
    the_rights_are_in_the_builder_namespace_only(&world)?;
    nothing_was_refused_to_the_operator(&world)
}

fn without_a_class_a_request_waits(world: &World) -> Result<()> {
    world.request("first", "", "x86_64-linux")?;
    world.wait_reason("first", "WaitingForClass")?;
    world.plane.apply(&format!(
        "{{apiVersion: drover.build/v1alpha1, kind: BuilderClass, metadata: {{name: small}}, spec: {{default: true, \
         systems: [x86_64-linux], caches: [{{url: 'file://{}', push: true}}]}}}}",
        world.cache.path().display()
    ))?;
    // The class's watch wakes the request.
    world.pod("first", 1)?;
    world.delete("first")
}

fn a_pod_is_made_and_its_loss_is_an_attempt(world: &World) -> Result<()> {
    world.request("lost", "", "x86_64-linux")?;
    let pod = world.pod("lost", 1)?;
    let status = world.status("lost")?;
    ensure!(condition(&status, "Accepted") == Some(("True", "Accepted")), "{status}");
    ensure!(condition(&status, "Succeeded").is_some_and(|c| c.0 == "Unknown"), "{status}");
    ensure!(condition(&status, "Reconciling").is_some_and(|c| c.0 == "True"), "{status}");
    ensure!(status["class"] == "small" && status["attempt"] == 1, "{status}");
    ensure!(status["observedGeneration"] == 1, "{status}");

    // What the scheduler would say, and after it the kubelet.
    world.pod_status(&pod, r#"{"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes"}]}"#)?;
    world.wait_reason("lost", "WaitingForNode")?;
    world.pod_status(&pod, r#"{"phase": "Failed", "reason": "Evicted", "message": "low on memory"}"#)?;
    let second = world.pod("lost", 2)?;
    world.wait_gone(&pod)?;
    let status = world.status("lost")?;
    let first = &status["attempts"][0];
    ensure!(first["reason"] == "Evicted" && first["infrastructure"] == true, "{status}");
    ensure!(first["message"].as_str().is_some_and(|m| m.contains("low on memory")), "{status}");
    ensure!(status["attempts"].as_array().is_some_and(|all| all.len() == 2), "{status}");

    // Somebody deletes the pod, after the status has named it.
    world.wait_reason("lost", "WaitingForNode")?;
    world.plane.kubectl(&["delete", "pod", "-n", BUILDERS, &second, "--grace-period=0", "--force"])?;
    world.pod("lost", 3)?;
    world.delete("lost")
}

fn cancelling_ends_it(world: &World) -> Result<()> {
    world.request("unwanted", "", "x86_64-linux")?;
    let pod = world.pod("unwanted", 1)?;
    let patch = r#"{"spec": {"cancel": true}}"#;
    world.plane.kubectl(&["patch", "breq", "unwanted", "-n", "team", "--type=merge", "-p", patch])?;
    world.plane.kubectl(&[
        "wait",
        "breq",
        "unwanted",
        "-n",
        "team",
        "--for=condition=Succeeded=False",
        "--timeout=60s",
    ])?;
    world.wait_gone(&pod)?;
    let status = world.status("unwanted")?;
    ensure!(status["failure"]["reason"] == "Cancelled" && status["phase"] == "Failed", "{status}");
    ensure!(condition(&status, "Stalled").is_some_and(|c| c.0 == "True"), "{status}");
    // A settled request is left alone.
    let version = world.version("unwanted")?;
    world.plane.kubectl(&["annotate", "breq", "unwanted", "-n", "team", "touched=yes"])?;
    let touched = world.version("unwanted")?;
    ensure!(version != touched);
    world.request("after", "", "x86_64-linux")?;
    world.pod("after", 1)?;
    ensure!(world.version("unwanted")? == touched, "the operator wrote a request that was settled");
    world.delete("after")
}

fn what_cannot_be_built_is_said(world: &World) -> Result<()> {
    world.request("alien", "", "sparc-solaris")?;
    world.plane.kubectl(&[
        "wait",
        "breq",
        "alien",
        "-n",
        "team",
        "--for=condition=Succeeded=False",
        "--timeout=60s",
    ])?;
    let status = world.status("alien")?;
    ensure!(status["failure"]["reason"] == "WrongSystem", "{status}");
    ensure!(status["failure"]["message"].as_str().is_some_and(|m| m.contains("sparc-solaris")), "{status}");
    ensure!(status["attempts"].is_null(), "{status}");
    ensure!(world.pods("alien")?.is_empty());
    Ok(())
}

fn deleting_a_request_deletes_its_pod(world: &World) -> Result<()> {
    world.request("gone", "", "x86_64-linux")?;
    let pod = world.pod("gone", 1)?;
    // Nothing holds the request back: no finalizer.
    world.plane.kubectl(&["delete", "breq", "gone", "-n", "team", "--timeout=10s"])?;
    world.wait_gone(&pod)
}

/// A request that was made and one that went while no operator ran.
fn a_restart_finds_its_pods(world: &World) -> Result<()> {
    let operator = world.operator()?;
    world.request("stays", "", "x86_64-linux")?;
    world.request("goes", "", "x86_64-linux")?;
    let (stays, goes) = (world.pod("stays", 1)?, world.pod("goes", 1)?);
    operator.stop()?;
    world.plane.kubectl(&["delete", "breq", "goes", "-n", "team"])?;
    world.request("waits", "", "x86_64-linux")?;
    let uid = world.pod_uid(&stays)?;
    let operator = world.operator()?;
    world.pod("waits", 1)?;
    world.wait_gone(&goes)?;
    ensure!(world.pod_uid(&stays)? == uid, "the pod that ran was replaced");
    ensure!(world.status("stays")?["attempt"] == 1);
    operator.stop()
}

fn the_rights_are_in_the_builder_namespace_only(world: &World) -> Result<()> {
    let can = |verb: &str, what: &str, namespace: &str| -> Result<bool> {
        // kubectl would take what is behind a slash for a name.
        let (what, subresource) = what.split_once('/').unwrap_or((what, ""));
        let subresource = format!("--subresource={subresource}");
        let output = run::output(world.plane.kubectl_command().env("KUBECONFIG", &world.rights).args([
            "auth",
            "can-i",
            verb,
            what,
            &subresource,
            "-n",
            namespace,
        ]))?;
        Ok(output.stdout.starts_with(b"yes"))
    };
    for (verb, what, namespace, expected) in [
        ("create", "pods", BUILDERS, true),
        ("get", "pods/log", BUILDERS, true),
        ("create", "pods", "team", false),
        ("get", "pods", "team", false),
        ("create", "pods/exec", BUILDERS, false),
        ("get", "secrets", "drover-system", true),
        ("list", "secrets", "drover-system", false),
        ("get", "secrets", BUILDERS, false),
        ("get", "secrets", "team", false),
        ("patch", "buildrequests.drover.build", "team", false),
        ("patch", "buildrequests.drover.build/status", "team", true),
        ("patch", "builderclasses.drover.build", "team", false),
    ] {
        ensure!(can(verb, what, namespace)? == expected, "{verb} {what} in {namespace}");
    }
    // No Secret but the seed was made.
    let secrets =
        world.plane.kubectl(&["get", "secrets", "-A", "-o", "jsonpath={.items[*].metadata.name}"])?;
    ensure!(secrets == "drover-seed", "{secrets}");
    Ok(())
}

/// The chart gives what the operator asks for: all that it did above was allowed.
fn nothing_was_refused_to_the_operator(world: &World) -> Result<()> {
    let audit = world.audit()?;
    ensure!(audit.iter().any(|entry| entry.act() == "patch buildrequests/status" && entry.is_done()));
    let refused: Vec<_> = audit.iter().filter(|entry| matches!(entry.code, 401 | 403)).collect();
    ensure!(refused.is_empty(), "{refused:#?}");
    Ok(())
}
