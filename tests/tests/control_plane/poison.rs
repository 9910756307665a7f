//! Objects that cannot be read, made while the definition was another: they stand in nobody's way, and what belongs to them
//! stays until they are mended or deleted.

use std::sync::Arc;

use anyhow::{Result, ensure};
use drover_operator::world::Stage;
use serde_json::json;
use xtask::run;

use crate::play::{Build, Builders, Node};
use crate::world::{BUILDERS, LIMIT, Running, TEAM, World};

const SCHEMA: &str = "/spec/versions/0/schema/openAPIV3Schema/properties";

#[test]
fn what_cannot_be_read_stands_in_nobodys_way() -> Result<()> {
    let world = World::start()?;
    world.class("small")?;
    let (builders, node) = (Builders::default(), Node::start(&world)?);
    let operator = world.operator_with(Arc::new(builders.clone()))?;
    builders.order("breaks", Build::Until(Stage::Building));
    world.request("breaks", "", "x86_64-linux")?;
    world.wait_reason("breaks", "Building")?;
    let pod = world.pod("breaks", 1)?;

    // A spec, a status and a class that the operator's types know nothing of.
    loosen(
        &world,
        "buildrequests",
        &["spec/properties/derivation/properties/env", "status/properties/attempts"],
    )?;
    loosen(&world, "builderclasses", &["spec/properties/caches"])?;
    let spec = "    env: [1, 2]";
    run::wait_for("the loose definition", LIMIT, || {
        Ok(world.request("nonsense", spec, "x86_64-linux").is_ok())
    })?;
    let status = r#"{"status": {"attempts": "many"}}"#;
    let patch = ["patch", "breq", "breaks", "-n", TEAM, "--subresource=status", "--type=merge", "-p", status];
    run::wait_for("the loose definition", LIMIT, || Ok(world.plane.kubectl(&patch).is_ok()))?;
    let class = "{apiVersion: drover.build/v1alpha1, kind: BuilderClass, metadata: {name: odd}, spec: {systems: [x86_64-linux], \
                 caches: {some: where}}}";
    run::wait_for("the loose definition", LIMIT, || Ok(world.plane.apply(class).is_ok()))?;
    for definition in ["buildrequests", "builderclasses"] {
        let file = xtask::checkout().join(format!("crds/{definition}.yaml"));
        let apply = ["apply", "--server-side", "--force-conflicts", "-f", &file.to_string_lossy()];
        world.plane.kubectl(&apply)?;
    }

    // An operator that meets them one by one, and one that finds them when it starts.
    let others_go_on = |operator: &Running, name: &str| -> Result<()> {
        world.request(name, "", "x86_64-linux")?;
        world.wait(name, "True")?;
        run::wait_for("them to be counted", LIMIT, || {
            let page = operator.metrics.render();
            let count = |watch: &str, number: u32| {
                page.contains(&format!("drover_unreadable_objects{{watch=\"{watch}\"}} {number}\n"))
            };
            Ok(count("requests", 2) && count("classes", 1))
        })
    };
    others_go_on(&operator, "during")?;
    operator.stop()?;
    let operator = world.operator_with(Arc::new(builders))?;
    others_go_on(&operator, "after")?;
    ensure!(
        world.plane.kubectl(&["get", "pod", "-n", BUILDERS, &pod, "-o", "name"])?.contains(&pod),
        "its pod went"
    );

    // Whoever deletes them is rid of all that was theirs.
    world.plane.kubectl(&["delete", "breq", "-n", TEAM, "nonsense", "breaks", "--timeout=10s"])?;
    world.plane.kubectl(&["delete", "bclass", "odd", "--timeout=10s"])?;
    world.no_pods()?;
    run::wait_for("nothing to be left to count", LIMIT, || {
        let page = operator.metrics.render();
        Ok(["requests", "classes"]
            .iter()
            .all(|watch| page.contains(&format!("objects{{watch=\"{watch}\"}} 0\n"))))
    })?;
    drop(node);
    operator.stop()
}

/// Lets the API server take anything for these fields.
fn loosen(world: &World, definition: &str, fields: &[&str]) -> Result<()> {
    let anything = json!({"x-kubernetes-preserve-unknown-fields": true});
    let replace =
        |field: &&str| json!({"op": "replace", "path": format!("{SCHEMA}/{field}"), "value": anything});
    let patch = serde_json::to_string(&fields.iter().map(replace).collect::<Vec<_>>())?;
    let crd = format!("{definition}.drover.build");
    world.plane.kubectl(&["patch", "crd", &crd, "--type=json", "-p", &patch]).map(drop)
}
