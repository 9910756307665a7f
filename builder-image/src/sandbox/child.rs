//! The helper process: this program again, with one thread, which clones the processes that become builders. It maps
//! their ids, waits for them, reports how they ended, and kills each as soon as this program lets go of its socket or says
//! so; when this program itself goes, so do all. Reports are lines; see [`Report`].
//!
//! It may not touch the store. It never reads what a sandbox is to do: the cloned process does that itself.

use std::io::{self, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{self, Pid, PidfdFlags, Signal, WaitOptions};

use super::birth;
use super::kernel::Parent as _;
use super::launch::{self, Report};
use super::linux;
use super::linux::Linux;
use super::linux_parent;
use super::plan::{Birth, Command, Isolation, Step};
use super::refusal::refusal;
use super::run::run;

/// Most bytes of a request, which is a few numbers and a path in JSON.
const MAX_REQUEST_LEN: usize = 16 << 10;

/// The helper's main function: its standard input is the socket that requests come by.
pub(crate) fn main() -> ExitCode {
    // Supplementary groups would be rights that builds keep. Each build says whether it may begin if they are still there.
    let groups = Linux.drop_groups();
    match serve(&groups) {
        Ok(()) => ExitCode::SUCCESS,
        // Nobody reads what this process writes, and its builds end with it and are reported as lost.
        Err(_) => ExitCode::FAILURE,
    }
}

/// A request: what to clone, and the two ends that the new process gets.
struct Request {
    birth: Birth,
    /// Whoever asks wants to know the process's pid before it does anything.
    attended: bool,
    control: UnixStream,
    terminal: OwnedFd,
}

/// A build's process.
struct Build {
    isolation: Isolation,
    pid: Pid,
    pidfd: OwnedFd,
    control: UnixStream,
    killed: bool,
    /// It was on its way out when it was killed, so that its end is not due to that.
    was_ending: bool,
}

/// Serves requests until there can be no more. What runs then dies with this process.
fn serve(groups: &io::Result<()>) -> io::Result<()> {
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
                build.was_ending = linux::is_ending(build.pid);
                build.kill()?;
                build.killed = true;
            }
            left.push(build);
        }
        builds = left;
        if requested {
            let Some(request) = receive(&requests)? else { return Ok(()) };
            let isolation = request.birth.isolation;
            match spawn(&request.birth, groups, &request.control, request.terminal) {
                Ok((pid, pidfd)) => {
                    if request.attended {
                        Report::Born(pid.as_raw_nonzero().get()).send(&request.control);
                    }
                    builds.push(Build {
                        isolation,
                        pid,
                        pidfd,
                        control: request.control,
                        killed: false,
                        was_ending: false,
                    });
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
    let (birth, attended) = serde_json::from_slice(bytes.get(..message.bytes).unwrap_or_default())?;
    let mut descriptors = descriptors.into_iter();
    match (descriptors.next(), descriptors.next()) {
        (Some(control), Some(terminal)) => {
            Ok(Some(Request { birth, attended, control: control.into(), terminal }))
        }
        _ => Err(io::Error::other("a request without its descriptors")),
    }
}

/// Makes the process that becomes a builder, and lets it go on once all is done that it cannot do for itself.
fn spawn(
    birth: &Birth,
    groups: &io::Result<()>,
    control: &UnixStream,
    terminal: OwnedFd,
) -> Result<(Pid, OwnedFd), String> {
    let text = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| format!("cannot {what}: {error}")
    };
    let (go_reader, go_writer) = io::pipe().map_err(text("make a pipe"))?;
    let Some(child) = birth::clone(birth, groups, &mut Linux)? else {
        become_builder(control, &terminal, go_reader);
    };
    // The terminal must end when the build's processes do, so this process lets go of it.
    drop((terminal, go_reader));
    let pidfd = process::pidfd_open(child, PidfdFlags::empty())
        .map_err(|errno| text("watch the builder's process")(errno.into()));
    let prepared = pidfd.and_then(|pidfd| birth::prepare(birth, child, &mut Linux).map(|()| pidfd));
    match prepared {
        Ok(pidfd) => {
            let _gone = (&go_writer).write_all(b"g");
            Ok((child, pidfd))
        }
        Err(why) => {
            // It has not been told to go on, and is nobody else's child: the pid is its own.
            let _gone = process::kill_process(child, Signal::KILL);
            let _reaped = process::waitpid(Some(child), WaitOptions::empty());
            Err(why)
        }
    }
}

impl Build {
    fn kill(&self) -> io::Result<()> {
        match self.isolation {
            // Whoever made a user namespace may kill in it, with it all.
            Isolation::Nested(_) | Isolation::Trial => {
                Ok(process::pidfd_send_signal(&self.pidfd, Signal::KILL)?)
            }
            // Of foreign ids only who has them may.
            Isolation::Uid(uid) => linux_parent::kill_as(uid),
        }
    }

    /// Reports the end of a process that has ended.
    fn reap(self) {
        // Process 1 of a namespace: once it is reaped, the kernel has killed and reaped everything in there.
        let status = rustix::io::retry_on_intr(|| process::waitpid(Some(self.pid), WaitOptions::empty()));
        let status = status.ok().flatten();
        if let Isolation::Uid(uid) = self.isolation
            && let Err(error) = Linux.kill_all_of(uid)
        {
            let act = birth::Act::KillAllOf { uid };
            return Report::Failed(refusal(&act.act(), &error, act.advice())).send(&self.control);
        }
        let report = match status.map(|(_, status)| (status.exit_status(), status.terminating_signal())) {
            Some((Some(code), _)) => Report::Exited(code),
            Some((_, Some(libc::SIGKILL))) if self.killed && !self.was_ending => Report::Killed,
            Some((_, Some(signal))) => Report::Signalled(signal),
            _ => Report::Failed("the builder ended in an unknown way".into()),
        };
        report.send(&self.control);
    }
}

/// Runs in the cloned process and does not return.
#[allow(unsafe_code)]
fn become_builder(control: &UnixStream, terminal: &OwnedFd, go: io::PipeReader) -> ! {
    let code = match prepare(control, terminal, go) {
        Ok((steps, command)) => {
            match run(&steps, &command, &mut Linux, &mut || Report::Ready.send(control)) {
                Ok(code) => code,
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
