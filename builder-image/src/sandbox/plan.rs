//! What is done, in which order, between the clone of a build's process and its first instruction. Pure: it builds a
//! list and touches nothing. The order is Nix's (Nix: linux-derivation-builder.cc, enterChroot; derivation-builder.cc,
//! runChild); every step that gives up a right stands behind the last one that needs it.

use std::ffi::CString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::builtin::Job;

/// Ids that a build sees itself as (Nix: sandbox uid and gid with user namespaces).
pub(crate) const INSIDE_UID: u32 = 1000;
pub(crate) const INSIDE_GID: u32 = 100;

/// One act of the process that becomes the builder.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Step {
    /// Default signals, a session without a terminal, standard input from nowhere, standard error joined to output.
    Session,
    /// Dies when its parent does. Armed again after [`Step::Ids`], which disarms it.
    DieWithParent,
    /// Makes it the kernel's choice, before the server, when memory runs out.
    OomFirst,
    /// Brings up `lo` in the build's own network namespace.
    Loopback,
    HostNames {
        host: String,
        domain: String,
    },
    /// No mount made from here on is seen outside, and none made outside is seen here.
    PrivateMounts,
    /// Makes `target` a mount of `source`, with all that is mounted below it.
    Bind {
        source: PathBuf,
        target: PathBuf,
    },
    /// Makes the mount at `target` read-only, and none below it.
    ReadOnly {
        target: PathBuf,
    },
    /// Makes everything mounted at and below `target` read-only, then `target` itself writable again.
    ReadOnlyBelow {
        target: PathBuf,
    },
    MountProc {
        target: PathBuf,
    },
    /// Terminals of the build's own (where the kernel can); behind [`Step::PivotRoot`].
    PrivateTerminals,
    MountShm {
        target: PathBuf,
    },
    /// Makes `root` the root directory and takes the old one away.
    PivotRoot {
        root: PathBuf,
    },
    /// Makes `root` the root directory where pivot_root is refused: moves it over the old one, which stays mounted below,
    /// locked for whoever is in another user namespace. The machine's /sys is covered first, so that its being there gives
    /// nobody the right to a fresh one.
    MoveRoot {
        root: PathBuf,
    },
    NoNewPrivileges,
    /// Forbids set-user-ID files, extended attributes and access control lists; where no namespace keeps the network away,
    /// sockets of the network as well.
    FilterSyscalls {
        network: bool,
    },
    /// Keeps the build from abstract sockets outside (Landlock, where the kernel has it).
    ScopeSockets,
    /// Leaves it no files but those at and below these (Landlock, where the kernel has it), for a build without a root
    /// directory of its own. Who may do what with them, owners and modes still say.
    ConfineFiles {
        writable: Vec<PathBuf>,
        readable: Vec<PathBuf>,
    },
    /// A 32-bit personality if asked for; never randomised addresses.
    Personality {
        linux32: bool,
    },
    ChangeDir {
        path: PathBuf,
    },
    /// No descriptor but the standard three survives the exec.
    CloseDescriptors,
    /// No core dumps by default, and the file mode mask 0022.
    LimitsAndUmask,
    /// The control group that it is in becomes the root of those that it sees.
    CgroupNamespace,
    Ids {
        uid: u32,
        gid: u32,
    },
    /// Executes the builder, or becomes the built-in one.
    Exec,
    /// Instead of [`Step::Exec`]: the steps before it worked, and that was the question.
    Exit,
}

/// A host id that one id inside stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct IdMap {
    pub inside: u32,
    pub outside: u32,
}

/// Everything that a sandbox is made by.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Plan {
    pub birth: Birth,
    pub steps: Vec<Step>,
    pub command: Command,
}

/// What has to be known when the build's process is cloned, by the process that clones it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Birth {
    pub isolation: Isolation,
    /// The ids are not the caller's own: groups of the caller's must be gone, not only as far as that is allowed.
    pub foreign_ids: bool,
    /// The control group that it enters before its first step.
    pub group: Option<PathBuf>,
}

/// What keeps one build's processes together, so that all of them can be killed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) enum Isolation {
    /// Namespaces: killing the first process kills all.
    Nested(Namespaces),
    /// The id that nothing else runs under: everything of that id is killed, before and after.
    Uid(u32),
    /// Nothing: for a trial, which starts no other process.
    Trial,
}

/// User, process, mount, host name and IPC namespaces are always a build's own.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Namespaces {
    /// A network namespace of its own, too.
    pub private_network: bool,
    /// Uses the caller's SYS_ADMIN, if it has that. Without it the namespaces are such as anyone may make.
    pub admin: bool,
    pub uid: IdMap,
    pub gid: IdMap,
}

/// What runs in the sandbox once it is complete.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Command {
    Program(Program),
    /// Part of this program: the process goes on instead of executing another.
    Builtin(Job),
}

