//! [`Kernel`] on Linux. Each method is one act of the calling process; none decides anything.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::mount::{self, MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{self, Resource, Rlimit, Signal};
use rustix::thread;

use super::kernel::Kernel;
use super::plan::Program;
use super::{landlock, seccomp};
use crate::builtin::{self, Job};

/// A process's flag for being on its way out (Linux: sched.h, PF_EXITING).
const EXITING: u64 = 4;

/// The calling process, which has one thread.
pub(crate) struct Linux;

impl Kernel for Linux {
    fn session(&mut self) -> io::Result<()> {
        default_signals()?;
        process::setsid()?;
        forget_keys()?;
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        rustix::stdio::dup2_stderr(rustix::stdio::stdout())?;
        Ok(())
    }

    fn die_with_parent(&mut self) -> io::Result<()> {
        Ok(process::set_parent_process_death_signal(Some(Signal::KILL))?)
    }

    fn oom_first(&mut self) -> io::Result<()> {
        // A tenth of the machine's memory on top of what it uses. More would put builds of pods with a guarantee behind
        // those of pods without.
        const MORE: i32 = 100;
        const MOST: i32 = 1000;
        let file = "/proc/self/oom_score_adj";
        let before: i32 = std::fs::read_to_string(file)?.trim().parse().map_err(io::Error::other)?;
        match std::fs::write(file, before.saturating_add(MORE).min(MOST).to_string()) {
            // A security module's doing. Builds are right without.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                ) =>
            {
                Ok(())
            }
            other => other,
        }
    }

    fn loopback(&mut self) -> io::Result<()> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType};
        let socket =
            rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        interface_up(&socket)
    }

    fn host_names(&mut self, host: &str, domain: &str) -> io::Result<()> {
        rustix::system::sethostname(host.as_bytes())?;
        Ok(rustix::system::setdomainname(domain.as_bytes())?)
    }

    fn private_mounts(&mut self) -> io::Result<()> {
        Ok(mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?)
    }

    fn bind(&mut self, source: &Path, target: &Path) -> io::Result<()> {
        Ok(mount::mount_bind_recursive(source, target)?)
    }

    fn read_only(&mut self, target: &Path) -> io::Result<()> {
        set_read_only(target, true, false)
    }

    fn read_only_below(&mut self, target: &Path) -> io::Result<()> {
        let result = set_read_only(target, true, true).and_then(|()| set_read_only(target, false, false));
        match result {
            // Linux before 5.12. There the inputs rest on their owner and modes alone, as they do under Nix.
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
            other => other,
        }
    }

    fn mount_proc(&mut self, target: &Path) -> io::Result<()> {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        Ok(mount::mount("proc", target, "proc", flags, None)?)
    }

    fn private_terminals(&mut self) -> io::Result<()> {
        // Without them a build has none: for one that needs none, which is nearly every one, that is no reason to fail.
        let _unsupported = super::terminals::mount();
        Ok(())
    }

    fn mount_shm(&mut self, target: &Path) -> io::Result<()> {
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        Ok(mount::mount("tmpfs", target, "tmpfs", flags, c"mode=1777,size=50%")?)
    }

    fn cgroup_namespace(&mut self) -> io::Result<()> {
        unshare_cgroups()
    }

    fn pivot_root(&mut self, root: &Path) -> io::Result<()> {
        // The old root is stacked on the new one, then taken off: no directory for it is needed.
        process::chdir(root)?;
        process::pivot_root(".", ".")?;
        mount::unmount(".", UnmountFlags::DETACH)?;
        Ok(process::chdir("/")?)
    }

    fn move_root(&mut self, root: &Path) -> io::Result<()> {
        // The file system that covers it is read-only and empty. Where there is no /sys, there is nothing to cover.
        match mount::mount("tmpfs", "/sys", "tmpfs", MountFlags::RDONLY, c"mode=000,size=4k") {
            Err(rustix::io::Errno::NOENT) => {}
            other => other?,
        }
        process::chdir(root)?;
        mount::mount_move(".", "/")?;
        process::chroot(".")?;
        Ok(process::chdir("/")?)
    }

    fn no_new_privileges(&mut self) -> io::Result<()> {
        Ok(thread::set_no_new_privs(true)?)
    }

    fn filter_syscalls(&mut self, network: bool) -> io::Result<()> {
        seccompiler::apply_filter(&seccomp::program(network)).map_err(io::Error::other)
    }

    fn scope_sockets(&mut self) -> io::Result<()> {
        // A second line only: the network namespace is the first, where there is one. Kernels before 6.12 lack it.
        let _unsupported = landlock::scope_abstract_sockets();
        Ok(())
    }

    fn confine_files(&mut self, writable: &[PathBuf], readable: &[PathBuf]) -> io::Result<()> {
        match landlock::confine(writable, readable) {
            // Kernels without Landlock, or with it turned off. Owners and modes are what remains.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP)) => Ok(()),
            other => other,
        }
    }

    fn personality(&mut self, linux32: bool) -> io::Result<()> {
        const ADDRESSES_AS_THEY_ARE: libc::c_ulong = 0x0004_0000;
        const LINUX32: libc::c_ulong = 8;
        if linux32 {
            set_personality(LINUX32)?;
        }
        // Containers' own filters may refuse this one; a build is right without it, only less repeatable.
        let base = if linux32 { LINUX32 } else { 0 };
        let _refused = set_personality(base | ADDRESSES_AS_THEY_ARE);
        Ok(())
    }

    fn change_dir(&mut self, path: &Path) -> io::Result<()> {
        Ok(process::chdir(path)?)
    }

    fn close_descriptors(&mut self) -> io::Result<()> {
        close_on_exec_from(3)
    }

    fn limits_and_umask(&mut self) -> io::Result<()> {
        // The hard limit stays: only who has SYS_RESOURCE outside could raise it, as Nix does.
        let hard = process::getrlimit(Resource::Core).maximum;
        process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: hard })?;
        process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        Ok(())
    }

    fn ids(&mut self, uid: u32, gid: u32) -> io::Result<()> {
        // One thread: the thread's ids are the process's.
        let (uid, gid) = (process::Uid::from_raw(uid), process::Gid::from_raw(gid));
        thread::set_thread_res_gid(gid, gid, gid)?;
        Ok(thread::set_thread_res_uid(uid, uid, uid)?)
    }

    fn exec(&mut self, program: &Program) -> io::Error {
        exec(program)
    }

    fn builtin(&mut self, job: &Job) -> io::Result<i32> {
        // There is no exec that would close what is marked, and the helper's socket is among it.
        close_from(3)?;
        // The job may hold a user's passwords: no core dump, and nobody may look into this process.
        process::set_dumpable_behavior(process::DumpableBehavior::NotDumpable)?;
        // Nobody hears a report any more, but the log is open.
        in_child(&|| builtin::run(job)).inspect_err(|error| eprintln!("cannot start a process: {error}"))
    }
}

