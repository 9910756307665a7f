//! The API server dies and comes back, or stands still; so does etcd. Builds go on meanwhile, and nothing is built twice.

use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use drover_operator::world::Stage;
use xtask::run;

use crate::ledger::{ensure_once, pods_created};
use crate::play::{Build, Builders, Node};
use crate::world::{LIMIT, World};

#[test]
fn builds_outlive_the_api_server() -> Result<()> {
    let world = World::start()?;
    world.class("small")?;
    let (builders, node) = (Builders::default(), Node::start(&world)?);
    let operator = world.operator_with(Arc::new(builders.clone()))?;

    for (outage, what) in [Outage::Killed, Outage::Stopped, Outage::NoStore].into_iter().zip(["k", "s", "e"])
    {
        // One in each state that an outage can meet: no pod yet, no node, a build that ends meanwhile or after it.
        let name = |state: &str| format!("{state}-{what}");
        for state in ["during", "after", "fails", "waits"] {
            builders.order(&name(state), Build::Until(Stage::Building));
            world.request(
                &name(state),
                if state == "waits" { "  suspend: true" } else { "" },
                "x86_64-linux",
            )?;
        }
        for state in ["during", "after", "fails"] {
            world.wait_reason(&name(state), "Building")?;
        }
        world.wait_reason(&name("waits"), "Suspended")?;
        outage.endure(&world, || {
            builders.order(&name("during"), Build::Succeeds(Duration::ZERO));
            builders.order(&name("fails"), Build::Fails);
            run::wait_for("sessions to end", LIMIT, || {
                let sessions = builders.sessions();
                Ok(!sessions.contains(&name("during")) && !sessions.contains(&name("fails")))
            })?;
            ensure!(builders.sessions().contains(&name("after")), "a build was given up for the outage");
            Ok(())
        })?;
        builders.order(&name("after"), Build::Succeeds(Duration::ZERO));
        builders.order(&name("waits"), Build::Succeeds(Duration::ZERO));
        world.change(&name("waits"), r#"{"suspend": false}"#)?;
        for state in ["during", "after", "waits"] {
            world.wait(&name(state), "True")?;
        }
        world.wait(&name("fails"), "False")?;
        let audit = world.audit()?;
        for state in ["during", "after", "fails", "waits"] {
            let (name, status) = (name(state), world.status(&name(state))?);
            ensure_once(&audit, &name)?;
            ensure!(pods_created(&audit, &name).len() == 1, "{name}: {:?}", pods_created(&audit, &name));
            ensure!(status["attempts"].as_array().is_some_and(|all| all.len() == 1), "{name}: {status:#}");
        }
    }
    world.no_pods()?;
    drop(node);
    operator.stop()?;
    world.ensure_invariants()
}

#[derive(Clone, Copy)]
enum Outage {
    /// The API server is killed: connections are refused.
    Killed,
    /// It stands still: nothing is answered, and no connection ends.
    Stopped,
    /// Etcd stands still.
    NoStore,
}

impl Outage {
    /// Lets it happen for as long as `meanwhile` takes and some seconds more, so that the operator meets it with every kind
    /// of call.
    fn endure(self, world: &World, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
        const MORE: Duration = Duration::from_secs(4);
        let during = || meanwhile().map(|()| sleep(MORE));
        match self {
            Self::Killed => {
                world.plane.kill_apiserver();
                during()?;
                world.plane.restart_apiserver()
            }
            Self::Stopped => {
                let _paused = world.plane.pause_apiserver()?;
                during()
            }
            Self::NoStore => {
                let _paused = world.plane.pause_etcd()?;
                during()
            }
        }
    }
}
