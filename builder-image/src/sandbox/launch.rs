//! This program's end of a sandbox: makes the terminal that carries the log, asks the helper process for a sandbox, sends
//! the plan into it and reads its reports. It waits for nothing; who supervises does.
//!
//! There is one helper for all builds, started with the first: a program that starts anew is loaded and linked anew,
//! which takes longer than all of the rest of a sandbox.

use std::ffi::CString;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command as Process, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, WaitOptions, waitpid};
use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::linux::dead_child;
use super::plan::{Command, Plan, Program, Step};
use crate::builtin::Job;

/// The word that makes this program the helper.
pub(crate) const HELPER_COMMAND: &str = "sandbox-child";
/// Most bytes of each part of a plan. The kernel takes far less for arguments and environment.
const MAX_PART_LEN: u32 = 64 << 20;
/// The part of a plan that says of what kind its command is.
const PROGRAM: &[u8] = b"program";
const BUILTIN: &[u8] = b"builtin";
/// How long the helper may take to clone a process, which takes a millisecond.
const CLONE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of one report.
const MAX_REPORT_LEN: usize = 16 << 10;

/// What the helper says, a line each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Report {
    /// The pid of the process that becomes the builder, for who asked ([`start_attended`]).
    Born(i32),
    /// The sandbox is complete; the builder is executed next.
    Ready,
    /// It is complete, but the builder could not be executed. Says why.
    NotExecuted(String),
    /// It could not be set up. Says why.
    Failed(String),
    Exited(i32),
    /// By a signal that this program has not sent.
    Signalled(i32),
    /// By ours.
    Killed,
    /// The helper is gone, and the build with it. Nothing else is known.
    Lost,
}

impl Report {
    pub(crate) fn send(&self, mut control: &UnixStream) {
        // Without a reader there is nobody to tell, and the end of the socket ends the build.
        let _no_reader = control.write_all(self.line().as_bytes());
    }

    fn line(&self) -> String {
        match self {
            Self::Born(pid) => format!("born {pid}\n"),
            Self::Ready => "ready\n".to_owned(),
            Self::NotExecuted(why) => format!("not-executed {}\n", why.replace('\n', " ")),
            Self::Failed(why) => format!("failed {}\n", why.replace('\n', " ")),
            Self::Exited(code) => format!("exited {code}\n"),
            Self::Signalled(signal) => format!("signalled {signal}\n"),
            Self::Killed => "killed\n".to_owned(),
            Self::Lost => "lost\n".to_owned(),
        }
    }

    fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        Some(match word {
            "born" => Self::Born(rest.parse().ok()?),
            "ready" => Self::Ready,
            "not-executed" => Self::NotExecuted(rest.to_owned()),
            "failed" => Self::Failed(rest.to_owned()),
            "exited" => Self::Exited(rest.parse().ok()?),
            "signalled" => Self::Signalled(rest.parse().ok()?),
            "killed" => Self::Killed,
            "lost" => Self::Lost,
            _ => return None,
        })
    }
}

/// A sandbox with its build. Dropping it kills the build and waits for it to be gone.
pub(crate) struct Running {
    control: UnixStream,
    terminal: OwnedFd,
    /// What was read of reports and not given out.
    pending: Vec<u8>,
}

/// The helper process.
struct Helper {
    process: Child,
    /// Requests for sandboxes, a message each. The helper ends when this does.
    requests: OwnedFd,
}

static HELPER: Mutex<Option<Helper>> = Mutex::new(None);

/// Reaps every dead child but the helper. Process 1 of a container inherits them.
pub(crate) fn reap_orphans() {
    // Held, so that what has the helper's pid is the helper.
    let helper = helper();
    while let Some(pid) = dead_child() {
        let pid_number = pid.as_raw_nonzero().get().unsigned_abs();
        if helper.as_ref().is_some_and(|helper| helper.process.id() == pid_number) {
            // Whoever asks it for a sandbox next reaps it and starts another.
            return;
        }
        let _reaped = waitpid(Some(pid), WaitOptions::NOHANG);
    }
}

/// Ends the helper, and with it everything that still runs. For the end of this program.
pub(crate) fn shut_down() {
    if let Some(running) = helper().take() {
        running.end();
    }
}

/// Starts a sandbox by `plan`. `owner` is who the terminal belongs to, if not the caller.
pub(crate) fn start(plan: &Plan, owner: Option<(u32, u32)>) -> io::Result<Running> {
    let running = clone(plan, owner, false)?;
    go(plan, running)
}

