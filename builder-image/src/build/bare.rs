//! Builds whose sandbox is the pod, where namespaces are not to be had: one build for each program, in the pod's own file
//! system, under an id of its own. Nix builds so without a sandbox (Nix: derivation-builder.cc), but for what is its own
//! here: the build directory is the same as in the sandbox, the build sees nothing of the pod that it does not need
//! (Landlock), and one without a fixed output has no network, not even its own loopback.
//!
//! What the pod shows of itself stays as it is: host name, processes, `/etc`, `/dev`, `/tmp`.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use drover_store::LocalStore;

use super::Builder;
use super::confine::is_32_bit;
use super::ids::BuildIds;
use super::scratch::{BUILD_DIR, Scratch};
use super::targets::Paths;
use crate::error::Error;
use crate::sandbox::plan::{self, BareLayout, Birth, Command, Isolation, Plan};

/// Must not exist: it is the home of builds that have none (Nix: the same).
const NO_HOME: &str = "/homeless-shelter";
const SHELL: &str = "/bin/sh";
/// What builds may read of the pod beside their inputs: a shell, and how names and users are called.
const READABLE: [&str; 2] = ["/bin", "/etc"];

impl Builder {
    /// Whether builds could run in this pod's own file system. Changes nothing.
    pub(super) fn could_build_bare(&self) -> Result<(), String> {
        let (real, wanted) = (&self.store.layout().real_store_dir, self.store.store_dir().as_str());
        if real != Path::new(wanted) {
            return Err(format!(
                "the store has to be at {wanted} itself, and it is at {}. Use `--store local`",
                real.display()
            ));
        }
        if fs::symlink_metadata(NO_HOME).is_ok() {
            return Err(format!("{NO_HOME} exists, and is the home of builds that have none. Remove it"));
        }
        let moved = self.settings.extra_paths.iter().find(|extra| extra.inside != extra.outside);
        match moved {
            Some(extra) => Err(format!(
                "--sandbox-paths would have {} at another place, and builds see the pod's files where they are",
                extra.outside.display()
            )),
            None => Ok(()),
        }
    }
}

/// Makes this program's one build its own. A second one is refused, since the first could have left something behind
/// that only a new pod is without.
pub(super) fn claim(spent: &AtomicBool) -> Result<(), Error> {
    if spent.swap(true, Ordering::SeqCst) {
        let why = "this builder has made its one build: at the sandbox rung `pod` there is no second. Start another builder";
        return Err(Error::Sandbox { why: why.into() });
    }
    Ok(())
}

/// Makes what a build expects to find, and the plan of the build.
pub(super) fn plan(
    builder: &Builder,
    ids: &BuildIds,
    system: &str,
    network: bool,
    command: Command,
) -> Result<Plan, Error> {
    let store_dir = PathBuf::from(builder.store.store_dir().as_str());
    if let Some(shell) = &builder.settings.sandbox_shell
        && fs::symlink_metadata(SHELL).is_err()
    {
        std::os::unix::fs::symlink(shell, SHELL).map_err(Error::file("create", SHELL))?;
    }
    // Builds make their outputs where these belong, and may do nothing to what others own.
    std::os::unix::fs::chown(&store_dir, None, Some(ids.gid))
        .map_err(Error::file("change the group of", &store_dir))?;
    fs::set_permissions(&store_dir, Permissions::from_mode(0o1775))
        .map_err(Error::file("change the mode of", &store_dir))?;
    let shell = builder.settings.sandbox_shell.iter();
    let more = shell.chain(builder.settings.extra_paths.iter().map(|extra| &extra.outside)).cloned();
    let layout = BareLayout {
        store_dir,
        build_dir: BUILD_DIR.into(),
        readable: READABLE.into_iter().map(PathBuf::from).chain(more).collect(),
        network,
        linux32: is_32_bit(system),
        uid: ids.uid,
        gid: ids.gid,
    };
    let birth = Birth { isolation: Isolation::Uid(ids.uid), foreign_ids: true, group: None };
    Ok(Plan { birth, steps: plan::bare_steps(&layout), command })
}

/// Takes what the build made out of the store, to where outputs of other builds are as well. All of its processes are dead.
pub(super) fn take_outputs(store: &LocalStore, scratch: &Scratch, outputs: &Paths) -> Result<(), Error> {
    for path in outputs.values() {
        let from = store.real_path(path);
        match fs::rename(&from, scratch.outside(path)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.map_err(Error::file("take an output from", &from))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_build() {
        let spent = AtomicBool::new(false);
        claim(&spent).unwrap();
        let why = claim(&spent).unwrap_err();
        assert!(why.category() == "sandbox" && why.to_string().contains("Start another"), "{why}");
    }
}
