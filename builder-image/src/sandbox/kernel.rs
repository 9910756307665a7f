//! The system calls that a [`Step`](super::plan::Step) can make, as a trait, so that the order of steps and what
//! happens when one fails can be tested without rights. It may not decide anything: one method, one act.

use std::io;
use std::path::Path;

use super::plan::Command;

/// Acts on the calling process. Called by a process with one thread, between clone and exec.
pub(crate) trait Kernel {
    fn session(&mut self) -> io::Result<()>;
    fn die_with_parent(&mut self) -> io::Result<()>;
    fn loopback(&mut self) -> io::Result<()>;
    fn host_names(&mut self, host: &str, domain: &str) -> io::Result<()>;
    fn private_mounts(&mut self) -> io::Result<()>;
    fn bind(&mut self, source: &Path, target: &Path) -> io::Result<()>;
    fn read_only(&mut self, target: &Path) -> io::Result<()>;
    fn read_only_below(&mut self, target: &Path) -> io::Result<()>;
    fn mount_proc(&mut self, target: &Path) -> io::Result<()>;
    fn mount_shm(&mut self, target: &Path) -> io::Result<()>;
    fn pivot_root(&mut self, root: &Path) -> io::Result<()>;
    fn no_new_privileges(&mut self) -> io::Result<()>;
    fn filter_syscalls(&mut self) -> io::Result<()>;
    fn scope_sockets(&mut self) -> io::Result<()>;
    fn personality(&mut self, linux32: bool) -> io::Result<()>;
    fn change_dir(&mut self, path: &Path) -> io::Result<()>;
    fn close_descriptors(&mut self) -> io::Result<()>;
    fn limits_and_umask(&mut self) -> io::Result<()>;
    fn ids(&mut self, uid: u32, gid: u32) -> io::Result<()>;
    /// Returns only if it failed.
    fn exec(&mut self, command: &Command) -> io::Error;
}
