//! Terminals of the build's own, in place of the machine's. A file system of terminals takes an id 0 in the user namespace
//! that mounts it, which a build has not; so a child of the build's process mounts one in a further namespace, where
//! the build's id is 0, and hands it over.
//!
//! The machine's terminals are guarded by their owners, and a build that runs under the id of whoever started it is that
//! owner: it could read what is typed into every terminal of its user's. Besides, a multiplexer that is mounted by itself
//! finds no terminals beside it, so that builds could not open any.

use std::io;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags};
use rustix::process::{DumpableBehavior, Gid, Pid, Uid, WaitOptions, waitpid};
use rustix::thread::{self, UnshareFlags};

use super::plan::{INSIDE_GID, INSIDE_UID};

const TERMINALS: &str = "/dev/pts";
/// How many terminals a build can have. The machine's number is limited, too, and for all together (`kernel.pty.max`).
const MAX_TERMINALS: &str = "256";

/// Mounts them in the root directory of the build.
pub(super) fn mount() -> io::Result<()> {
    let mounted = hand_over()?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(rustix::mount::move_mount(mounted.as_fd(), "", rustix::fs::CWD, TERMINALS, flags)?)
}

/// The file system, mounted nowhere.
#[allow(unsafe_code)]
fn hand_over() -> io::Result<OwnedFd> {
    const FLAGS: libc::c_int = libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: no CLONE_VM and no stack: the child goes on with a copy of this memory, as after fork. This process has one
    // thread. The descriptors are one table, by which the child's is ours. The other arguments are unused and zero.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(FLAGS), 0, 0, 0, 0) };
    if pid == 0 {
        let code = make().map_or(0, std::os::fd::IntoRawFd::into_raw_fd);
        // What does not fit into an exit code is not handed over.
        let code = if code > 255 { 0 } else { code };
        // SAFETY: ends the child without running destructors that belong to its parent.
        unsafe { libc::_exit(code) }
    }
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).filter(|pid| pid.as_raw_nonzero().get() > 0);
    let pid = pid.ok_or_else(io::Error::last_os_error)?;
    let ended = rustix::io::retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()))?;
    match ended.and_then(|(_, status)| status.exit_status()) {
        // SAFETY: the child opened it in the table that is ours, closed nothing, and is gone: nobody else owns it.
        Some(descriptor @ 3..) => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// In the child: a namespace with an id 0, and a mount in it.
fn make() -> io::Result<OwnedFd> {
    let (uid, gid) = (Uid::from_raw(INSIDE_UID), Gid::from_raw(INSIDE_GID));
    // Namespaces are for those whose ids are mapped.
    thread::set_thread_res_gid(gid, gid, gid)?;
    thread::set_thread_res_uid(uid, uid, uid)?;
    unshare()?;
    // A change of rights closes a process's own files in /proc to itself.
    rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)?;
    std::fs::write("/proc/self/uid_map", format!("0 {INSIDE_UID} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("0 {INSIDE_GID} 1"))?;
    let terminals = rustix::mount::fsopen("devpts", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("mode", "0620"), ("ptmxmode", "0666"), ("max", MAX_TERMINALS)] {
        rustix::mount::fsconfig_set_string(terminals.as_fd(), key, value)?;
    }
    rustix::mount::fsconfig_create(terminals.as_fd())?;
    let mounted =
        rustix::mount::fsmount(terminals.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    Ok(mounted)
}

#[allow(unsafe_code)]
fn unshare() -> io::Result<()> {
    // SAFETY: the process has one thread, and its descriptors stay shared, which is what they are meant to be.
    Ok(unsafe { thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) }?)
}
