//! The helper process: this program again, with one thread, which clones the processes that become builders. It maps
//! their ids, waits for them, reports how they ended, and kills each as soon as this program lets go of its socket or says
//! so; when this program itself goes, so do all. Reports are lines; see [`Report`].
//!
//! It may not touch the store. It never reads what a sandbox is to do: the cloned process does that itself.

use std::fs::File;
use std::io::{self, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{self, Pid, PidfdFlags, Signal, WaitOptions};

use super::kernel::Kernel;
use super::launch::{self, Report};
use super::linux::{self, Linux};
use super::plan::{Command, IdMap, Namespaces, Step};

/// Most bytes of a request, which is a few numbers in JSON.
const MAX_REQUEST_LEN: usize = 1024;

/// The helper's main function: its standard input is the socket that requests come by.
pub(crate) fn main() -> ExitCode {
    // Supplementary groups would be rights that builds keep. An ordinary user may not drop them (Nix tolerates it too).
    let _ordinary_user = rustix::thread::set_thread_groups(&[]);
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        // Nobody reads what this process writes, and its builds end with it and are reported as lost.
        Err(_) => ExitCode::FAILURE,
    }
}

/// A request: what to clone, and the two ends that the new process gets.
struct Request {
    namespaces: Namespaces,
    control: UnixStream,
    terminal: OwnedFd,
}

/// A build's process.
struct Build {
    pid: Pid,
    pidfd: OwnedFd,
    control: UnixStream,
    killed: bool,
}

/// Serves requests until there can be no more. What runs then dies with this process.
fn serve() -> io::Result<()> {
    let requests = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let mut builds: Vec<Build> = Vec::new();
    loop {
        let mut fds = vec![PollFd::new(&requests, PollFlags::IN)];
        for build in &builds {
            fds.push(PollFd::new(&build.pidfd, PollFlags::IN));
            // Not readability: what there is to read belongs to the build's process.
            let hang_up = if build.killed { PollFlags::empty() } else { PollFlags::RDHUP };
            fds.push(PollFd::new(&build.control, hang_up));
        }
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut ready = ready.into_iter();
        let requested = ready.next() == Some(true);
        let mut left = Vec::with_capacity(builds.len() + 1);
        for mut build in builds {
            let (ended, let_go) = (ready.next() == Some(true), ready.next() == Some(true));
            if ended {
                build.reap();
                continue;
            }
            if let_go && !build.killed {
                process::pidfd_send_signal(&build.pidfd, Signal::KILL)?;
                build.killed = true;
            }
            left.push(build);
        }
        builds = left;
        if requested {
            let Some(request) = receive(&requests)? else { return Ok(()) };
            match spawn(request.namespaces, &request.control, request.terminal) {
                Ok((pid, pidfd)) => {
                    builds.push(Build { pid, pidfd, control: request.control, killed: false });
                }
                Err(why) => Report::Failed(why).send(&request.control),
            }
        }
    }
}

/// The next request; None when the other end is closed.
fn receive(requests: &OwnedFd) -> io::Result<Option<Request>> {
    let mut bytes = [0; MAX_REQUEST_LEN];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let message = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(requests, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    if message.bytes == 0 {
        return Ok(None);
    }
    let namespaces = serde_json::from_slice(bytes.get(..message.bytes).unwrap_or_default())?;
    let mut descriptors = descriptors.into_iter();
    match (descriptors.next(), descriptors.next()) {
        (Some(control), Some(terminal)) => {
            Ok(Some(Request { namespaces, control: control.into(), terminal }))
        }
        _ => Err(io::Error::other("a request without its descriptors")),
    }
}

/// Clones the process that becomes a builder.
fn spawn(namespaces: Namespaces, control: &UnixStream, terminal: OwnedFd) -> Result<(Pid, OwnedFd), String> {
    let text = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| format!("cannot {what}: {error}")
    };
    let (go_reader, go_writer) = io::pipe().map_err(text("make a pipe"))?;
    let child = clone(namespaces).map_err(text("clone the builder's process into namespaces of its own"))?;
    let Some(child) = child else {
        become_builder(control, &terminal, go_reader);
    };
    // The terminal must end when the build's processes do, so this process lets go of it.
    drop((terminal, go_reader));
    let pidfd = match process::pidfd_open(child, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(errno) => {
            let _gone = process::kill_process(child, Signal::KILL);
            let _reaped = process::waitpid(Some(child), WaitOptions::empty());
            return Err(text("watch the builder")(errno.into()));
        }
    };
    if let Err(error) = map_ids(child, namespaces) {
        let _gone = process::pidfd_send_signal(&pidfd, Signal::KILL);
        let _reaped = process::waitpid(Some(child), WaitOptions::empty());
        return Err(format!("cannot map the ids of the builder's user namespace: {error}"));
    }
    let _gone = (&go_writer).write_all(b"g");
    Ok((child, pidfd))
}

