//! What the pages for users say is true: their objects are taken by a real API server, their values render the chart, and
//! their commands are run, page by page. Pods do not run here: builders, node and deployments are played.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use drover_operator::world::Stage;
use drover_tests::ControlPlane;
use drover_tests::pages::shell::Shell;
use drover_tests::pages::{self, Kind, Page};
use serde_json::{Value, json};
use xtask::parts::go;
use xtask::{checkout, run};

use crate::play::{Build, Builders, Node};
use crate::world::World;

/// Pages that install Drover: they begin with a cluster that has nothing of it.
const INSTALLING: [&str; 2] = ["docs/install.md", "docs/upgrades.md"];
/// Namespaces that objects and commands of pages name.
const NAMESPACES: [&str; 2] = ["drover", "team-a"];

#[test]
fn what_pages_show_works() -> Result<()> {
    let world = World::start()?;
    for namespace in NAMESPACES {
        world.plane.kubectl(&["create", "namespace", namespace])?;
    }
    world.class("small")?;
    let builders = Builders::default();
    // Requests of pages and examples that are not built at once, by their names.
    for name in ["exit-code", "failing"] {
        builders.order(name, Build::Fails);
    }
    for name in ["slow", "slow-2"] {
        builders.order(name, Build::Until(Stage::Building));
    }
    let node = Node::start(&world)?;
    node.refuse("no-room");
    let operator = world.operator_with(Arc::new(builders))?;

    let pages = pages::of_users(&checkout())?;
    let broken: Vec<String> = std::thread::scope(|scope| {
        let tries: Vec<_> = pages.iter().map(|page| scope.spawn(|| try_page(&world, page))).collect();
        let ends = tries.into_iter().map(|one| one.join().unwrap_or_else(|_| bail!("a panic")));
        ends.filter_map(|end| end.err().map(|error| format!("{error:#}"))).collect()
    });
    ensure!(broken.is_empty(), "{}", broken.join("\n\n"));
    for entry in std::fs::read_dir(checkout().join("examples"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            world.plane.kubectl(&["apply", "--dry-run=server", "-f", &path.to_string_lossy()])?;
        }
    }
    drop(node);
    operator.stop()
}

/// In a namespace that has the page's name.
fn try_page(world: &World, page: &Page) -> Result<()> {
    let path = page.path.with_extension("").to_string_lossy().to_lowercase();
    let namespace = path.replace('/', "-");
    world.plane.kubectl(&["create", "namespace", &namespace])?;
    let shell = Shell::new()?;
    let kubeconfig = in_namespace(&world.plane, &namespace, &shell.home())?;
    dry_run(&world.plane, page, &kubeconfig)?;
    for block in page.of(Kind::Values) {
        render(&block.text).with_context(|| format!("{}:{}", page.path.display(), block.line))?;
    }
    if INSTALLING.iter().any(|path| page.path == Path::new(path)) {
        return Ok(());
    }
    shell.run(page, Kind::Shell, &kubeconfig, &[], &[])
}

/// All of a page at once; one by one only to say which is refused.
fn dry_run(plane: &ControlPlane, page: &Page, kubeconfig: &Path) -> Result<()> {
    let apply = |yaml: &str| {
        let mut kubectl = plane.kubectl_command();
        kubectl.env("KUBECONFIG", kubeconfig);
        kubectl.args(["apply", "--dry-run=server", "--validate=strict", "-f", "-"]);
        run::filter(&mut kubectl, yaml.as_bytes())
    };
    let blocks: Vec<_> = page.of(Kind::Objects).collect();
    let all: Vec<_> = blocks.iter().map(|block| block.text.as_str()).collect();
    if blocks.is_empty() || apply(&all.join("---\n")).is_ok() {
        return Ok(());
    }
    for block in blocks {
        apply(&block.text).with_context(|| format!("{}:{}", page.path.display(), block.line))?;
    }
    bail!("{}: its objects are refused together, and taken alone", page.path.display())
}

fn render(values: &str) -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), values)?;
    let mut helm = Command::new(go::helm()?);
    helm.args(["template", "drover"]).arg(checkout().join("charts/drover")).arg("--values").arg(file.path());
    run::stdout(&mut helm).map(drop)
}

/// A kubeconfig of the administrator whose context has this namespace.
fn in_namespace(plane: &ControlPlane, namespace: &str, dir: &Path) -> Result<PathBuf> {
    let path = dir.join("kubeconfig");
    std::fs::copy(plane.kubeconfig(), &path)?;
    let mut kubectl = plane.kubectl_command();
    kubectl.env("KUBECONFIG", &path).args(["config", "set-context", "--current", "--namespace", namespace]);
    run::stdout(&mut kubectl)?;
    Ok(path)
}

#[test]
fn pages_that_install_are_followed() -> Result<()> {
    // Each has a cluster of its own: a namespace that was deleted is never gone where nobody ends it.
    std::thread::scope(|scope| {
        let pages = INSTALLING.map(|path| scope.spawn(move || follow(Path::new(path))));
        pages.into_iter().try_for_each(|page| page.join().map_err(|_| anyhow::anyhow!("a panic"))?)
    })
}

fn follow(path: &Path) -> Result<()> {
    let plane = ControlPlane::start()?;
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let rollouts = scope.spawn(|| roll_out(&plane, &ended));
        let followed = Page::read(&checkout(), path).and_then(|page| {
            let shell = Shell::new()?;
            let kubeconfig = in_namespace(&plane, "default", &shell.home())?;
            shell.run(&page, Kind::Shell, &kubeconfig, &[], &[])
        });
        ended.store(true, Ordering::Relaxed);
        rollouts.join().map_err(|_| anyhow::anyhow!("a panic"))?;
        followed
    })
}

/// Says of each deployment that its pods are there, as its controller and a node would, until it is told to end.
fn roll_out(plane: &ControlPlane, ended: &AtomicBool) {
    while !ended.load(Ordering::Relaxed) {
        if let Err(error) = roll_out_once(plane) {
            eprintln!("deployments: {error:#}");
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn roll_out_once(plane: &ControlPlane) -> Result<()> {
    let list: Value = serde_json::from_str(&plane.kubectl(&["get", "deployments", "-A", "-o", "json"])?)?;
    for deployment in list["items"].as_array().into_iter().flatten() {
        let (metadata, replicas) = (&deployment["metadata"], &deployment["spec"]["replicas"]);
        if metadata["generation"] == deployment["status"]["observedGeneration"] {
            continue;
        }
        let status = json!({"status": {
            "observedGeneration": metadata["generation"], "replicas": replicas, "updatedReplicas": replicas,
            "readyReplicas": replicas, "availableReplicas": replicas,
            "conditions": [
                {"type": "Available", "status": "True", "reason": "MinimumReplicasAvailable", "message": ""},
                {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable", "message": ""},
            ],
        }});
        let [name, namespace] = ["name", "namespace"].map(|key| metadata[key].as_str().unwrap_or_default());
        let patch = status.to_string();
        plane.kubectl(&[
            "patch",
            "deployment",
            name,
            "-n",
            namespace,
            "--subresource=status",
            "--type=merge",
            "-p",
            &patch,
        ])?;
    }
    Ok(())
}
