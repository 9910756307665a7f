//! Which network a build gets, and its start with that: what has the network waits, with no instruction of its builder run,
//! until its namespace is connected. How a namespace is connected is [`crate::network`]'s.

use std::io;
use std::path::Path;

use drover_nix::derivation::DerivationType;

use super::Builder;
use super::ids::BuildIds;
use crate::error::Error;
use crate::network::{Choice, Connection, Network};
use crate::sandbox::launch::{self, Running};
use crate::sandbox::plan::{
    Birth, Command, INSIDE_GID, INSIDE_UID, IdMap, Isolation, Namespaces, Plan, Step,
};
use crate::sandbox::rungs::{Ids, Rung};

impl Builder {
    /// What builds that may fetch get. Found once, with the first of them or before it.
    pub(crate) fn network(&self) -> Result<Network, Error> {
        let rung = self.rung()?;
        let choice = self.settings.network;
        if rung == Rung::Pod && choice == Choice::Auto {
            return Ok(Network::Host(Some("the pod is the sandbox, and its network the build's".into())));
        }
        let network = self.network.get(choice, &|program| self.try_connecting(rung, program));
        network
            .map_err(|why| Error::Sandbox { why: format!("builds cannot have the network by pasta: {why}") })
    }

    /// What a build of this kind gets.
    pub(super) fn network_of(&self, kind: DerivationType) -> Result<Network, Error> {
        if kind.is_sandboxed() { Ok(Network::None) } else { self.network() }
    }

    /// Connects a sandbox that does nothing.
    fn try_connecting(&self, rung: Rung, program: &Path) -> Result<(), String> {
        let (uid, gid) = match self.settings.ids {
            Ids::Own { uid, gid } => (uid, gid),
            Ids::Pool { first_uid, gid, .. } => (first_uid, gid),
        };
        let isolation = Isolation::Nested(Namespaces {
            private_network: true,
            admin: rung == Rung::NestedAdmin,
            uid: IdMap { inside: INSIDE_UID, outside: uid },
            gid: IdMap { inside: INSIDE_GID, outside: gid },
        });
        let foreign_ids = matches!(self.settings.ids, Ids::Pool { .. });
        let birth = Birth { isolation, foreign_ids, group: None };
        let plan = Plan { birth, steps: vec![Step::Session, Step::Exit], command: Command::default() };
        let dir = self.store.layout().state_dir.join(format!("drover-pasta-{}", std::process::id()));
        let _left_by_a_dead_process = drover_store::fs::delete(&dir);
        let made = std::fs::create_dir_all(&self.store.layout().state_dir);
        let started = made.and_then(|()| private_dir(&dir)).and_then(|()| {
            launch::start_attended(&plan, None, &mut |pid| Connection::new(program, pid, &dir).map(drop))
        });
        let _left = std::fs::remove_dir(&dir);
        started.map(drop).map_err(|error| error.to_string())
    }
}

/// Starts a sandbox. What connects it comes with it, and has to live as long as it runs.
pub(super) fn start(
    plan: &Plan,
    ids: &BuildIds,
    network: &Network,
    dir: &Path,
) -> Result<(Running, Option<Connection>), Error> {
    let mut connection = None;
    let started = match network {
        Network::Pasta(program) => launch::start_attended(plan, ids.foreign(), &mut |pid| {
            connection = Some(Connection::new(program, pid, dir)?);
            Ok(())
        }),
        Network::Host(_) | Network::None => launch::start(plan, ids.foreign()),
    };
    let running = started.map_err(Error::system("start the sandbox"))?;
    Ok((running, connection))
}

fn private_dir(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().mode(0o700).create(dir)
}
