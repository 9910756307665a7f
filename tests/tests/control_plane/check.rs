//! `drover-operator check` with the rights that the chart gives it: what `helm test` runs, on a control plane where the operator
//! is this process and builders are played.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use anyhow::{Result, ensure};
use drover_tests::{ControlPlane, program};
use xtask::parts::go;
use xtask::run;

use crate::play::{Builders, Node};
use crate::world::{SYSTEM, World};

#[test]
fn a_check_says_whether_something_is_built() -> Result<()> {
    let world = World::start()?;
    let mut helm = Command::new(go::helm()?);
    helm.args(["template", "drover", "--namespace", SYSTEM, "--show-only", "templates/tests/build.yaml"]);
    world.plane.apply(&run::stdout(helm.arg(xtask::checkout().join(xtask::chart::CHART)))?)?;
    let user = format!("system:serviceaccount:{SYSTEM}:drover-check");
    let rights = world.plane.kubeconfig_for(&user, &["system:serviceaccounts", "system:authenticated"])?;
    world.class("small")?;

    // Nobody builds: it gives up, says so, and leaves nothing.
    let build = ["build", "--namespace", SYSTEM];
    let out = check(&rights, &[&build[..], &["--timeout-seconds=1"]].concat())?;
    ensure!(!out.status.success() && said(&out).contains("not built within 1 s"), "{}", said(&out));
    let left = || world.plane.kubectl(&["get", "breq", "-n", SYSTEM, "-o", "name"]);
    ensure!(left()?.is_empty(), "{}", left()?);

    let _node = Node::start(&world)?;
    let operator = world.operator_with(Arc::new(Builders::default()))?;
    let out = check(&rights, &build)?;
    ensure!(out.status.success() && said(&out).contains("Built"), "{}", said(&out));
    let out = check(&rights, &[&build[..], &["--system=riscv64-linux"]].concat())?;
    ensure!(!out.status.success() && said(&out).contains("WrongSystem"), "{}", said(&out));
    let out = check(&rights, &[&build[..], &["--class=other", "--timeout-seconds=3"]].concat())?;
    ensure!(!out.status.success() && said(&out).contains("other"), "{}", said(&out));
    ensure!(left()?.is_empty(), "{}", left()?);
    // It may do this and no more.
    let out = check(&rights, &["build", "--namespace=default"])?;
    ensure!(!out.status.success() && said(&out).contains("forbidden"), "{}", said(&out));
    operator.stop()
}

#[test]
fn a_check_waits_for_the_definitions() -> Result<()> {
    let plane = ControlPlane::start()?;
    let config = plane.kubeconfig();
    let out = check(&config, &["definitions", "--timeout-seconds=1"])?;
    ensure!(!out.status.success() && said(&out).contains("are the definitions installed"), "{}", said(&out));
    let crds = xtask::checkout().join("crds");
    let file = |name: &str| crds.join(name).to_string_lossy().into_owned();
    plane.kubectl(&["apply", "--server-side", "-f", &file("buildrequests.yaml")])?;
    let out = check(&config, &["definitions", "--timeout-seconds=3"])?;
    ensure!(!out.status.success() && said(&out).contains("no builderclasses"), "{}", said(&out));
    let waiting = std::thread::spawn(move || check(&config, &["definitions"]));
    plane.kubectl(&["apply", "--server-side", "-f", &file("builderclasses.yaml")])?;
    let out = waiting.join().map_err(|_| anyhow::anyhow!("the check panicked"))??;
    ensure!(out.status.success(), "{}", said(&out));
    // As soon as it says so, objects can be made.
    plane.apply(
        "{apiVersion: drover.build/v1alpha1, kind: BuilderClass, metadata: {name: a}, spec: {systems: [x86_64-linux]}}",
    )?;
    Ok(())
}

fn check(kubeconfig: &Path, args: &[&str]) -> Result<Output> {
    let mut check = Command::new(program("drover-operator")?);
    run::output(check.arg("check").args(args).env("KUBECONFIG", kubeconfig))
}

fn said(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}
