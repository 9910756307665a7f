//! The rights that the chart grants are those that the operator uses, and `tests/permissions.yaml` says which and what for.
//!
//! What was used is read from the API server's audit log, part by part of a scenario, and never asked of the operator.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use drover_tests::rights::{self, Grant, Places, Use};
use rustix::process::Signal;
use xtask::permissions::{self, Permission};
use xtask::run;

use crate::play::Node;
use crate::process::Operator;
use crate::world::{BUILDERS, LIMIT, OPERATOR, SYSTEM, TEAM, World};

/// A second namespace: rights over all of them are not shown to be needed by one.
const OTHER: &str = "other-team";

type Part = (&'static str, fn(&World) -> Result<()>);

/// What the list calls `used`.
const PARTS: &[Part] = &[
    ("build", build),
    ("lose", lose),
    ("collide", collide),
    ("cancel", cancel),
    ("expire", expire),
    ("select", select),
    ("sign", sign),
    ("connect", connect),
    ("repeat", repeat),
];

#[test]
fn what_is_granted_is_used_and_what_is_used_is_granted() -> Result<()> {
    let world = World::start()?;
    let list = permissions::list(&xtask::checkout())?;
    let places = Places { watched: &[], builders: BUILDERS, own: SYSTEM };
    let granted = rights::granted(&world.chart, SYSTEM, "drover")?;
    let listed = rights::listed(&list, &places, |_| true);
    rights::ensure_same(&granted, &listed, ["granted by the chart", "in tests/permissions.yaml"])?;

    world.plane.kubectl(&["create", "namespace", OTHER])?;
    class(&world, "small", "default: true, ", "")?;
    let mut operator = Operator::start(&world, "only")?;
    operator.wait_leads(&world)?;
    taken(&world, &list, &places, "start", 0)?;
    for (name, part) in PARTS {
        let before = world.audit()?.len();
        part(&world)?;
        taken(&world, &list, &places, name, before)?;
    }
    let parts: BTreeSet<&str> = PARTS.iter().map(|(name, _)| *name).chain(["start"]).collect();
    let strange = list.iter().find(|one| !parts.contains(one.used.as_str()));
    ensure!(strange.is_none(), "there is no such part: {strange:?}");
    operator.end(Signal::TERM)?;

    let audit = world.audit()?;
    let refused: Vec<_> = audit.iter().filter(|entry| matches!(entry.code, 401 | 403)).collect();
    ensure!(refused.is_empty(), "{refused:#?}");
    let used = rights::used(&audit);
    let beyond: Vec<_> = used.iter().filter(|one| !granted.iter().any(|grant| grant.allows(one))).collect();
    ensure!(beyond.is_empty(), "used, and not granted by the chart: {beyond:#?}");
    let idle = words(granted.iter().filter(|grant| !rights::is_needed(grant, &used)));
    ensure!(idle.is_empty(), "granted, and not needed so: {idle}");
    Ok(())
}

/// What depends on a value is granted with it and not without.
#[test]
fn rights_follow_the_values() -> Result<()> {
    let list = permissions::list(&xtask::checkout())?;
    let places = Places { watched: &[], builders: BUILDERS, own: SYSTEM };
    for off in list.iter().filter_map(|one| one.when.as_deref()).collect::<BTreeSet<_>>() {
        let set = format!("{off}=false");
        let chart = crate::world::template(&["--set", &set, "--set", "replicas=1"])?;
        let granted = rights::granted(&chart, SYSTEM, "drover")?;
        let listed = rights::listed(&list, &places, |value| value != off);
        rights::ensure_same(&granted, &listed, [&set, "in tests/permissions.yaml"])?;
    }
    Ok(())
}

/// Waits until each right of this part has been taken since the log had so many entries.
fn taken(world: &World, list: &[Permission], places: &Places<'_>, part: &str, since: usize) -> Result<()> {
    let mine: Vec<Permission> = list.iter().filter(|one| one.used == part).cloned().collect();
    let wanted = rights::listed(&mine, places, |_| true);
    let mut missing = String::new();
    let waited = run::wait_for(&format!("the rights of {part} to be taken"), LIMIT, || {
        let used: BTreeSet<Use> = rights::used(&world.audit()?[since..]);
        missing = words(wanted.iter().filter(|grant| !rights::is_needed(grant, &used)));
        Ok(missing.is_empty())
    });
    waited.map_err(|error| error.context(format!("{part} does not take: {missing}")))
}

fn words<'a>(grants: impl Iterator<Item = &'a Grant>) -> String {
    grants.map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn build(world: &World) -> Result<()> {
    for namespace in [TEAM, OTHER] {
        request(world, namespace, "build", "")?;
        has_pod(world, namespace, "build", 1)?;
    }
    Ok(())
}

/// Somebody takes the builder away.
fn lose(world: &World) -> Result<()> {
    for namespace in [TEAM, OTHER] {
        request(world, namespace, "lose", "class: small")?;
        let pod = has_pod(world, namespace, "lose", 1)?;
        // One that no status names would be made again.
        let named = format!("--for=jsonpath={{.status.builder.pod}}={pod}");
        world.plane.kubectl(&["wait", "breq", "lose", "-n", namespace, &named, "--timeout=60s"])?;
        world.plane.kubectl(&["delete", "pod", "-n", BUILDERS, &pod, "--grace-period=0", "--force"])?;
        has_pod(world, namespace, "lose", 2)?;
    }
    Ok(())
}

/// Something else has the name that the builder gets. What a watch that lags shows in the same way no test can order.
fn collide(world: &World) -> Result<()> {
    request(world, TEAM, "collide", "suspend: true")?;
    let uid = world.get("collide")?["metadata"]["uid"].as_str().unwrap_or_default().replace('-', "");
    let name = format!("collide-{}-1", &uid[..8]);
    world.plane.apply(&format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: {BUILDERS}}}, \
         spec: {{containers: [{{name: other, image: drover.test/none:1}}]}}}}"
    ))?;
    world.change("collide", r#"{"suspend": false}"#)?;
    run::wait_for("somebody to look what is there", LIMIT, || {
        Ok(world
            .audit()?
            .iter()
            .any(|entry| entry.act() == "get pods" && entry.name == name && entry.user == OPERATOR))
    })?;
    world.plane.kubectl(&["delete", "pod", "-n", BUILDERS, &name, "--grace-period=0", "--force"])?;
    has_pod(world, TEAM, "collide", 1).map(drop)
}

