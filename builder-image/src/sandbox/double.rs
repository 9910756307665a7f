//! The double of the kernel: it records what it is asked to do and fails at one act if told to. And one of each step and
//! act, for tests that look at all of them.

use std::io;
use std::path::{Path, PathBuf};

use rustix::process::Pid;

use super::birth::Act;
use super::kernel::{Kernel, Parent};
use super::plan::{BareLayout, IdMap, Isolation, Layout, Namespaces, Program, Step};
use crate::builtin::Job;

#[derive(Default)]
pub(crate) struct Recorder {
    pub acts: Vec<String>,
    fails_at: Option<usize>,
}

impl Recorder {
    /// Fails at the act with this number, counted from 0, and at no other.
    pub(crate) fn failing_at(index: usize) -> Self {
        Self { fails_at: Some(index), ..Self::default() }
    }

    /// What it fails with.
    pub(crate) fn error() -> io::Error {
        io::Error::from_raw_os_error(libc::EPERM)
    }

    fn act(&mut self, act: impl Into<String>) -> io::Result<()> {
        let fails = self.fails_at == Some(self.acts.len());
        self.acts.push(act.into());
        if fails { Err(Self::error()) } else { Ok(()) }
    }
}

impl Kernel for Recorder {
    fn session(&mut self) -> io::Result<()> {
        self.act("session")
    }
    fn die_with_parent(&mut self) -> io::Result<()> {
        self.act("die with parent")
    }
    fn oom_first(&mut self) -> io::Result<()> {
        self.act("oom first")
    }
    fn loopback(&mut self) -> io::Result<()> {
        self.act("loopback")
    }
    fn host_names(&mut self, host: &str, domain: &str) -> io::Result<()> {
        self.act(format!("names {host} {domain}"))
    }
    fn private_mounts(&mut self) -> io::Result<()> {
        self.act("private mounts")
    }
    fn bind(&mut self, source: &Path, target: &Path) -> io::Result<()> {
        self.act(format!("bind {} {}", source.display(), target.display()))
    }
    fn read_only(&mut self, target: &Path) -> io::Result<()> {
        self.act(format!("read-only {}", target.display()))
    }
    fn read_only_below(&mut self, target: &Path) -> io::Result<()> {
        self.act(format!("read-only below {}", target.display()))
    }
    fn mount_proc(&mut self, target: &Path) -> io::Result<()> {
        self.act(format!("proc {}", target.display()))
    }
    fn private_terminals(&mut self) -> io::Result<()> {
        self.act("terminals")
    }
    fn mount_shm(&mut self, target: &Path) -> io::Result<()> {
        self.act(format!("shm {}", target.display()))
    }
    fn cgroup_namespace(&mut self) -> io::Result<()> {
        self.act("control group namespace")
    }
    fn pivot_root(&mut self, root: &Path) -> io::Result<()> {
        self.act(format!("pivot {}", root.display()))
    }
    fn move_root(&mut self, root: &Path) -> io::Result<()> {
        self.act(format!("move {}", root.display()))
    }
    fn no_new_privileges(&mut self) -> io::Result<()> {
        self.act("no new privileges")
    }
    fn filter_syscalls(&mut self, network: bool) -> io::Result<()> {
        self.act(if network { "filter" } else { "filter, no network" })
    }
    fn scope_sockets(&mut self) -> io::Result<()> {
        self.act("scope")
    }
    fn confine_files(&mut self, writable: &[PathBuf], readable: &[PathBuf]) -> io::Result<()> {
        let list =
            |paths: &[PathBuf]| paths.iter().map(|path| format!(" {}", path.display())).collect::<String>();
        self.act(format!("files{}, read{}", list(writable), list(readable)))
    }
    fn personality(&mut self, linux32: bool) -> io::Result<()> {
        self.act(if linux32 { "personality 32" } else { "personality 64" })
    }
    fn change_dir(&mut self, path: &Path) -> io::Result<()> {
        self.act(format!("cd {}", path.display()))
    }
    fn close_descriptors(&mut self) -> io::Result<()> {
        self.act("close")
    }
    fn limits_and_umask(&mut self) -> io::Result<()> {
        self.act("limits")
    }
    fn ids(&mut self, uid: u32, gid: u32) -> io::Result<()> {
        self.act(format!("ids {uid} {gid}"))
    }
    fn exec(&mut self, _: &Program) -> io::Error {
        let _recorded = self.act("exec");
        io::Error::from(io::ErrorKind::NotFound)
    }
    fn builtin(&mut self, job: &Job) -> io::Result<i32> {
        self.act(format!("builtin {}", job.name)).map(|()| 7)
    }
}

