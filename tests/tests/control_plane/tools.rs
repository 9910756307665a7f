//! What people and their tools see of requests in each state: kubectl's tables, `kubectl wait`, and Helm, which waits by
//! kstatus's rules.

use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use drover_operator::world::Stage;
use xtask::parts::go;
use xtask::run;

use crate::play::{Build, Builders, Node};
use crate::world::{LIMIT, TEAM, World};

#[test]
fn people_and_their_tools_see_what_is_going_on() -> Result<()> {
    let world = World::start()?;
    let (builders, node) = (Builders::default(), Node::start(&world)?);
    helm_does_not_take_a_new_request_for_done(&world)?;
    world.class("small")?;
    let operator = world.operator_with(Arc::new(builders.clone()))?;
    in_each_state(&world, &builders, &node)?;
    tables(&world)?;
    waiting(&world, &builders)?;
    helm_waits_for_the_end(&world, &builders)?;
    drop(node);
    operator.stop()?;
    world.ensure_invariants()
}

/// Ages, times and parts of uids are left out. What the columns are made of is in `crates/api/src/request.rs`.
const TABLE: &str = "\
NAME | SYSTEM | STATUS | ATTEMPT | DURATION | AGE | POD | NODE | MESSAGE
alien | sparc-solaris | WrongSystem |  | * | * |  |  | BuilderClass small has no builders for sparc-solaris; it has x86_64-linux
building | x86_64-linux | Building | 1 |  | * | building-*-1 | node-1 |
built | x86_64-linux | Built | 1 | * | * | built-*-1 | node-1 | /nix/store/00000000000000000000000000000000-built
cancelled | x86_64-linux | Cancelled |  | * | * |  |  | spec.cancel was set
failed | x86_64-linux | BuildFailed | 1 | * | * | failed-*-1 | node-1 | the builder failed with exit code 7
held | x86_64-linux | Suspended |  |  | * |  |  | spec.suspend is true
no-class | x86_64-linux | WaitingForClass |  |  | * |  |  | there is no BuilderClass nobody
no-room | x86_64-linux | WaitingForNode | 1 |  | * | no-room-*-1 |  | 0/1 nodes are available: 1 Insufficient cpu.
second | x86_64-linux | Building | 2 |  | * | second-*-2 | node-1 |
starting | x86_64-linux | StartingBuilder | 1 |  | * | starting-*-1 | node-1 |
";

