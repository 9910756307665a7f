//! `cargo xtask demo`: the main job from nothing to a built derivation, each step as a person would type it.
//!
//! It installs Drover on a real one-node cluster, builds `examples/hello.yaml` there, and then SQLite, from derivations
//! that real Nix instantiates, with a compiler that is an input itself. The cluster stays up.

use std::process::Command;

use anyhow::{Context, Result};
use drover_tests::installation::TENANT;
use drover_tests::{Installation, sqlite};
use xtask::{checkout, run};

fn main() -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("drover-demo-").tempdir_in("/tmp")?;
    step("a one-node Kubernetes, Drover's images, its chart, and a binary cache behind nginx");
    let drover = Installation::up(scratch.path())?;
    show(drover.cluster.helm_command()?.args(["list", "-A"]), "helm list -A")?;
    kubectl(&drover, &["get", "builderclass"])?;

    step("a derivation without inputs: examples/hello.yaml");
    let example = checkout().join("examples/hello.yaml").display().to_string();
    kubectl(&drover, &["apply", "-n", TENANT, "-f", &example])?;
    kubectl(&drover, &["wait", "-n", TENANT, "--for=condition=Succeeded", "breq/hello", "--timeout=120s"])?;

    step("real software: SQLite by tcc, which is an input itself");
    let inputs = sqlite::inputs()?;
    let expression = checkout().join("tests/derivations/sqlite").display().to_string();
    let argument = |name: &str| inputs.join(name).display().to_string();
    let instantiated = drover.nix(
        "nix-instantiate",
        &[
            &expression,
            "--argstr",
            "tcc",
            &argument("tcc"),
            "--argstr",
            "libc",
            &argument("libc"),
            "--argstr",
            "sqlite",
            &argument("sqlite"),
        ],
    )?;
    println!("$ nix-instantiate tests/derivations/sqlite\n{instantiated}");
    let drvs: Vec<&str> = instantiated.lines().collect();
    println!("$ nix copy --to {} …\n", drover.cache.url());
    drover.copy_to_cache(&drvs)?;
    for name in ["-sqlite3.o.drv", "-sqlite-query.drv", "-sqlite-database.drv"] {
        let drv = drvs.iter().find(|drv| drv.ends_with(name)).context("nix-instantiate prints all three")?;
        println!("$ drover request {drv} | kubectl apply -n {TENANT} -f -");
        let store = drover.store().display().to_string();
        let yaml = run::stdout(&mut drover.drover(&["request", drv, "--store", &store])?)?;
        print!("{}", drover.apply(&yaml)?);
        kubectl(
            &drover,
            &["wait", "-n", TENANT, "--for=condition=Succeeded", "breq", "--all", "--timeout=180s"],
        )?;
    }
    kubectl(&drover, &["get", "-n", TENANT, "breq", "-o", "wide"])?;
    kubectl(
        &drover,
        &[
            "get",
            "-n",
            TENANT,
            "breq",
            "-o",
            r"jsonpath={range .items[*]}{.status.outputs.out.path}{'\t'}{.status.outputs.out.narHash}{'\n'}{end}",
        ],
    )?;
    println!("The cluster stays up: cargo xtask cluster kubectl …, and cargo xtask cluster down to end it.");
    Ok(())
}

fn step(what: &str) {
    println!("\n== {what}\n");
}

fn kubectl(drover: &Installation, args: &[&str]) -> Result<()> {
    let typed =
        args.iter().map(|arg| arg.strip_prefix(&*format!("{}/", checkout().display())).unwrap_or(arg));
    let typed = format!("kubectl {}", typed.collect::<Vec<_>>().join(" "));
    show(drover.cluster.kubectl_command()?.args(args), &typed)
}

/// Runs it and prints it with what it says.
fn show(command: &mut Command, typed: &str) -> Result<()> {
    println!("$ {typed}");
    println!("{}", run::stdout(command)?);
    Ok(())
}
