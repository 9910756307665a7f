//! The helper process: this program again, with one thread, started for one build. It reads a plan, clones the
//! process that becomes the builder, maps its ids, waits for it, and kills it when the other end of the socket goes
//! away or says so. Its reports are lines; see [`Report`].
//!
//! It may not touch the store and reads nothing but its plan.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{self, Pid, PidfdFlags, Signal, WaitOptions};

use super::kernel::Kernel;
use super::launch::{self, Report};
use super::linux::Linux;
use super::plan::{IdMap, Plan, Step};

/// The helper's main function: its standard input is the socket, its standard output the build's terminal.
pub(crate) fn main() -> ExitCode {
    let control = match rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3) {
        Ok(fd) => UnixStream::from(fd),
        Err(error) => {
            eprintln!("drover-builder: sandbox-child is started by drover-builder itself: {error}");
            return ExitCode::from(2);
        }
    };
    match supervise(&control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            Report::Failed(why).send(&control);
            ExitCode::FAILURE
        }
    }
}

/// Takes the steps in order and stops at the first that fails, which the error names. Otherwise returns only after
/// [`Step::Exit`].
pub(crate) fn run(plan: &Plan, kernel: &mut dyn Kernel, before_exec: &mut dyn FnMut()) -> Result<(), Report> {
    for step in &plan.steps {
        let result = match step {
            Step::Session => kernel.session(),
            Step::DieWithParent => kernel.die_with_parent(),
            Step::Loopback => kernel.loopback(),
            Step::HostNames { host, domain } => kernel.host_names(host, domain),
            Step::PrivateMounts => kernel.private_mounts(),
            Step::Bind { source, target } => kernel.bind(source, target),
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
                let error = kernel.exec(&plan.command);
                let program = plan.command.program.to_string_lossy();
                return Err(Report::NotExecuted(format!("cannot execute {program}: {error}")));
            }
        };
        result
            .map_err(|error| Report::Failed(format!("cannot set up the sandbox: step {step:?}: {error}")))?;
    }
    Ok(())
}

fn supervise(control: &UnixStream) -> Result<(), String> {
    let text = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| format!("cannot {what}: {error}")
    };
    let plan = launch::receive(control).map_err(text("read the sandbox's plan"))?;
    // Supplementary groups would be rights that the build keeps. An ordinary user may not drop them (Nix tolerates it too).
    let _ordinary_user = rustix::thread::set_thread_groups(&[]);
    let (mut go_reader, go_writer) = io::pipe().map_err(text("make a pipe"))?;
    let child = clone(&plan).map_err(text("clone the builder's process into namespaces of its own"))?;
    let Some(child) = child else {
        drop(go_writer);
        become_builder(&plan, control, &mut go_reader);
    };
    drop(go_reader);
    let pidfd =
        process::pidfd_open(child, PidfdFlags::empty()).map_err(|e| text("watch the builder")(e.into()))?;
    if let Err(error) = map_ids(child, &plan) {
        let _gone = process::pidfd_send_signal(&pidfd, Signal::KILL);
        return Err(format!("cannot map the ids of the builder's user namespace: {error}"));
    }
    // The terminal must end when the build's processes do, so this process lets go of it.
    release_terminal().map_err(text("open /dev/null"))?;
    let _gone = (&go_writer).write_all(b"g");
    drop(go_writer);
    wait(control, &pidfd, child).map_err(text("wait for the builder"))
}

/// Ends with the build, or ends the build as soon as the socket says or has anything.
fn wait(control: &UnixStream, pidfd: &OwnedFd, child: Pid) -> io::Result<()> {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN), PollFd::new(control, PollFlags::IN)];
    loop {
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        if !fds[0].revents().is_empty() {
            break;
        }
        if !fds[1].revents().is_empty() {
            process::pidfd_send_signal(pidfd, Signal::KILL)?;
            break;
        }
    }
    // It is process 1 of its namespace: once it is reaped, the kernel has killed and reaped everything in there.
    let status = loop {
        match process::waitpid(Some(child), WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let status = status.map(|(_, status)| (status.exit_status(), status.terminating_signal()));
    match status {
        Some((Some(code), _)) => Report::Exited(code).send(control),
        Some((_, Some(signal))) => Report::Signalled(signal).send(control),
        _ => Report::Failed("the builder ended in an unknown way".into()).send(control),
    }
    Ok(())
}

/// Runs in the cloned process and does not return.
#[allow(unsafe_code)]
fn become_builder(plan: &Plan, control: &UnixStream, go: &mut io::PipeReader) -> ! {
    let mut byte = [0];
    let code = match go.read(&mut byte) {
        Ok(1) => match run(plan, &mut Linux, &mut || Report::Ready.send(control)) {
            Ok(()) => 0,
            Err(report) => {
                report.send(control);
                1
            }
        },
        // The parent is gone or failed, and reports itself.
        _ => 1,
    };
    // SAFETY: ends this process without running destructors that belong to the process it was cloned from.
    unsafe { libc::_exit(code) }
}

/// Like fork, into new namespaces. None in the child.
#[allow(unsafe_code)]
fn clone(plan: &Plan) -> io::Result<Option<Pid>> {
    let mut flags = libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::SIGCHLD;
    if plan.private_network {
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

fn map_ids(child: Pid, plan: &Plan) -> io::Result<()> {
    let dir = format!("/proc/{}", child.as_raw_nonzero());
    let line = |map: IdMap| format!("{} {} 1", map.inside, map.outside);
    let write = |name: &str, text: &str| {
        let file = File::options().write(true).open(format!("{dir}/{name}"));
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|error| io::Error::new(error.kind(), format!("{name} {text:?}: {error}")))
    };
    write("uid_map", &line(plan.uid))?;
    // With it a build could leave groups, and so gain what a group is denied; required of ordinary users.
    write("setgroups", "deny")?;
    write("gid_map", &line(plan.gid))
}

fn release_terminal() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(null.as_fd())?;
    rustix::stdio::dup2_stderr(null.as_fd())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::sandbox::plan::{Command, Layout, build_steps};

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

    fn plan() -> Plan {
        let layout = Layout {
            root: "/r".into(),
            store_dir: "/nix/store".into(),
            binds: vec![("/s/in".into(), "/r/nix/store/in".into())],
            build_dir: "/build".into(),
            private_network: true,
            linux32: false,
            shm: true,
        };
        let id = IdMap { inside: 1000, outside: 30001 };
        let steps = build_steps(&layout);
        Plan { steps, private_network: true, uid: id, gid: id, command: Command::default() }
    }

    #[test]
    fn acts_in_the_order_of_nix() {
        let mut kernel = Recorder::default();
        let mut ready = 0;
        let end = run(&plan(), &mut kernel, &mut || ready += 1).unwrap_err();
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
                "bind /r/nix/store /r/nix/store",
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
            let end = run(&plan(), &mut kernel, &mut || ready += 1).unwrap_err();
            assert!(matches!(end, Report::Failed(_)), "{end:?}");
            assert!(kernel.acts.last().unwrap().starts_with(fail_at));
            assert_eq!(ready, 0);
        }
    }
}
