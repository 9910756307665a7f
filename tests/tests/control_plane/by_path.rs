//! Requests that only name their derivation, over a cache into which real Nix has copied `.drv` files; and requests that
//! say of their derivation what is not so. Builders are a stand-in.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use drover_api::{DerivationSpec, convert};
use drover_cache::{Cache, CacheOptions};
use drover_nix::{StoreDir, StorePath};
use drover_session::resolve;
use drover_tests::{Nix, Peer};
use serde_json::Value;
use xtask::run;

use crate::play::Node;
use crate::waiting::{Makers, message};
use crate::world::{LIMIT, TEAM, World, condition};

/// A diamond with several outputs and a fixed one at its side, and a derivation by itself.
const DRVS: &str = r#"
let
  make = name: attrs: derivation ({ inherit name; system = "x86_64-linux"; builder = "/bin/sh"; } // attrs);
  source = builtins.toFile "source" "text\n";
  fetched = make "fetched" {
    outputHashMode = "recursive"; outputHashAlgo = "sha256";
    outputHash = "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=";
  };
  base = make "base" { outputs = [ "out" "dev" ]; inherit source; };
  left = make "left" { base = base.dev; };
  right = make "right" { inherit base fetched; };
in {
  inherit base fetched left right;
  top = make "top" { inherit left right; dev = base.dev; };
  late = make "late" { inherit fetched; };
}
"#;
const NAMES: [&str; 6] = ["base", "fetched", "late", "left", "right", "top"];

#[test]
fn what_is_only_named_is_read_from_the_cache() -> Result<()> {
    let makers = Makers::default();
    let world = World::start()?;
    let _node = Node::start(&world)?;
    world.class("small")?;
    let nix = Instantiated::new()?;
    a_dag_that_outlives_its_operator(&world, &makers, &nix)?;
    let operator = world.operator_with(Arc::new(makers))?;
    what_comes_later_is_waited_for(&world, &nix)?;
    lies_are_refused_and_say_why(&world, &nix)?;
    operator.stop()?;
    world.ensure_invariants()
}

/// Applied in the wrong order; the operator that has read them is replaced while the first one builds.
fn a_dag_that_outlives_its_operator(world: &World, makers: &Makers, nix: &Instantiated) -> Result<()> {
    nix.copy(world, "top")?;
    let first = world.operator_with(Arc::new(makers.clone()))?;
    for name in ["base", "top"] {
        makers.hold(name);
    }
    for name in ["top", "right", "left", "fetched", "base"] {
        named(world, name, &nix.drvs[name], "")?;
    }
    makers.starts("base")?;
    for name in ["left", "top"] {
        world.wait_reason(name, "WaitingForInput")?;
    }
    run::wait_for("left to know whom it waits for", LIMIT, || {
        Ok(message(&world.status("left")?).contains("request base builds"))
    })?;
    world.wait("fetched", "True")?;
    // Its status says what there is to wait for, before anything is built.
    let status = world.status("base")?;
    let outputs = status["derivation"]["outputs"].as_object().context("no outputs")?;
    ensure!(outputs.keys().eq(["dev", "out"]), "{status}");
    first.stop()?;

    let second = world.operator_with(Arc::new(makers.clone()))?;
    run::wait_for("the new operator to find base", LIMIT, || {
        Ok(makers.take_started().iter().any(|name| name == "team/base"))
    })?;
    makers.let_go("base");
    makers.starts("top")?;
    let row = world.plane.kubectl(&["get", "breq", "-n", TEAM, "top", "--no-headers"])?;
    ensure!(row.split_whitespace().nth(1) == Some("x86_64-linux"), "{row}");
    makers.let_go("top");
    for name in ["base", "left", "right", "top"] {
        world.wait(name, "True")?;
        let status = world.status(name)?;
        ensure!(condition(&status, "Succeeded") == Some(("True", "Built")), "{status}");
        ensure!(status["attempt"] == 1, "{name} was begun before it could be built: {status}");
        ensure!(status["drvPath"] == nix.drvs[name].as_str(), "{status}");
        for (output, path) in status["derivation"]["outputs"].as_object().context("no outputs")? {
            ensure!(status["outputs"][output]["path"] == *path, "{status}");
        }
    }
    // What real Nix says of it.
    ensure!(world.status("top")?["outputs"]["out"]["path"] == nix.outputs["top"].as_str());
    second.stop()
}

fn what_comes_later_is_waited_for(world: &World, nix: &Instantiated) -> Result<()> {
    named(world, "late", &nix.drvs["late"], "")?;
    world.wait_reason("late", "WaitingForInput")?;
    ensure!(message(&world.status("late")?).contains(&nix.drvs["late"]));
    nix.copy(world, "late")?;
    world.wait("late", "True")
}

fn lies_are_refused_and_say_why(world: &World, nix: &Instantiated) -> Result<()> {
    let trusting = |name: &str, namespace: &str| {
        world.plane.apply(&format!(
            "{{apiVersion: drover.build/v1alpha1, kind: BuilderClass, metadata: {{name: {name}}}, spec: {{systems: \
             [x86_64-linux], trust: Claimed, allowedNamespaces: {{names: [{namespace}]}}, caches: [{{url: 'file://{}', \
             push: true}}]}}}}",
            world.cache.path().display()
        ))
    };
    trusting("trusting", TEAM)?;
    trusting("elsewhere", "other")?;
    let (drv, honest) = (&nix.drvs["top"], nix.resolved(world, "top")?);
    let mut lie = honest.clone();
    lie.env.insert("name".into(), "something-else".into());
    let refused = |name: &str, reason: &str, words: &[&str]| -> Result<()> {
        world.wait(name, "False")?;
        let status = world.status(name)?;
        ensure!(status["failure"]["reason"] == reason, "{status}");
        let said = message(&status);
        ensure!(words.iter().all(|word| said.contains(word)), "{words:?} are not in: {said}");
        ensure!(status["attempts"].is_null(), "{status}");
        Ok(())
    };
    with_derivation(world, "lie", &lie, drv, "")?;
    refused("lie", "PathNotProven", &["env.name", "something-else", "top", &drv[11..]])?;
    // The same without its .drv: its own fields lead elsewhere.
    let mut stolen = honest;
    stolen.outputs.insert("out".into(), convert_output(&nix.outputs["top"]));
    stolen.args = vec!["-c".into(), "evil".into()];
    with_derivation(world, "stolen", &stolen, "", "")?;
    refused("stolen", "PathNotProven", &[&nix.outputs["top"]])?;
    // A file that does not lead to its name.
    let forged = format!("/nix/store/{}-forged.drv", "7".repeat(32));
    nix.forge(world, drv, &forged)?;
    named(world, "forged", &forged, "")?;
    refused("forged", "PathNotProven", &[&forged[11..], "belongs at"])?;
    // Whom the class believes is believed, and nobody else.
    lie.outputs.insert("out".into(), convert_output("/nix/store/00000000000000000000000000000000-top"));
    with_derivation(world, "believed", &lie, drv, "  class: trusting")?;
    world.wait("believed", "True")?;
    with_derivation(world, "stranger", &lie, drv, "  class: elsewhere")?;
    refused("stranger", "ClassNotAllowed", &["elsewhere", TEAM])
}

fn convert_output(path: &str) -> drover_api::OutputSpec {
    drover_api::OutputSpec { path: Some(path.into()), ..Default::default() }
}

fn named(world: &World, name: &str, drv: &str, more: &str) -> Result<()> {
    world.plane.apply(&format!(
        "apiVersion: drover.build/v1alpha1
kind: BuildRequest
metadata: {{name: {name}, namespace: {TEAM}}}
spec:
  drvPath: {drv}
{more}"
    ))?;
    Ok(())
}

fn with_derivation(
    world: &World,
    name: &str,
    derivation: &DerivationSpec,
    drv: &str,
    more: &str,
) -> Result<()> {
    let mut spec = serde_json::json!({ "derivation": derivation });
    if !drv.is_empty() {
        spec["drvPath"] = Value::from(drv);
    }
    let spec = serde_json::to_string(&spec["derivation"])?;
    let drv = if drv.is_empty() { String::new() } else { format!("  drvPath: {drv}\n") };
    world.plane.apply(&format!(
        "apiVersion: drover.build/v1alpha1
kind: BuildRequest
metadata: {{name: {name}, namespace: {TEAM}}}
spec:
  derivation: {spec}
{drv}{more}"
    ))?;
    Ok(())
}

/// The derivations, in a store of real Nix.
struct Instantiated {
    peer: Peer,
    store: tempfile::TempDir,
    /// Full paths of the `.drv` files and of the outputs `out`, by name.
    drvs: BTreeMap<&'static str, String>,
    outputs: BTreeMap<&'static str, String>,
}

impl Instantiated {
    fn new() -> Result<Self> {
        let store = tempfile::tempdir()?;
        let peer = Peer::new(Nix::V2_34)?;
        let root = store.path().display().to_string();
        let mut args = vec!["--store", &root, "-E", DRVS];
        args.extend(NAMES.iter().flat_map(|name| ["-A", name]));
        let said = peer.run("nix-instantiate", &args)?;
        let drvs: BTreeMap<_, _> = NAMES.into_iter().zip(said.lines().map(str::to_owned)).collect();
        ensure!(drvs.len() == NAMES.len(), "{said}");
        let mut outputs = BTreeMap::new();
        for (name, drv) in &drvs {
            let drv = drv.split('!').next().unwrap_or_default();
            let said = peer.run("nix-store", &["--store", &root, "-q", "--binding", "out", drv])?;
            outputs.insert(*name, said.trim().to_owned());
        }
        let drvs =
            drvs.into_iter().map(|(name, drv)| (name, drv.split('!').next().unwrap_or_default().to_owned()));
        Ok(Self { peer, drvs: drvs.collect(), store, outputs })
    }

    /// Copies the derivation and all below it into the class's cache.
    fn copy(&self, world: &World, name: &str) -> Result<()> {
        let (root, to) =
            (self.store.path().display().to_string(), format!("file://{}", world.cache.path().display()));
        let args = ["--extra-experimental-features", "nix-command", "copy", "--derivation", "--store", &root];
        self.peer.run("nix", &[&args[..], &["--to", &to, &self.drvs[name]]].concat()).map(drop)
    }

    /// What a request for it carries.
    fn resolved(&self, world: &World, name: &str) -> Result<DerivationSpec> {
        let dir = StoreDir::default();
        let found = resolve(&dir, &dir.parse(self.drvs[name].as_bytes())?, &[cache(world)?]);
        let found = found.map_err(|error| anyhow::anyhow!("{error:?}"))?;
        Ok(convert::from_basic(&found.derivation, &dir)?)
    }

    /// Puts the file of a derivation under another name.
    fn forge(&self, world: &World, drv: &str, forged: &str) -> Result<()> {
        let dir = StoreDir::default();
        let [drv, forged]: [StorePath; 2] = [dir.parse(drv.as_bytes())?, dir.parse(forged.as_bytes())?];
        let narinfo = |path: &StorePath| world.cache.path().join(format!("{}.narinfo", path.hash_part()));
        let text = std::fs::read_to_string(narinfo(&drv))?;
        let lines = text.lines().filter(|line| !line.starts_with("CA:") && !line.starts_with("References:"));
        let lines: Vec<&str> = lines.collect();
        let text = lines.join("\n").replace(drv.as_str(), forged.as_str());
        Ok(std::fs::write(narinfo(&forged), format!("{text}\nReferences: \n"))?)
    }
}

fn cache(world: &World) -> Result<Arc<dyn Cache>> {
    Ok(drover_cache::open(&format!("file://{}", world.cache.path().display()), &CacheOptions::default())?)
}