/// The same, but before its first step `attend` is called with the process's pid. It is there for so long, unless it is
/// killed, and is in its namespaces. If that fails, the process never takes a step.
pub(crate) fn start_attended(
    plan: &Plan,
    owner: Option<(u32, u32)>,
    attend: &mut dyn FnMut(Pid) -> io::Result<()>,
) -> io::Result<Running> {
    let mut running = clone(plan, owner, true)?;
    running.control.set_read_timeout(Some(CLONE_TIMEOUT))?;
    let report = running.report()?;
    running.control.set_read_timeout(None)?;
    match report {
        Some(Report::Born(pid)) => {
            let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::other("a process without a pid"))?;
            attend(pid)?;
        }
        // For who supervises.
        Some(failed) => running.pending = failed.line().into_bytes(),
        None => {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the sandbox's helper process does not answer",
            ));
        }
    }
    go(plan, running)
}

fn clone(plan: &Plan, owner: Option<(u32, u32)>, attended: bool) -> io::Result<Running> {
    let (terminal, peer) = terminal(owner)?;
    let (control, theirs) = UnixStream::pair()?;
    request(&serde_json::to_vec(&(&plan.birth, attended))?, &theirs.into(), &peer)?;
    Ok(Running { control, terminal, pending: Vec::new() })
}

/// Tells a process what to do.
fn go(plan: &Plan, running: Running) -> io::Result<Running> {
    match send(&running.control, plan) {
        // The helper could not clone, and its report says why.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        other => other?,
    }
    running.control.set_nonblocking(true)?;
    Ok(running)
}