impl Build {
    /// Reports the end of a process that has ended.
    fn reap(self) {
        // It is process 1 of its namespace: once it is reaped, the kernel has killed and reaped everything in there.
        let status = rustix::io::retry_on_intr(|| process::waitpid(Some(self.pid), WaitOptions::empty()));
        let status = status.ok().flatten();
        let report = match status.map(|(_, status)| (status.exit_status(), status.terminating_signal())) {
            Some((Some(code), _)) => Report::Exited(code),
            Some((_, Some(signal))) => Report::Signalled(signal),
            _ => Report::Failed("the builder ended in an unknown way".into()),
        };
        report.send(&self.control);
    }
}

/// Takes the steps in order and stops at the first that fails, which the error names. Otherwise returns only after
/// [`Step::Exit`].
pub(crate) fn run(
    steps: &[Step],
    command: &Command,
    kernel: &mut dyn Kernel,
    before_exec: &mut dyn FnMut(),
) -> Result<(), Report> {
    for step in steps {
        let result = match step {
            Step::Session => kernel.session(),
            Step::DieWithParent => kernel.die_with_parent(),
            Step::Loopback => kernel.loopback(),
            Step::HostNames { host, domain } => kernel.host_names(host, domain),
            Step::PrivateMounts => kernel.private_mounts(),
            Step::Bind { source, target } => kernel.bind(source, target),
            Step::ReadOnly { target } => kernel.read_only(target),
            Step::ReadOnlyBelow { target } => kernel.read_only_below(target),
            Step::MountProc { target } => kernel.mount_proc(target),
            Step::MountShm { target } => kernel.mount_shm(target),
            Step::PivotRoot { root } => kernel.pivot_root(root),
            Step::NoNewPrivileges => kernel.no_new_privileges(),
            Step::FilterSyscalls => kernel.filter_syscalls(),
            Step::ScopeSockets => kernel.scope_sockets(),
            Step::Personality { linux32 } => kernel.personality(*linux32),
            Step::ChangeDir { path } => kernel.change_dir(path),
            Step::CloseDescriptors => kernel.close_descriptors(),
            Step::LimitsAndUmask => kernel.limits_and_umask(),
            Step::Ids { uid, gid } => kernel.ids(*uid, *gid),
            Step::Exit => return Ok(()),
            Step::Exec => {
                before_exec();
                let error = kernel.exec(command);
                let program = command.program.to_string_lossy();
                return Err(Report::NotExecuted(format!("cannot execute {program}: {error}")));
            }
        };
        result
            .map_err(|error| Report::Failed(format!("cannot set up the sandbox: step {step:?}: {error}")))?;
    }
    Ok(())
}

/// Runs in the cloned process and does not return.
#[allow(unsafe_code)]
fn become_builder(control: &UnixStream, terminal: &OwnedFd, go: io::PipeReader) -> ! {
    let code = match prepare(control, terminal, go) {
        Ok((steps, command)) => {
            match run(&steps, &command, &mut Linux, &mut || Report::Ready.send(control)) {
                Ok(()) => 0,
                Err(report) => {
                    report.send(control);
                    1
                }
            }
        }
        Err(error) => {
            Report::Failed(format!("cannot read the sandbox's plan: {error}")).send(control);
            1
        }
    };
    // SAFETY: ends this process without running destructors that belong to the process it was cloned from.
    unsafe { libc::_exit(code) }
}

/// Lets go of everything that belongs to other builds, waits until its ids are mapped, and reads what to do.
fn prepare(
    control: &UnixStream,
    terminal: &OwnedFd,
    mut go: io::PipeReader,
) -> io::Result<(Vec<Step>, Command)> {
    rustix::stdio::dup2_stdout(terminal)?;
    rustix::stdio::dup2_stderr(terminal)?;
    let mut kept = [control.as_raw_fd(), go.as_raw_fd()];
    kept.sort_unstable();
    linux::close_all_but(kept)?;
    let mut byte = [0];
    // Without that byte the helper is gone or failed, and reports itself.
    go.read_exact(&mut byte)?;
    launch::receive(control)
}

/// Like fork, into new namespaces. None in the child.
#[allow(unsafe_code)]
fn clone(namespaces: Namespaces) -> io::Result<Option<Pid>> {
    let mut flags = libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::SIGCHLD;
    if namespaces.private_network {
        flags |= libc::CLONE_NEWNET;
    }
    // SAFETY: no CLONE_VM and no stack: the child goes on with a copy of this memory, as after fork. This process has one
    // thread, so no lock is held by a thread that the child lacks. The four further arguments are unused and zero,
    // whatever their order on this architecture.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, 0, 0) };
    match pid {
        pid if pid < 0 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?)),
    }
}