impl Default for Command {
    /// Nothing that could be executed.
    fn default() -> Self {
        Self::Program(Program::default())
    }
}

/// What is executed. The program is the first of `argv`'s neighbours, not its first member: Nix gives the builder its
/// base name as `argv[0]`.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub(crate) struct Program {
    pub program: CString,
    pub argv: Vec<CString>,
    /// `NAME=value` each.
    pub env: Vec<CString>,
}

/// What a build's steps depend on.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// The tree that becomes the root directory, read-only, with all mount points but those of inputs.
    pub root: PathBuf,
    /// The directory outside that becomes `store_dir`, with the mount points of inputs.
    pub store: PathBuf,
    /// The store directory as the build sees it, absolute.
    pub store_dir: PathBuf,
    /// Source outside, target inside. Inputs below `store_dir` end up read-only.
    pub binds: Vec<(PathBuf, PathBuf)>,
    /// The build directory as the build sees it.
    pub build_dir: PathBuf,
    pub private_network: bool,
    pub linux32: bool,
    /// `/dev/shm` exists outside, so that it should inside.
    pub shm: bool,
    /// It has a control group of its own.
    pub cgroup: bool,
    /// pivot_root may be refused: container runtimes' filters do so even to who has SYS_ADMIN.
    pub move_root: bool,
}

/// What the steps of a build depend on that has no file system of its own.
#[derive(Clone, Debug)]
pub(crate) struct BareLayout {
    pub store_dir: PathBuf,
    pub build_dir: PathBuf,
    /// What else it may read: programs and configuration that every build expects.
    pub readable: Vec<PathBuf>,
    /// It may use the pod's network.
    pub network: bool,
    pub linux32: bool,
    pub uid: u32,
    pub gid: u32,
}

/// Where files of the machine are shown to a build: its shell, its name servers, its certificates.
const MACHINE_FILES: [&str; 2] = ["/bin", "/etc"];

/// The steps of a build in namespaces.
///
/// Where this differs from Nix: the root is made ready and read-only once for all builds, so that the tree of `/dev` and
/// the mode of `/etc` are no steps; inputs are mounted read-only, where Nix trusts their owner and modes alone; nothing is
/// mounted into a build that runs (which Nix does for recursive builds), so that the store's mount is not shared and no
/// second mount namespace is needed; `/dev/pts` is the build's own, where Nix takes
/// the machine's when a build has no id 0.
pub(crate) fn build_steps(layout: &Layout) -> Vec<Step> {
    let inside = |path: &Path| layout.root.join(path.strip_prefix("/").unwrap_or(path));
    let mut steps = vec![Step::Session, Step::DieWithParent, Step::OomFirst];
    if layout.private_network {
        steps.push(Step::Loopback);
    }
    steps.push(Step::HostNames { host: "localhost".into(), domain: "(none)".into() });
    steps.push(Step::PrivateMounts);
    // pivot_root takes a mount point.
    steps.push(Step::Bind { source: layout.root.clone(), target: layout.root.clone() });
    // Other builds have the same tree for their root. What is mounted on it from here on is each build's own.
    steps.push(Step::ReadOnly { target: layout.root.clone() });
    let store = inside(&layout.store_dir);
    steps.push(Step::Bind { source: layout.store.clone(), target: store.clone() });
    for (source, target) in &layout.binds {
        let place = inside(target);
        steps.push(Step::Bind { source: source.clone(), target: place.clone() });
        // The machine's own files, which may belong to the very user that the build runs as.
        if MACHINE_FILES.iter().any(|dir| target.starts_with(dir)) {
            steps.push(Step::ReadOnly { target: place });
        }
    }
    steps.push(Step::ReadOnlyBelow { target: store });
    steps.push(Step::MountProc { target: inside(Path::new("/proc")) });
    if layout.shm {
        steps.push(Step::MountShm { target: inside(Path::new("/dev/shm")) });
    }
    if layout.cgroup {
        steps.push(Step::CgroupNamespace);
    }
    steps.push(root_step(layout.move_root, &layout.root));
    steps.push(Step::PrivateTerminals);
    steps.extend([
        Step::NoNewPrivileges,
        // The namespace is what keeps the network away.
        Step::FilterSyscalls { network: true },
        Step::ScopeSockets,
        Step::Personality { linux32: layout.linux32 },
        Step::ChangeDir { path: layout.build_dir.clone() },
        Step::CloseDescriptors,
        Step::LimitsAndUmask,
        Step::Ids { uid: INSIDE_UID, gid: INSIDE_GID },
        Step::DieWithParent,
        Step::Exec,
    ]);
    steps
}

