//! [`Parent`] on Linux: what the helper does for a build's process, and to it. Each method is one act.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

use rustix::process::{self, Pid, WaitOptions};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::kernel::Parent;
use super::linux::{Linux, check};
use super::plan::{IdMap, Isolation};

impl Parent for Linux {
    fn drop_groups(&mut self) -> io::Result<()> {
        Ok(rustix::thread::set_thread_groups(&[])?)
    }

    fn kill_all_of(&mut self, uid: u32) -> io::Result<()> {
        // Whatever loses its parent in here becomes this process's child, to be reaped below.
        process::set_child_subreaper(Some(process::getpid()))?;
        kill_as(uid)?;
        // No build but this one runs: where builds are kept together by their id, a program makes one only.
        loop {
            match process::wait(WaitOptions::empty()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CHILD) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn clone(&mut self, isolation: &Isolation) -> io::Result<Option<Pid>> {
        match isolation {
            Isolation::Nested(namespaces) => {
                let mut flags = libc::CLONE_NEWUSER
                    | libc::CLONE_NEWPID
                    | libc::CLONE_NEWNS
                    | libc::CLONE_NEWIPC
                    | libc::CLONE_NEWUTS;
                if namespaces.private_network {
                    flags |= libc::CLONE_NEWNET;
                }
                if namespaces.admin { clone(flags) } else { without_admin(|| clone(flags)) }
            }
            Isolation::Uid(_) | Isolation::Trial => clone(0),
        }
    }

    fn map_uid(&mut self, child: Pid, map: IdMap) -> io::Result<()> {
        write_of(child, "uid_map", &line(map))
    }

    fn deny_setgroups(&mut self, child: Pid) -> io::Result<()> {
        write_of(child, "setgroups", "deny")
    }

    fn map_gid(&mut self, child: Pid, map: IdMap) -> io::Result<()> {
        write_of(child, "gid_map", &line(map))
    }

    fn enter_group(&mut self, child: Pid, group: &Path) -> io::Result<()> {
        let mut file = File::options().write(true).open(group.join("cgroup.procs"))?;
        file.write_all(child.as_raw_nonzero().to_string().as_bytes())
    }
}

fn line(map: IdMap) -> String {
    format!("{} {} 1", map.inside, map.outside)
}

fn write_of(child: Pid, name: &str, text: &str) -> io::Result<()> {
    let path = format!("/proc/{}/{name}", child.as_raw_nonzero());
    File::options().write(true).open(path)?.write_all(text.as_bytes())
}

/// Like fork, with these namespaces new. None in the child.
#[allow(unsafe_code)]
fn clone(namespaces: libc::c_int) -> io::Result<Option<Pid>> {
    let flags = libc::c_long::from(namespaces | libc::SIGCHLD);
    // SAFETY: no CLONE_VM and no stack: the child goes on with a copy of this memory, as after fork. This process has one
    // thread, so no lock is held by a thread that the child lacks. The four further arguments are unused and zero,
    // whatever their order on this architecture.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) })?;
    Ok(Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?))
}

/// Does what a process without SYS_ADMIN could do as well. The right is there again afterwards, in the parent; in a child
/// with a user namespace of its own that is no matter.
fn without_admin<T>(act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let before = capabilities(None)?;
    if !before.effective.contains(CapabilitySet::SYS_ADMIN) {
        return act();
    }
    let mut lowered = before;
    lowered.effective.remove(CapabilitySet::SYS_ADMIN);
    set_capabilities(None, lowered)?;
    let result = act();
    set_capabilities(None, before)?;
    result
}

/// Kills every process of `uid`, at once: the kernel lets none of them fork away meanwhile (Nix: processes.cc, killUser).
#[allow(unsafe_code)]
pub(super) fn kill_as(uid: u32) -> io::Result<()> {
    const DONE: i32 = 0;
    let Some(child) = clone(0)? else {
        // A process of that id may signal these only, so it cannot hit anything else.
        let uid = process::Uid::from_raw(uid);
        let killed =
            rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(io::Error::from).and_then(|()| {
                // SAFETY: takes numbers only. -1 is every process that this one may signal, but for itself.
                check(libc::c_long::from(unsafe { libc::kill(-1, libc::SIGKILL) })).map(drop)
            });
        let code = match killed {
            Ok(()) => DONE,
            Err(error) => match error.raw_os_error() {
                // There is none.
                Some(libc::ESRCH) => DONE,
                errno => errno.unwrap_or(libc::EIO),
            },
        };
        // SAFETY: ends this process without running destructors that belong to the process it was cloned from.
        unsafe { libc::_exit(code) }
    };
    let status = rustix::io::retry_on_intr(|| process::waitpid(Some(child), WaitOptions::empty()))?;
    match status.and_then(|(_, status)| status.exit_status()) {
        Some(DONE) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno)),
        None => Err(io::Error::other("the process that was to kill the others was killed itself")),
    }
}