fn map_ids(child: Pid, namespaces: Namespaces) -> io::Result<()> {
    let dir = format!("/proc/{}", child.as_raw_nonzero());
    let line = |map: IdMap| format!("{} {} 1", map.inside, map.outside);
    let write = |name: &str, text: &str| {
        let file = File::options().write(true).open(format!("{dir}/{name}"));
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|error| io::Error::new(error.kind(), format!("{name} {text:?}: {error}")))
    };
    write("uid_map", &line(namespaces.uid))?;
    // With it a build could leave groups, and so gain what a group is denied; required of ordinary users.
    write("setgroups", "deny")?;
    write("gid_map", &line(namespaces.gid))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::sandbox::plan::{Layout, build_steps};

    /// Records what it is asked to do, and fails at one act if told to.
    #[derive(Default)]
    struct Recorder {
        acts: Vec<String>,
        fail_at: Option<&'static str>,
    }

    impl Recorder {
        fn act(&mut self, act: impl Into<String>) -> io::Result<()> {
            let act = act.into();
            let fails = self.fail_at.is_some_and(|at| act.starts_with(at));
            self.acts.push(act);
            if fails { Err(io::Error::from(io::ErrorKind::PermissionDenied)) } else { Ok(()) }
        }
    }

    impl Kernel for Recorder {
        fn session(&mut self) -> io::Result<()> {
            self.act("session")
        }
        fn die_with_parent(&mut self) -> io::Result<()> {
            self.act("die with parent")
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
        fn mount_shm(&mut self, target: &Path) -> io::Result<()> {
            self.act(format!("shm {}", target.display()))
        }
        fn pivot_root(&mut self, root: &Path) -> io::Result<()> {
            self.act(format!("pivot {}", root.display()))
        }
        fn no_new_privileges(&mut self) -> io::Result<()> {
            self.act("no new privileges")
        }
        fn filter_syscalls(&mut self) -> io::Result<()> {
            self.act("filter")
        }
        fn scope_sockets(&mut self) -> io::Result<()> {
            self.act("scope")
        }
        fn personality(&mut self, linux32: bool) -> io::Result<()> {
            self.act(format!("personality {linux32}"))
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
        fn exec(&mut self, _: &Command) -> io::Error {
            let _recorded = self.act("exec");
            io::Error::from(io::ErrorKind::NotFound)
        }
    }

    fn steps() -> Vec<Step> {
        let layout = Layout {
            root: "/r".into(),
            store: "/s/x.drv.chroot/store".into(),
            store_dir: "/nix/store".into(),
            binds: vec![("/s/in".into(), "/nix/store/in".into())],
            build_dir: "/build".into(),
            private_network: true,
            linux32: false,
            shm: true,
        };
        build_steps(&layout)
    }

    #[test]
    fn acts_in_the_order_of_nix() {
        let mut kernel = Recorder::default();
        let mut ready = 0;
        let end = run(&steps(), &Command::default(), &mut kernel, &mut || ready += 1).unwrap_err();
        assert!(matches!(end, Report::NotExecuted(_)), "{end:?}");
        assert_eq!(ready, 1);
        assert_eq!(
            kernel.acts,
            [
                "session",
                "die with parent",
                "loopback",
                "names localhost (none)",
                "private mounts",
                "bind /r /r",
                "read-only /r",
                "bind /s/x.drv.chroot/store /r/nix/store",
                "bind /s/in /r/nix/store/in",
                "read-only below /r/nix/store",
                "proc /r/proc",
                "shm /r/dev/shm",
                "pivot /r",
                "no new privileges",
                "filter",
                "scope",
                "personality false",
                "cd /build",
                "close",
                "limits",
                "ids 1000 100",
                "die with parent",
                "exec",
            ]
        );
    }

    #[test]
    fn a_failed_step_is_the_last() {
        for fail_at in ["bind", "proc", "pivot", "no new", "filter", "ids"] {
            let mut kernel = Recorder { fail_at: Some(fail_at), ..Recorder::default() };
            let mut ready = 0;
            let end = run(&steps(), &Command::default(), &mut kernel, &mut || ready += 1).unwrap_err();
            assert!(matches!(end, Report::Failed(_)), "{end:?}");
            assert!(kernel.acts.last().unwrap().starts_with(fail_at));
            assert_eq!(ready, 0);
        }
    }
}