/// Hands the helper a sandbox's ends of the socket and of the terminal. A helper that has died is replaced.
fn request(message: &[u8], control: &OwnedFd, terminal: &OwnedFd) -> io::Result<()> {
    let mut helper = helper();
    for _ in 0..2 {
        let current = match helper.take() {
            Some(running) => running,
            None => Helper::start()?,
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut descriptors = SendAncillaryBuffer::new(&mut space);
        let passed = [control.as_fd(), terminal.as_fd()];
        descriptors.push(SendAncillaryMessage::ScmRights(&passed));
        let message = [IoSlice::new(message)];
        match rustix::net::sendmsg(&current.requests, &message, &mut descriptors, SendFlags::NOSIGNAL) {
            Ok(_) => {
                *helper = Some(current);
                return Ok(());
            }
            // Its builds have died with it and say so themselves.
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => current.end(),
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(io::Error::other("the sandbox's helper process dies as soon as it is started"))
}

fn helper() -> MutexGuard<'static, Option<Helper>> {
    // Whole between any two statements.
    HELPER.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Helper {
    fn start() -> io::Result<Self> {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let process = Process::new("/proc/self/exe")
            .arg(HELPER_COMMAND)
            .env_clear()
            .stdin(Stdio::from(theirs))
            // Nothing of ours stays open in it: who reads our output waits for its end.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self { process, requests: ours })
    }

    fn end(mut self) {
        drop(self.requests);
        let _reaped = self.process.wait();
    }
}

impl Running {
    /// Readable when the build writes; its reads end (EIO, or 0) when all of its processes have closed it.
    pub(crate) fn terminal(&self) -> &OwnedFd {
        &self.terminal
    }

    /// Readable when there are reports.
    pub(crate) fn control(&self) -> &UnixStream {
        &self.control
    }

    /// The next report, or None if there is none yet.
    pub(crate) fn report(&mut self) -> io::Result<Option<Report>> {
        let mut chunk = [0; 256];
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                let line = String::from_utf8_lossy(line.trim_ascii_end()).into_owned();
                return Report::parse(&line).map(Some).ok_or_else(|| {
                    io::Error::other(format!("unknown report {line:?} from the sandbox's helper"))
                });
            }
            match self.control.read(&mut chunk) {
                Ok(0) => return Ok(Some(Report::Lost)),
                Ok(_) if self.pending.len() >= MAX_REPORT_LEN => {}
                Ok(count) => self.pending.extend(chunk.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // The helper ended with words of ours unread.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(Some(Report::Lost));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Has the build killed, all of it. The helper then reports how it ended.
    pub(crate) fn kill(&self) {
        let _already_gone = self.control.shutdown(Shutdown::Write);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        // The helper lets go of its end when it has reaped the build.
        let _ended =
            self.control.set_nonblocking(false).and_then(|()| io::copy(&mut self.control, &mut io::sink()));
    }
}

/// Reads what [`start`] sent into the sandbox: what to do there.
pub(crate) fn receive(mut control: &UnixStream) -> io::Result<(Vec<Step>, Command)> {
    let mut part = || {
        let mut len = [0; 4];
        control.read_exact(&mut len)?;
        let len = u32::from_le_bytes(len);
        if len > MAX_PART_LEN {
            return Err(io::Error::other("the plan is too long"));
        }
        let mut bytes = vec![0; len as usize];
        control.read_exact(&mut bytes)?;
        Ok(bytes)
    };
    let steps = serde_json::from_slice(&part()?)?;
    let kind = part()?;
    let command = match kind.as_slice() {
        PROGRAM => {
            let mut argv = strings(&part()?)?;
            if argv.is_empty() {
                return Err(io::Error::other("the plan has no program"));
            }
            let program = argv.remove(0);
            Command::Program(Program { program, argv, env: strings(&part()?)? })
        }
        BUILTIN => {
            let (job, attributes, netrc) = (part()?, strings(&part()?)?, part()?);
            let job: Job = serde_json::from_slice(&job)?;
            Command::Builtin(Job { attributes, netrc, certificates: part()?, ..job })
        }
        _ => return Err(io::Error::other("the plan is of no known kind")),
    };
    Ok((steps, command))
}

fn send(mut control: &UnixStream, plan: &Plan) -> io::Result<()> {
    let block = |strings: &mut dyn Iterator<Item = &CString>| {
        strings.flat_map(|s| s.as_bytes_with_nul()).copied().collect::<Vec<u8>>()
    };
    let mut parts = vec![serde_json::to_vec(&plan.steps)?];
    match &plan.command {
        Command::Program(program) => parts.extend([
            PROGRAM.to_vec(),
            block(&mut std::iter::once(&program.program).chain(&program.argv)),
            block(&mut program.env.iter()),
        ]),
        Command::Builtin(job) => parts.extend([
            BUILTIN.to_vec(),
            serde_json::to_vec(job)?,
            block(&mut job.attributes.iter()),
            job.netrc.clone(),
            job.certificates.clone(),
        ]),
    }
    let mut message = Vec::new();
    for part in parts {
        let len = u32::try_from(part.len()).ok().filter(|len| *len <= MAX_PART_LEN);
        let len =
            len.ok_or_else(|| io::Error::other("the derivation's arguments and environment are too long"))?;
        message.extend(len.to_le_bytes());
        message.extend(part);
    }
    control.write_all(&message)
}

/// Splits a block of strings that each end in NUL.
fn strings(block: &[u8]) -> io::Result<Vec<CString>> {
    block
        .split_inclusive(|byte| *byte == 0)
        .map(|string| CString::from_vec_with_nul(string.to_vec()).map_err(io::Error::other))
        .collect()
}

/// A pseudo-terminal in raw mode: our end, and the build's.
fn terminal(owner: Option<(u32, u32)>) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&ours)?;
    let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
    let (uid, gid) = owner.map_or((None, None), |(uid, gid)| (Some(uid), Some(gid)));
    std::os::unix::fs::fchown(&theirs, uid, gid)?;
    rustix::fs::fchmod(&theirs, rustix::fs::Mode::from_raw_mode(0o600))?;
    let mut mode = tcgetattr(&theirs)?;
    mode.make_raw();
    tcsetattr(&theirs, OptionalActions::Now, &mode)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::plan::{Birth, Isolation};

    #[test]
    fn plans_arrive_as_they_were() {
        let strings = |list: &[&str]| list.iter().map(|s| CString::new(*s).unwrap()).collect::<Vec<_>>();
        let program = Program {
            program: c"/bin/sh".into(),
            argv: strings(&["sh", "", "a b"]),
            env: vec![CString::new(*b"X=\xff").unwrap(), c"EMPTY=".into()],
        };
        let job = Job {
            name: "fetchurl".into(),
            attributes: vec![CString::new(*b"url=\xff").unwrap()],
            outputs: [("out".into(), "/o".into())].into(),
            may_fetch: true,
            mirrored: Some("sha256/00".into()),
            mirrors: vec!["http://m".into()],
            proxies: [("http_proxy".into(), "p".into())].into(),
            netrc: b"machine \0".to_vec(),
            certificates: b"c".to_vec(),
        };
        let steps = vec![Step::Session, Step::Bind { source: "/a".into(), target: "/b".into() }, Step::Exec];
        for command in [Command::Program(program), Command::Builtin(job)] {
            let birth = Birth { isolation: Isolation::Uid(1), foreign_ids: true, group: None };
            let plan = Plan { birth, steps: steps.clone(), command };
            let (ours, theirs) = UnixStream::pair().unwrap();
            send(&ours, &plan).unwrap();
            assert_eq!(receive(&theirs).unwrap(), (plan.steps, plan.command));
        }
    }

    #[test]
    fn absurd_lengths_are_refused() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(receive(&theirs).unwrap_err().to_string().contains("too long"));
    }

    #[test]
    fn reports_survive_the_line() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let reports = [
            Report::Born(7),
            Report::Ready,
            Report::Failed("a b".into()),
            Report::NotExecuted("c".into()),
            Report::Exited(3),
            Report::Signalled(9),
            Report::Killed,
            Report::Lost,
        ];
        for report in &reports {
            report.send(&ours);
        }
        drop(ours);
        let mut text = String::new();
        (&theirs).read_to_string(&mut text).unwrap();
        let parsed: Vec<_> = text.lines().map(|line| Report::parse(line).unwrap()).collect();
        assert_eq!(parsed, reports);
    }
}