/// The steps of a build whose sandbox is the pod. What is not the pod's doing is given up as in every build.
pub(crate) fn bare_steps(layout: &BareLayout) -> Vec<Step> {
    let mut writable = vec![layout.store_dir.clone(), layout.build_dir.clone()];
    writable.extend(["/tmp", "/dev", "/proc"].map(PathBuf::from));
    vec![
        Step::Session,
        Step::DieWithParent,
        Step::OomFirst,
        Step::NoNewPrivileges,
        Step::FilterSyscalls { network: layout.network },
        Step::ScopeSockets,
        Step::ConfineFiles { writable, readable: layout.readable.clone() },
        Step::Personality { linux32: layout.linux32 },
        Step::ChangeDir { path: layout.build_dir.clone() },
        Step::CloseDescriptors,
        Step::LimitsAndUmask,
        Step::Ids { uid: layout.uid, gid: layout.gid },
        Step::DieWithParent,
        Step::Exec,
    ]
}

/// The steps that show whether this machine lets builds have ids of their own, and gives up rights for them.
pub(crate) fn bare_probe_steps(uid: u32, gid: u32) -> Vec<Step> {
    vec![
        Step::Session,
        Step::DieWithParent,
        Step::OomFirst,
        Step::NoNewPrivileges,
        Step::FilterSyscalls { network: true },
        Step::ScopeSockets,
        Step::Ids { uid, gid },
        Step::Exit,
    ]
}

/// The steps that show whether this machine lets us sandbox: the ones that containers and kernels refuse. `scratch` is
/// an empty directory.
pub(crate) fn probe_steps(scratch: &Path, move_root: bool) -> Vec<Step> {
    vec![
        Step::Session,
        Step::DieWithParent,
        Step::OomFirst,
        Step::Loopback,
        Step::HostNames { host: "localhost".into(), domain: "(none)".into() },
        Step::PrivateMounts,
        Step::Bind { source: scratch.to_owned(), target: scratch.to_owned() },
        Step::MountProc { target: scratch.to_owned() },
        root_step(move_root, scratch),
        Step::NoNewPrivileges,
        Step::FilterSyscalls { network: true },
        Step::Ids { uid: INSIDE_UID, gid: INSIDE_GID },
        Step::Exit,
    ]
}

fn root_step(move_root: bool, root: &Path) -> Step {
    let root = root.to_owned();
    if move_root { Step::MoveRoot { root } } else { Step::PivotRoot { root } }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::double::layout;

    fn position(steps: &[Step], wanted: impl Fn(&Step) -> bool) -> usize {
        steps.iter().position(wanted).unwrap()
    }

    #[test]
    fn rights_go_before_the_builder_runs_and_after_their_last_use() {
        let steps = build_steps(&layout());
        let pivot = position(&steps, |s| matches!(s, Step::PivotRoot { .. }));
        let last_mount = steps
            .iter()
            .rposition(|s| {
                matches!(
                    s,
                    Step::Bind { .. }
                        | Step::MountProc { .. }
                        | Step::MountShm { .. }
                        | Step::ReadOnlyBelow { .. }
                )
            })
            .unwrap();
        let ids = position(&steps, |s| matches!(s, Step::Ids { .. }));
        let filter = position(&steps, |s| matches!(s, Step::FilterSyscalls { .. }));
        let privileges = position(&steps, |s| *s == Step::NoNewPrivileges);
        assert!(
            position(&steps, |s| *s == Step::PrivateMounts)
                < position(&steps, |s| matches!(s, Step::Bind { .. }))
        );
        assert!(last_mount < pivot && pivot < privileges && privileges < filter && filter < ids);
        assert!(position(&steps, |s| *s == Step::CloseDescriptors) < ids);
        assert_eq!(steps[ids + 1..], [Step::DieWithParent, Step::Exec]);
    }

    #[test]
    fn inputs_are_read_only_and_the_store_is_not() {
        let steps = build_steps(&layout());
        let input = position(&steps, |s| matches!(s, Step::Bind { source, .. } if source.ends_with("in")));
        let seal = position(
            &steps,
            |s| matches!(s, Step::ReadOnlyBelow { target } if target.ends_with("nix/store")),
        );
        assert!(input < seal);
    }

    #[test]
    fn what_builds_share_is_read_only_before_anything_is_mounted_on_it() {
        let steps = build_steps(&layout());
        let root = position(&steps, |s| matches!(s, Step::Bind { target, .. } if target == Path::new("/r")));
        assert_eq!(steps[root + 1], Step::ReadOnly { target: "/r".into() });
        assert!(
            root < position(&steps, |s| matches!(s, Step::Bind { target, .. } if target != Path::new("/r")))
        );
    }

    #[test]
    fn the_network_is_private_unless_it_is_needed() {
        assert!(build_steps(&layout()).contains(&Step::Loopback));
        let fetcher = Layout { private_network: false, ..layout() };
        assert!(!build_steps(&fetcher).contains(&Step::Loopback));
    }
}
