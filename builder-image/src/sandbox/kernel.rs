//! The system calls that make a sandbox, as two traits: what the process does that becomes the builder, by [`Step`], and
//! what the process does that clones it, by [`Act`]. So the order of all of it, and what happens when one fails, can be
//! tested without rights. They may not decide anything: one method, one act.
//!
//! [`Step`]: super::plan::Step
//! [`Act`]: super::birth::Act

use std::io;
use std::path::{Path, PathBuf};

use rustix::process::Pid;

use super::plan::{IdMap, Isolation, Program};
use crate::builtin::Job;

/// Acts on the calling process. Called by a process with one thread, between clone and exec.
pub(crate) trait Kernel {
    fn session(&mut self) -> io::Result<()>;
    fn die_with_parent(&mut self) -> io::Result<()>;
    fn oom_first(&mut self) -> io::Result<()>;
    fn loopback(&mut self) -> io::Result<()>;
    fn host_names(&mut self, host: &str, domain: &str) -> io::Result<()>;
    fn private_mounts(&mut self) -> io::Result<()>;
    fn bind(&mut self, source: &Path, target: &Path) -> io::Result<()>;
    fn read_only(&mut self, target: &Path) -> io::Result<()>;
    fn read_only_below(&mut self, target: &Path) -> io::Result<()>;
    fn mount_proc(&mut self, target: &Path) -> io::Result<()>;
    /// Mounts terminals of the build's own, if that can be done.
    fn private_terminals(&mut self) -> io::Result<()>;
    fn mount_shm(&mut self, target: &Path) -> io::Result<()>;
    fn cgroup_namespace(&mut self) -> io::Result<()>;
    fn pivot_root(&mut self, root: &Path) -> io::Result<()>;
    fn move_root(&mut self, root: &Path) -> io::Result<()>;
    fn no_new_privileges(&mut self) -> io::Result<()>;
    fn filter_syscalls(&mut self, network: bool) -> io::Result<()>;
    fn scope_sockets(&mut self) -> io::Result<()>;
    fn confine_files(&mut self, writable: &[PathBuf], readable: &[PathBuf]) -> io::Result<()>;
    fn personality(&mut self, linux32: bool) -> io::Result<()>;
    fn change_dir(&mut self, path: &Path) -> io::Result<()>;
    fn close_descriptors(&mut self) -> io::Result<()>;
    fn limits_and_umask(&mut self) -> io::Result<()>;
    fn ids(&mut self, uid: u32, gid: u32) -> io::Result<()>;
    /// Returns only if it failed.
    fn exec(&mut self, program: &Program) -> io::Error;
    /// Runs a built-in builder to its end, in a process with no descriptor but the standard three. Its exit code.
    fn builtin(&mut self, job: &Job) -> io::Result<i32>;
}

/// Acts of the process that clones builds' processes. It has one thread.
pub(crate) trait Parent {
    /// Gives up supplementary groups.
    fn drop_groups(&mut self) -> io::Result<()>;
    /// Kills every process of this id, and waits until all of them are gone.
    fn kill_all_of(&mut self, uid: u32) -> io::Result<()>;
    /// Like fork, into new namespaces and a control group of version 2. None in the child.
    fn clone(&mut self, isolation: &Isolation, group: Option<&Path>) -> io::Result<Option<Pid>>;
    fn map_uid(&mut self, child: Pid, map: IdMap) -> io::Result<()>;
    fn deny_setgroups(&mut self, child: Pid) -> io::Result<()>;
    fn map_gid(&mut self, child: Pid, map: IdMap) -> io::Result<()>;
}
