//! How a build's process comes to be: what the helper does before, at and after the clone, in order. The process itself
//! waits meanwhile. Which acts there are is pure; they reach the kernel through [`Parent`] only.

use std::io;
use std::path::PathBuf;

use rustix::process::Pid;

use super::kernel::Parent;
use super::plan::{Birth, IdMap, Isolation};
use super::refusal::refusal;

/// One act of the helper for one build.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Act {
    /// Once for all builds, when the helper starts; it is judged with each build.
    DropGroups,
    /// Nothing may run under the id that is to be this build's own.
    KillAllOf {
        uid: u32,
    },
    /// Into a control group, if there is one for it.
    Clone {
        isolation: Isolation,
        group: Option<PathBuf>,
    },
    MapUid(IdMap),
    /// With it a build could leave groups, and so gain what a group is denied; required of ordinary users.
    DenySetgroups,
    MapGid(IdMap),
}

/// What is done before the process is there; the last of it makes it.
fn before(birth: &Birth) -> Vec<Act> {
    let sweep = match birth.isolation {
        Isolation::Nested(_) | Isolation::Trial => None,
        Isolation::Uid(uid) => Some(Act::KillAllOf { uid }),
    };
    let clone = Act::Clone { isolation: birth.isolation, group: birth.group.clone() };
    sweep.into_iter().chain([clone]).collect()
}

/// What is done to it before its first step.
fn after(birth: &Birth) -> Vec<Act> {
    match birth.isolation {
        Isolation::Nested(namespaces) => {
            vec![Act::MapUid(namespaces.uid), Act::DenySetgroups, Act::MapGid(namespaces.gid)]
        }
        Isolation::Uid(_) | Isolation::Trial => Vec::new(),
    }
}

/// Clones. None in the child, which then has to wait until [`prepare`] is done with it. `groups` is how giving up
/// supplementary groups went: an ordinary user may not, and Nix tolerates that as well, but one whose builds get other
/// ids must not leave them its groups.
pub(crate) fn clone(
    birth: &Birth,
    groups: &io::Result<()>,
    parent: &mut dyn Parent,
) -> Result<Option<Pid>, String> {
    if let (true, Err(error)) = (birth.foreign_ids, groups) {
        return Err(refusal(&Act::DropGroups.act(), error, Act::DropGroups.advice()));
    }
    let mut child = None;
    for act in before(birth) {
        let result = match &act {
            Act::KillAllOf { uid } => parent.kill_all_of(*uid),
            Act::Clone { isolation, group } => {
                parent.clone(isolation, group.as_deref()).map(|pid| child = pid)
            }
            // Of the others none is done before there is a process.
            _ => Ok(()),
        };
        result.map_err(|error| refusal(&act.act(), &error, act.advice()))?;
    }
    Ok(child)
}

/// Does what `child` cannot do for itself.
pub(crate) fn prepare(birth: &Birth, child: Pid, parent: &mut dyn Parent) -> Result<(), String> {
    for act in after(birth) {
        let result = match &act {
            Act::MapUid(map) => parent.map_uid(child, *map),
            Act::DenySetgroups => parent.deny_setgroups(child),
            Act::MapGid(map) => parent.map_gid(child, *map),
            // The others were done before there was a process.
            _ => Ok(()),
        };
        result.map_err(|error| refusal(&act.act(), &error, act.advice()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::double::Recorder;
    use crate::sandbox::plan::Namespaces;

    fn nested(group: Option<&str>) -> Birth {
        let uid = IdMap { inside: 1000, outside: 30_001 };
        let gid = IdMap { inside: 100, outside: 30_000 };
        Birth {
            isolation: Isolation::Nested(Namespaces { private_network: true, admin: false, uid, gid }),
            foreign_ids: true,
            group: group.map(PathBuf::from),
        }
    }

    fn bare() -> Birth {
        Birth { isolation: Isolation::Uid(30_001), ..nested(None) }
    }

    /// What both halves say, as the helper does them.
    fn give(birth: &Birth, kernel: &mut Recorder) -> Result<(), String> {
        let child = clone(birth, &Ok(()), kernel)?.expect("the double is the parent");
        prepare(birth, child, kernel)
    }

    #[test]
    fn in_namespaces_it_is_mapped_before_it_may_go_on() {
        let mut kernel = Recorder::default();
        give(&nested(Some("/sys/fs/cgroup/b")), &mut kernel).unwrap();
        let expected = [
            "clone into namespaces, network true, admin false, and /sys/fs/cgroup/b",
            "uid_map 1000 30001",
            "deny setgroups",
            "gid_map 100 30000",
        ];
        assert_eq!(kernel.acts, expected);
    }

    #[test]
    fn in_the_pod_its_id_is_cleared_first() {
        let mut kernel = Recorder::default();
        give(&bare(), &mut kernel).unwrap();
        assert_eq!(kernel.acts, ["kill all of 30001", "clone"]);
    }

    #[test]
    fn a_trial_kills_nothing() {
        let mut kernel = Recorder::default();
        give(&Birth { isolation: Isolation::Trial, ..bare() }, &mut kernel).unwrap();
        assert_eq!(kernel.acts, ["clone"]);
    }

    #[test]
    fn each_act_that_fails_is_the_last_and_is_named() {
        for birth in [nested(Some("/g")), nested(None), bare()] {
            let acts: Vec<Act> = before(&birth).into_iter().chain(after(&birth)).collect();
            for (index, act) in acts.iter().enumerate() {
                let mut kernel = Recorder::failing_at(index);
                let why = give(&birth, &mut kernel).unwrap_err();
                let expected = refusal(&act.act(), &Recorder::error(), act.advice());
                assert_eq!(why, expected);
                assert_eq!(kernel.acts.len(), index + 1, "{:?}", kernel.acts);
            }
        }
    }

    #[test]
    fn groups_stay_only_where_the_ids_do() {
        let refused = Err(io::Error::from_raw_os_error(libc::EPERM));
        let mut kernel = Recorder::default();
        let why = clone(&nested(None), &refused, &mut kernel).unwrap_err();
        assert!(why.contains("setgroups") && why.contains("SETGID"), "{why}");
        assert!(kernel.acts.is_empty());
        let own = Birth { foreign_ids: false, ..nested(None) };
        assert!(clone(&own, &refused, &mut kernel).unwrap().is_some());
    }
}