fn cancel(world: &World) -> Result<()> {
    let pod = has_pod(world, TEAM, "build", 1)?;
    world.change("build", r#"{"cancel": true}"#)?;
    world.wait_gone(&pod)
}

fn expire(world: &World) -> Result<()> {
    for namespace in [TEAM, OTHER] {
        request(world, namespace, "expire", "cancel: true, ttlSecondsAfterFailed: 0")?;
        let args = ["wait", "breq", "expire", "-n", namespace, "--for=delete", "--timeout=60s"];
        world.plane.kubectl(&args)?;
    }
    Ok(())
}

fn select(world: &World) -> Result<()> {
    class(world, "selects", "", ", allowedNamespaces: {selector: {matchLabels: {builds: 'yes'}}}")?;
    for namespace in [TEAM, OTHER] {
        world.plane.kubectl(&["label", "namespace", namespace, "builds=yes"])?;
        request(world, namespace, "select", "class: selects")?;
        has_pod(world, namespace, "select", 1)?;
    }
    Ok(())
}

/// The first test vector of RFC 8032: a class whose key is none gets no builders.
const KEY: &str = "nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2DXWpgBgrEKt9VL/tPJZAc6DuFy89qmIyWvAhpo9wdRGg==";

fn sign(world: &World) -> Result<()> {
    let key = format!("--from-literal=key=test-1:{KEY}");
    world.plane.kubectl(&["create", "secret", "generic", "signing", "-n", SYSTEM, &key])?;
    world.plane.apply(&format!(
        "{{apiVersion: drover.build/v1alpha1, kind: BuilderClass, metadata: {{name: signs}}, spec: {{systems: \
         [x86_64-linux], caches: [{{url: 'file://{}', push: true, signingKeySecretRef: {{name: signing}}}}]}}}}",
        world.cache.path().display()
    ))?;
    request(world, TEAM, "sign", "class: signs")?;
    has_pod(world, TEAM, "sign", 1).map(drop)
}

/// The same happens twice to a request: its class is not there.
fn repeat(world: &World) -> Result<()> {
    let says = |reason: &str| {
        [TEAM, OTHER].into_iter().try_for_each(|namespace| {
            let reason =
                format!("--for=jsonpath={{.status.conditions[?(@.type==\"Succeeded\")].reason}}={reason}");
            let args = ["wait", "breq", "repeat", "-n", namespace, &reason, "--timeout=60s"];
            world.plane.kubectl(&args).map(drop)
        })
    };
    for namespace in [TEAM, OTHER] {
        request(world, namespace, "repeat", "class: later, suspend: true")?;
    }
    says("WaitingForClass")?;
    class(world, "later", "", "")?;
    says("Suspended")?;
    world.plane.kubectl(&["delete", "builderclass", "later"])?;
    says("WaitingForClass")
}

/// A builder starts; there is no kubelet that would have its log, but the operator asks for it.
fn connect(world: &World) -> Result<()> {
    let node = Node::start(world)?;
    request(world, TEAM, "connect", "")?;
    run::wait_for("somebody to ask for the log", LIMIT, || {
        Ok(world.audit()?.iter().any(|entry| entry.act() == "get pods/log"))
    })?;
    drop(node);
    Ok(())
}

fn class(world: &World, name: &str, before: &str, after: &str) -> Result<()> {
    world.plane.apply(&format!(
        "{{apiVersion: drover.build/v1alpha1, kind: BuilderClass, metadata: {{name: {name}}}, spec: {{{before}systems: \
         [x86_64-linux], caches: [{{url: 'file://{}', push: true}}]{after}}}}}",
        world.cache.path().display()
    ))?;
    Ok(())
}

pub(crate) fn request(world: &World, namespace: &str, name: &str, more: &str) -> Result<()> {
    let comma = if more.is_empty() { "" } else { ", " };
    world.plane.apply(&format!(
        "{{apiVersion: drover.build/v1alpha1, kind: BuildRequest, metadata: {{name: {name}, namespace: {namespace}}}, \
         spec: {{derivation: {{name: {name}, system: x86_64-linux, builder: /bin/sh, args: [-c, 'echo > $out'], \
         outputs: {{out: {{}}}}}}{comma}{more}}}}}"
    ))?;
    Ok(())
}

/// Waits until a pod was made for this attempt; its name.
pub(crate) fn has_pod(world: &World, namespace: &str, request: &str, attempt: u32) -> Result<String> {
    let number = attempt.to_string();
    let about = format!("{namespace}/{request}");
    let mut name = String::new();
    run::wait_for(&format!("the pod of attempt {attempt} of {about}"), LIMIT, || {
        let audit = world.audit()?;
        let made = audit.iter().find(|entry| {
            let metadata = &entry.body["metadata"];
            entry.act() == "create pods"
                && entry.is_done()
                && metadata["annotations"]["drover.build/request"] == about
                && metadata["labels"]["drover.build/attempt"] == number.as_str()
        });
        name = made.and_then(|entry| entry.body["metadata"]["name"].as_str()).unwrap_or_default().to_owned();
        Ok(made.is_some())
    })?;
    Ok(name)
}
