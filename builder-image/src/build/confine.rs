//! Which sandbox a build gets: the rung of the ladder that this program stands on, and what follows from it for the plan of
//! a build. What a rung is made of is `crate::sandbox`'s.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use drover_nix::StorePath;

use super::attempt::Attempt;
use super::ids::BuildIds;
use super::scratch::{BUILD_DIR, Scratch};
use super::targets::Paths;
use super::{Builder, bare};
use crate::error::Error;
use crate::network::Network;
use crate::sandbox::group::Group;
use crate::sandbox::plan::{
    self, Birth, Command, INSIDE_GID, INSIDE_UID, IdMap, Isolation, Layout, Namespaces, Plan,
};
use crate::sandbox::rungs::{self, Rung};

/// The rung that was found, or why none was. Found once, with the first build or before it.
#[derive(Clone, Default)]
pub(super) struct Ladder {
    found: Arc<OnceLock<Result<Rung, String>>>,
    /// The one build of [`Rung::Pod`] has begun.
    pub(super) spent: Arc<AtomicBool>,
}

/// Where and as whom one build runs.
pub(super) struct Site<'a> {
    pub rung: Rung,
    pub network: &'a Network,
    pub scratch: &'a Scratch,
    pub ids: &'a BuildIds,
    pub group: Option<&'a Group>,
}

impl Builder {
    /// The rung that builds stand on: the strongest that works here, if that is allowed.
    pub(crate) fn rung(&self) -> Result<Rung, Error> {
        let find = || {
            let settings = &self.settings;
            rungs::find(settings.sandbox, settings.ids, &|| self.could_build_bare())
        };
        self.ladder.found.get_or_init(find).clone().map_err(|why| Error::Sandbox { why })
    }
}

impl Attempt<'_> {
    /// The directories that a build has at this rung.
    pub(super) fn scratch(
        &self,
        rung: Rung,
        ids: &BuildIds,
        outputs: &Paths,
        valid: &BTreeSet<StorePath>,
    ) -> Result<Scratch, Error> {
        if rung != Rung::Nested {
            self.log.note(&format!("the sandbox is `{rung}`, not `{}`", Rung::Nested));
        }
        let mut place = None;
        if rung == Rung::Pod {
            if !valid.is_empty() {
                let why = "some of its outputs are in this store already, and at the sandbox rung `pod` a build makes all of \
                           them or none. Start a builder without them";
                return Err(Error::Sandbox { why: why.into() });
            }
            bare::claim(&self.builder.ladder.spent)?;
            // Left behind by a build that nobody finished.
            for path in outputs.values() {
                drover_store::fs::delete(&self.builder.store.real_path(path))?;
            }
            place = Some(BUILD_DIR.into());
        }
        Scratch::create(self.builder.store.layout(), self.drv_path, ids, place)
    }

    /// How the build is made: with `visible` of its store, and `command` at its end.
    pub(super) fn plan(
        &self,
        site: &Site<'_>,
        visible: &BTreeSet<&StorePath>,
        command: Command,
    ) -> Result<Plan, Error> {
        let mut plan = if site.rung == Rung::Pod {
            let (system, network) = (self.drv.system.to_string(), *site.network != Network::None);
            bare::plan(self.builder, site.ids, &system, network, command)?
        } else {
            nested(site.rung, &self.layout(site, visible)?, site.ids, command)
        };
        plan.birth.group = site.group.map(|group| group.dir().to_owned());
        Ok(plan)
    }
}

/// The plan of a build in namespaces.
fn nested(rung: Rung, layout: &Layout, ids: &BuildIds, command: Command) -> Plan {
    let namespaces = Namespaces {
        private_network: layout.private_network,
        admin: rung == Rung::NestedAdmin,
        uid: IdMap { inside: INSIDE_UID, outside: ids.uid },
        gid: IdMap { inside: INSIDE_GID, outside: ids.gid },
    };
    let isolation = Isolation::Nested(namespaces);
    let birth = Birth { isolation, foreign_ids: ids.foreign().is_some(), group: None };
    Plan { birth, steps: plan::build_steps(layout), command }
}

/// Whether builds for `system` run under the 32-bit personality of this machine (Nix: personality.cc).
pub(super) fn is_32_bit(system: &str) -> bool {
    match std::env::consts::ARCH {
        "x86_64" => system == "i686-linux",
        "aarch64" => matches!(system, "armv7l-linux" | "armv6l-linux" | "armv5tel-linux"),
        _ => false,
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn which_systems_have_32_bits() {
        assert!(is_32_bit("i686-linux"));
        assert!(!is_32_bit("x86_64-linux") && !is_32_bit("x86_64-v3-linux") && !is_32_bit("builtin"));
    }
}
