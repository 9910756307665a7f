//! [`Parent`] on Linux: what the helper does for a build's process, and to it. Each method is one act.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::Path;

use rustix::process::{self, Pid, WaitOptions};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::kernel::Parent;
use super::linux::{Linux, check};
use super::plan::{IdMap, Isolation};

/// The id of who kills a build's processes, beside theirs. Nobody's: it is below those of builds, and mapped wherever these
/// are (see [`super::rungs`]).
const KILLER_UID: u32 = 30_000;

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

    fn clone(&mut self, isolation: &Isolation, group: Option<&Path>) -> io::Result<Option<Pid>> {
        // Opened before a right is put aside, and closed in the child with all else.
        let group = group.map(File::open).transpose()?;
        let clone = |namespaces| match &group {
            Some(group) => clone_into(namespaces, group),
            None => clone(namespaces),
        };
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

/// The same in a control group of version 2, which takes a thousandth of the time of moving it there.
#[allow(unsafe_code)]
fn clone_into(namespaces: libc::c_int, group: &File) -> io::Result<Option<Pid>> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let args = CloneArgs {
        flags: u64::from(namespaces.cast_unsigned()) | CLONE_INTO_CGROUP,
        exit_signal: u64::from(libc::SIGCHLD.cast_unsigned()),
        cgroup: u64::from(group.as_raw_fd().cast_unsigned()),
        ..CloneArgs::default()
    };
    // SAFETY: as in `clone`; the struct lives across the call and its size is given (clone3, in clone(2)).
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) })?;
    Ok(Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?))
}

/// Whether there is such a call here at all; container runtimes' filters hide it as a rule.
#[allow(unsafe_code)]
pub(super) fn has_clone_into() -> bool {
    // SAFETY: no size is right for no struct, so the call that is there does nothing but refuse.
    let refused = check(unsafe { libc::syscall(libc::SYS_clone3, std::ptr::null::<CloneArgs>(), 0_usize) });
    refused.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
}

/// linux/sched.h, up to version 2 of it: Linux 5.7.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
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
        // It may signal what has its effective id as one of its own, and be signalled by who has one of its others: it cannot
        // hit anything else, and what it kills cannot kill it first (Linux: kernel/signal.c, kill_ok_by_cred).
        let (uid, own) = (process::Uid::from_raw(uid), process::Uid::from_raw(KILLER_UID));
        let killed =
            rustix::thread::set_thread_res_uid(own, uid, own).map_err(io::Error::from).and_then(|()| {
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

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    /// Beyond those that builds of other tests have.
    const UID: u32 = 30_130;
    const ROUNDS: usize = 50;

    #[allow(unsafe_code)]
    #[test]
    fn what_is_killed_cannot_kill_first() {
        if !process::geteuid().is_root() {
            assert_eq!(kill_as(UID).unwrap_err().raw_os_error(), Some(libc::EPERM));
            return;
        }
        for round in 0..ROUNDS {
            let (mut begun, begins) = io::pipe().unwrap();
            let Some(child) = clone(0).unwrap() else {
                let uid = process::Uid::from_raw(UID);
                let changed = rustix::thread::set_thread_res_uid(uid, uid, uid);
                let _told = rustix::io::write(&begins, &[u8::from(changed.is_ok())]);
                // Under another id it would hit others.
                while changed.is_ok() {
                    // SAFETY: takes numbers only; of an id that nothing else has, it hits who comes to kill it.
                    unsafe { libc::kill(-1, libc::SIGKILL) };
                }
                // SAFETY: ends this process without running destructors that belong to the process it was cloned from.
                unsafe { libc::_exit(1) }
            };
            drop(begins);
            let mut word = [0];
            begun.read_exact(&mut word).unwrap();
            let killed = kill_as(UID);
            let ended = process::waitpid(Some(child), WaitOptions::NOHANG);
            if !matches!(ended, Ok(Some(_))) {
                // As root, who may do that.
                process::kill_process(child, process::Signal::KILL).unwrap();
                process::waitpid(Some(child), WaitOptions::empty()).unwrap();
            }
            assert!(word == [1] && killed.is_ok(), "round {round}: {killed:?}");
        }
    }
}