impl Parent for Recorder {
    fn drop_groups(&mut self) -> io::Result<()> {
        self.act("drop groups")
    }
    fn kill_all_of(&mut self, uid: u32) -> io::Result<()> {
        self.act(format!("kill all of {uid}"))
    }
    fn clone(&mut self, isolation: &Isolation, group: Option<&Path>) -> io::Result<Option<Pid>> {
        let group = group.map(|group| format!(", and {}", group.display())).unwrap_or_default();
        let clone = match isolation {
            Isolation::Nested(Namespaces { private_network, admin, .. }) => {
                format!("clone into namespaces, network {private_network}, admin {admin}")
            }
            Isolation::Uid(_) | Isolation::Trial => "clone".into(),
        };
        self.act(clone + &group)?;
        Ok(Pid::from_raw(7))
    }
    fn map_uid(&mut self, _: Pid, map: IdMap) -> io::Result<()> {
        self.act(format!("uid_map {} {}", map.inside, map.outside))
    }
    fn deny_setgroups(&mut self, _: Pid) -> io::Result<()> {
        self.act("deny setgroups")
    }
    fn map_gid(&mut self, _: Pid, map: IdMap) -> io::Result<()> {
        self.act(format!("gid_map {} {}", map.inside, map.outside))
    }
}

pub(crate) fn layout() -> Layout {
    Layout {
        root: "/r".into(),
        store: "/s/x.drv.chroot/store".into(),
        store_dir: "/nix/store".into(),
        binds: vec![("/s/in".into(), "/nix/store/in".into())],
        build_dir: "/build".into(),
        private_network: true,
        linux32: false,
        shm: true,
        cgroup: false,
        move_root: false,
    }
}

pub(crate) fn bare_layout() -> BareLayout {
    BareLayout {
        store_dir: "/nix/store".into(),
        build_dir: "/build".into(),
        readable: vec!["/bin".into()],
        network: false,
        linux32: false,
        uid: 30_001,
        gid: 30_000,
    }
}

/// One of each. The match makes sure that none is forgotten.
pub(crate) fn every_step() -> Vec<Step> {
    let all = vec![
        Step::Session,
        Step::DieWithParent,
        Step::OomFirst,
        Step::Loopback,
        Step::HostNames { host: "h".into(), domain: "d".into() },
        Step::PrivateMounts,
        Step::Bind { source: "/a".into(), target: "/b".into() },
        Step::ReadOnly { target: "/a".into() },
        Step::ReadOnlyBelow { target: "/a".into() },
        Step::MountProc { target: "/a".into() },
        Step::MountShm { target: "/a".into() },
        Step::PrivateTerminals,
        Step::CgroupNamespace,
        Step::PivotRoot { root: "/a".into() },
        Step::MoveRoot { root: "/a".into() },
        Step::NoNewPrivileges,
        Step::FilterSyscalls { network: true },
        Step::ScopeSockets,
        Step::ConfineFiles { writable: vec![], readable: vec![] },
        Step::Personality { linux32: true },
        Step::Personality { linux32: false },
        Step::ChangeDir { path: "/a".into() },
        Step::CloseDescriptors,
        Step::LimitsAndUmask,
        Step::Ids { uid: 1, gid: 2 },
        Step::Exec,
        Step::Exit,
    ];
    for step in &all {
        match step {
            Step::Session
            | Step::DieWithParent
            | Step::OomFirst
            | Step::Loopback
            | Step::HostNames { .. }
            | Step::PrivateMounts
            | Step::Bind { .. }
            | Step::ReadOnly { .. }
            | Step::ReadOnlyBelow { .. }
            | Step::MountProc { .. }
            | Step::MountShm { .. }
            | Step::PrivateTerminals
            | Step::CgroupNamespace
            | Step::PivotRoot { .. }
            | Step::MoveRoot { .. }
            | Step::NoNewPrivileges
            | Step::FilterSyscalls { .. }
            | Step::ScopeSockets
            | Step::ConfineFiles { .. }
            | Step::Personality { .. }
            | Step::ChangeDir { .. }
            | Step::CloseDescriptors
            | Step::LimitsAndUmask
            | Step::Ids { .. }
            | Step::Exec
            | Step::Exit => {}
        }
    }
    all
}

/// One of each.
pub(crate) fn every_act() -> Vec<Act> {
    let map = IdMap { inside: 1, outside: 2 };
    let nested = Namespaces { private_network: true, admin: false, uid: map, gid: map };
    let all = vec![
        Act::DropGroups,
        Act::KillAllOf { uid: 1 },
        Act::Clone { isolation: Isolation::Nested(nested), group: None },
        Act::Clone { isolation: Isolation::Uid(1), group: None },
        Act::Clone { isolation: Isolation::Nested(nested), group: Some("/g".into()) },
        Act::MapUid(map),
        Act::DenySetgroups,
        Act::MapGid(map),
    ];
    for act in &all {
        match act {
            Act::DropGroups
            | Act::KillAllOf { .. }
            | Act::Clone { .. }
            | Act::MapUid(_)
            | Act::DenySetgroups
            | Act::MapGid(_) => {}
        }
    }
    all
}