fn in_each_state(world: &World, builders: &Builders, node: &Node) -> Result<()> {
    builders.order("failed", Build::Fails);
    builders.order("building", Build::Until(Stage::Building));
    builders.order("second", Build::Until(Stage::Building));
    builders.order("starting", Build::Until(Stage::Connecting));
    node.refuse("no-room");
    let states = [
        ("alien", "", "WrongSystem"),
        ("building", "", "Building"),
        ("built", "", "Built"),
        ("cancelled", "  cancel: true", "Cancelled"),
        ("failed", "", "BuildFailed"),
        ("held", "  suspend: true", "Suspended"),
        ("no-class", "  class: nobody", "WaitingForClass"),
        ("no-room", "", "WaitingForNode"),
        ("second", "", "Building"),
        ("starting", "", "StartingBuilder"),
    ];
    for (name, more, reason) in states {
        world.request(name, more, if reason == "WrongSystem" { "sparc-solaris" } else { "x86_64-linux" })?;
    }
    for (name, _, reason) in states {
        world.wait_reason(name, reason)?;
    }
    let first = world.pod("second", 1)?;
    world.pod_status(&first, r#"{"phase": "Failed", "reason": "Evicted", "message": "low on memory"}"#)?;
    world.pod("second", 2)?;
    world.wait_reason("second", "Building")?;
    // The scheduler's own words may come after the first that are said of it.
    run::wait_for("the scheduler's words", LIMIT, || {
        Ok(world
            .plane
            .kubectl(&["get", "breq", "no-room", "-n", TEAM, "-o", "wide"])?
            .contains("Insufficient"))
    })
}

fn tables(world: &World) -> Result<()> {
    let wide = world.plane.kubectl(&["get", "breq", "-n", TEAM, "-o", "wide"])?;
    let seen = plain(&wide)?;
    ensure!(seen == TABLE, "expected:\n{TABLE}\nseen:\n{seen}");
    // Without -o wide: the first six columns, on a terminal of any width.
    let narrow = world.plane.kubectl(&["get", "breq", "-n", TEAM])?;
    ensure!(narrow.lines().all(|line| line.len() <= 80), "{narrow}");
    let first = |text: &str| -> Vec<String> {
        text.lines()
            .map(|line| line.split(" | ").take(6).collect::<Vec<_>>().join(" | ").trim_end().into())
            .collect()
    };
    ensure!(first(&plain(&narrow)?) == first(TABLE), "{narrow}");
    // The category, and the names for it.
    for kind in ["nix", "buildrequests", "buildrequest"] {
        ensure!(
            world
                .plane
                .kubectl(&["get", kind, "-n", TEAM, "-o", "name"])?
                .contains("buildrequest.drover.build/built")
        );
    }
    let described = world.plane.kubectl(&["describe", "breq", "failed", "-n", TEAM])?;
    for line in
        ["Phase:", "Reason:", "BuildFailed", "the builder failed with exit code 7", "Completion Time:"]
    {
        ensure!(described.contains(line), "no {line} in {described}");
    }
    Ok(())
}

fn waiting(world: &World, builders: &Builders) -> Result<()> {
    let wait = |name: &str, what: &str, seconds: &str| {
        world.plane.kubectl(&[
            "wait",
            "-n",
            TEAM,
            name,
            &format!("--for={what}"),
            &format!("--timeout={seconds}s"),
        ])
    };
    wait("breq/built", "condition=Succeeded", "10")?;
    wait("breq/built", "condition=Ready", "10")?;
    wait("breq/built", "jsonpath={.status.phase}=Succeeded", "10")?;
    wait("breq/failed", "jsonpath={.status.phase}=Failed", "10")?;
    wait("breq/failed", "condition=Stalled", "10")?;
    wait("breq/building", "condition=Reconciling", "10")?;
    for name in ["building", "failed", "no-class"] {
        ensure!(
            wait(&format!("breq/{name}"), "condition=Succeeded", "1").is_err(),
            "{name} has not succeeded"
        );
    }
    // Whoever changes a request that has ended, and waits again, does not wait for ever.
    world.change("built", r#"{"ttlSecondsAfterSucceeded": 86400}"#)?;
    wait("breq/built", "condition=Succeeded", "20")?;

    let background = |what: &str| -> Result<Child> {
        let mut kubectl = world.plane.kubectl_command();
        kubectl.args(["wait", "-n", TEAM, "breq/building", &format!("--for={what}"), "--timeout=60s"]);
        Ok(kubectl.stdout(Stdio::null()).spawn()?)
    };
    let (mut ready, mut gone) = (background("condition=Ready")?, background("delete")?);
    builders.order("building", Build::Succeeds(Duration::ZERO));
    ensure!(ready.wait()?.success());
    ensure!(gone.try_wait()?.is_none(), "it is there still");
    world.delete("building")?;
    ensure!(gone.wait()?.success());
    Ok(())
}

/// Nobody has looked at it: neither kstatus nor Helm may call it done.
fn helm_does_not_take_a_new_request_for_done(world: &World) -> Result<()> {
    let (code, said, _) = helm(world, &["install", "unseen"], "unseen", "5s")?;
    ensure!(code != Some(0), "Helm was content with a request that nobody had looked at");
    ensure!(said.contains("unseen") && said.contains("InProgress"), "{said}");
    world.delete("unseen")
}

fn helm_waits_for_the_end(world: &World, builders: &Builders) -> Result<()> {
    // It waits while it is built, and is content when it is.
    builders.order("good", Build::Until(Stage::Building));
    std::thread::scope(|scope| {
        let install = scope.spawn(|| helm(world, &["install", "good"], "good", "60s"));
        run::wait_for("Helm to make it", LIMIT, || Ok(world.get("good").is_ok()))?;
        world.wait_reason("good", "Building")?;
        ensure!(!install.is_finished(), "Helm did not wait");
        builders.order("good", Build::Succeeds(Duration::ZERO));
        let (code, said, _) = install.join().map_err(|_| anyhow::anyhow!("a panic"))??;
        ensure!(code == Some(0), "{said}");
        Ok(())
    })?;
    // A failure ends its wait at once, not when its time is over.
    builders.order("bad", Build::Fails);
    let (code, said, took) = helm(world, &["install", "bad"], "bad", "300s")?;
    ensure!(code != Some(0) && took < Duration::from_secs(60), "{code:?} after {took:?}: {said}");
    ensure!(said.contains("bad") && said.contains("Failed"), "{said}");
    // What may be changed after the end leaves it the end.
    let (code, said, _) = helm(world, &["upgrade", "good", "--set=ttl=86400"], "good", "30s")?;
    ensure!(code == Some(0), "{said}");
    ensure!(world.get("good")?["spec"]["ttlSecondsAfterSucceeded"] == 86400);
    ensure!(world.status("good")?["observedGeneration"] == 2);
    Ok(())
}

/// Helm with a chart that has one request of this name; it waits for what it makes. Exit code, what it said, and how long
/// it took.
fn helm(
    world: &World,
    act: &[&str],
    request: &str,
    timeout: &str,
) -> Result<(Option<i32>, String, Duration)> {
    let chart = tempfile::tempdir()?;
    std::fs::write(chart.path().join("Chart.yaml"), "{apiVersion: v2, name: builds, version: 0.1.0}\n")?;
    std::fs::write(chart.path().join("values.yaml"), "ttl: 172800\n")?;
    std::fs::create_dir(chart.path().join("templates"))?;
    std::fs::write(chart.path().join("templates/request.yaml"), REQUEST.replace("NAME", request))?;
    let mut helm = std::process::Command::new(go::helm()?);
    helm.env("KUBECONFIG", world.plane.kubeconfig()).args(act).arg(chart.path());
    // Helm keeps its own files, of which there must be none of a person's.
    helm.env("HELM_CONFIG_HOME", chart.path()).env("HELM_CACHE_HOME", chart.path());
    helm.args(["--namespace", TEAM, "--wait", "--timeout", timeout]);
    let begun = Instant::now();
    let output = run::output(&mut helm)?;
    let said = [output.stdout, output.stderr].concat();
    Ok((output.status.code(), String::from_utf8_lossy(&said).into_owned(), begun.elapsed()))
}

/// A table of kubectl's with one character between its columns, and without what differs from run to run.
fn plain(table: &str) -> Result<String> {
    let header = table.lines().next().context("a header")?;
    let is_start = |at: usize| at == 0 || (header[..at].ends_with("  ") && !header[at..].starts_with(' '));
    let starts: Vec<usize> = (0..header.len()).filter(|at| is_start(*at)).collect();
    let names: Vec<&str> =
        starts.iter().map(|at| header[*at..].split("  ").next().unwrap_or_default().trim()).collect();
    let mut text = String::new();
    for line in table.lines() {
        let cells = starts.iter().enumerate().map(|(index, start)| {
            let end = starts.get(index + 1).map_or(line.len(), |end| (*end).min(line.len()));
            let cell = line.get(*start..end).unwrap_or_default().trim();
            match names[index] {
                _ if cell == names[index] || cell.is_empty() => cell.to_owned(),
                "AGE" | "DURATION" => "*".to_owned(),
                // NAME-UID-ATTEMPT
                "POD" => {
                    let mut parts = cell.rsplitn(3, '-');
                    let (attempt, name) =
                        (parts.next().unwrap_or_default(), parts.nth(1).unwrap_or_default());
                    format!("{name}-*-{attempt}")
                }
                _ => cell.to_owned(),
            }
        });
        text.push_str(cells.collect::<Vec<_>>().join(" | ").trim_end());
        text.push('\n');
    }
    Ok(text)
}

const REQUEST: &str = "\
apiVersion: drover.build/v1alpha1
kind: BuildRequest
metadata: {name: NAME, namespace: team}
spec:
  ttlSecondsAfterSucceeded: {{ .Values.ttl }}
  derivation:
    name: NAME
    system: x86_64-linux
    builder: /bin/sh
    args: [-c, 'echo hello > $out']
    outputs: {out: {}}
";