/// Has a program that is to be started killed when the thread that starts it ends.
#[allow(unsafe_code)]
pub(crate) fn die_with_caller(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt as _;
    let die = || Ok(process::set_parent_process_death_signal(Some(Signal::KILL))?);
    // SAFETY: what runs between fork and exec is one system call, which takes no lock and allocates nothing.
    unsafe { command.pre_exec(die) };
}

/// A session keyring of its own instead of the one that everything which this program starts inherits: keyrings belong to
/// no namespace, so that builds would find the keys of whoever started this, and each other's.
#[allow(unsafe_code)]
fn forget_keys() -> io::Result<()> {
    const JOIN_SESSION_KEYRING: libc::c_long = 1;
    let anonymous: *const libc::c_char = std::ptr::null();
    // SAFETY: takes a name, which may be null.
    match check(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, anonymous) }) {
        // Containers' filters forbid this call, and kernels may lack it; then the build has no keys either.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)) => Ok(()),
        other => other.map(drop),
    }
}

/// A child of this process that has ended and is not reaped yet. It stays so.
#[allow(unsafe_code)]
pub(super) fn dead_child() -> Option<process::Pid> {
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: the kernel writes one siginfo_t, which lives across the call; all zero is a valid one, with pid 0 for none.
    let (result, pid) = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let result = libc::waitid(libc::P_ALL, 0, &raw mut info, options);
        (result, info.si_pid())
    };
    if result == 0 { process::Pid::from_raw(pid) } else { None }
}

/// Whether a process is past the point where anything but itself decides how it ends. Its files close a moment after that,
/// and who sees them closed may come to kill it before it can be waited for.
pub(super) fn is_ending(pid: process::Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    flags(&stat).is_none_or(|flags| flags & EXITING != 0)
}

/// The ninth field of `/proc/PID/stat` (proc_pid_stat(5)); the second may hold anything, and ends with the last parenthesis.
fn flags(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(6)?.parse().ok()
}

/// Handlers that a program inherits are Rust's ignored SIGPIPE and whatever our own parent ignored.
#[allow(unsafe_code)]
fn default_signals() -> io::Result<()> {
    const LAST_SIGNAL: libc::c_int = 64;
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: SIG_DFL installs no handler of ours. KILL, STOP and libc's own signals answer EINVAL, as they may.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: `set` is initialised by sigemptyset before it is read, and outlives both calls.
    let result = unsafe {
        let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, set.as_ptr(), std::ptr::null_mut())
    };
    check(libc::c_long::from(result)).map(drop)
}

#[allow(unsafe_code)]
fn interface_up(socket: &rustix::fd::OwnedFd) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    // SAFETY: an all-zero ifreq is valid: an empty name and flags of 0.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed() as libc::c_char;
    }
    let flags = libc::IFF_UP | libc::IFF_LOOPBACK | libc::IFF_RUNNING;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the kernel reads one ifreq, which lives across the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) };
    check(libc::c_long::from(result)).map(drop)
}

/// Sets or clears the read-only flag of the mount at `path`, and of all below it if `recursive`. Leaves every other flag,
/// which an old-style remount could not do to mounts that came from outside.
#[allow(unsafe_code)]
fn set_read_only(path: &Path, read_only: bool, recursive: bool) -> io::Result<()> {
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    const READ_ONLY: u64 = 1;
    const AT_RECURSIVE: libc::c_uint = 0x8000;
    let path = CString::new(path.as_os_str().as_bytes())?;
    let (set, clear) = if read_only { (READ_ONLY, 0) } else { (0, READ_ONLY) };
    let attr = MountAttr { set, clear, propagation: 0, user_namespace: 0 };
    let flags = if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: path and attr live across the call and the size is attr's (mount_setattr(2)).
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    check(result).map(drop)
}

#[allow(unsafe_code)]
fn unshare_cgroups() -> io::Result<()> {
    // SAFETY: changes which control groups this process sees as the root; takes a number only.
    check(libc::c_long::from(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) })).map(drop)
}

#[allow(unsafe_code)]
fn set_personality(bits: libc::c_ulong) -> io::Result<()> {
    // SAFETY: takes a number and returns the old one.
    check(libc::c_long::from(unsafe { libc::personality(bits) })).map(drop)
}

#[allow(unsafe_code)]
fn close_on_exec_from(first: libc::c_uint) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    // SAFETY: marks descriptors, closes none; takes numbers only.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, CLOSE_RANGE_CLOEXEC) })
        .map(drop)
}

/// Closes every descriptor beyond the standard three but for these, in ascending order.
#[allow(unsafe_code)]
pub(super) fn close_all_but(kept: [libc::c_int; 2]) -> io::Result<()> {
    let mut first: libc::c_uint = 3;
    for next in kept.into_iter().map(Some).chain([None]) {
        let next = next.and_then(|next| libc::c_uint::try_from(next).ok());
        let last = next.map_or(libc::c_uint::MAX, |next| next.saturating_sub(1));
        if first <= last {
            // SAFETY: called by a process that is a copy of another, whose objects own these descriptors: nothing of them
            // is used or dropped in the copy. Takes numbers only.
            check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
        }
        first = next.map_or(first, |next| next + 1);
    }
    Ok(())
}

#[allow(unsafe_code)]
fn exec(program: &Program) -> io::Error {
    let pointers = |strings: &[CString]| {
        let ends = std::iter::once(std::ptr::null());
        strings.iter().map(|s| s.as_ptr()).chain(ends).collect::<Vec<_>>()
    };
    let (argv, env) = (pointers(&program.argv), pointers(&program.env));
    // SAFETY: both arrays end in null and point to strings that `program` keeps alive; execve returns only on failure.
    unsafe { libc::execve(program.program.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

#[allow(unsafe_code)]
fn close_from(first: libc::c_uint) -> io::Result<()> {
    // SAFETY: called by a process that runs nothing further but a built-in builder, in a child that ends without running
    // destructors: nothing uses or drops the objects that own these descriptors. Takes numbers only.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) }).map(drop)
}

/// Runs `work` in a child process and returns the exit code that it gives; 128 and the signal's number if a signal ends it.
///
/// The process that calls this was cloned by a bare system call, of which the C library knows nothing: it believes that
/// its thread has the id that it had in the process before. A child by the library's own fork is one that may start threads.
#[allow(unsafe_code)]
fn in_child(work: &dyn Fn() -> i32) -> io::Result<i32> {
    // SAFETY: this process has one thread, so the child's memory is in no half state, and it may call anything.
    let pid = unsafe { libc::fork() };
    match process::Pid::from_raw(pid) {
        Some(_) if pid < 0 => Err(io::Error::last_os_error()),
        Some(child) => {
            let status =
                rustix::io::retry_on_intr(|| process::waitpid(Some(child), process::WaitOptions::empty()))?;
            let status = status.map(|(_, status)| (status.exit_status(), status.terminating_signal()));
            Ok(match status {
                Some((Some(code), _)) => code,
                Some((_, Some(signal))) => 128 + signal,
                _ => 1,
            })
        }
        None => {
            let code = work();
            // SAFETY: ends this process without running destructors that belong to the one that it was forked from.
            unsafe { libc::_exit(code) }
        }
    }
}

pub(super) fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_a_process() {
        assert_eq!(flags("7 (a) b) S 1 7 7 0 -1 4194308 0 0"), Some(4_194_308));
        assert_eq!(flags(""), None);
        let mut child =
            std::process::Command::new("/bin/cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = process::Pid::from_child(&child);
        assert!(!is_ending(pid));
        child.kill().unwrap();
        // Waits without reaping: the number is not given to another process.
        let ended = process::WaitIdOptions::EXITED | process::WaitIdOptions::NOWAIT;
        process::waitid(process::WaitId::Pid(pid), ended).unwrap();
        assert!(is_ending(pid));
        child.wait().unwrap();
    }
}
