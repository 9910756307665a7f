//! The parent's end of a sandbox: makes the terminal that carries the log, starts the helper, sends it the plan and
//! reads its reports. It waits for nothing; who supervises does.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command as Process, Stdio};
use std::sync::{Mutex, PoisonError};

use rustix::process::{WaitOptions, waitpid};
use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::linux::dead_child;
use super::plan::{Command, Plan};

/// The word that makes this program the helper.
pub(crate) const HELPER_COMMAND: &str = "sandbox-child";
/// Most bytes of each of a plan's three parts. The kernel takes far less for arguments and environment.
const MAX_PART_LEN: u32 = 64 << 20;
/// Most bytes of one report.
const MAX_REPORT_LEN: usize = 16 << 10;

/// What the helper says, a line each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Report {
    /// The sandbox is complete; the builder is executed next.
    Ready,
    /// It is complete, but the builder could not be executed. Says why.
    NotExecuted(String),
    /// It could not be set up. Says why.
    Failed(String),
    Exited(i32),
    Signalled(i32),
}

impl Report {
    pub(crate) fn send(&self, mut control: &UnixStream) {
        let line = match self {
            Self::Ready => "ready\n".to_owned(),
            Self::NotExecuted(why) => format!("not-executed {}\n", why.replace('\n', " ")),
            Self::Failed(why) => format!("failed {}\n", why.replace('\n', " ")),
            Self::Exited(code) => format!("exited {code}\n"),
            Self::Signalled(signal) => format!("signalled {signal}\n"),
        };
        // Without a reader there is nobody to tell, and the end of the socket ends the build.
        let _no_reader = control.write_all(line.as_bytes());
    }

    fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        Some(match word {
            "ready" => Self::Ready,
            "not-executed" => Self::NotExecuted(rest.to_owned()),
            "failed" => Self::Failed(rest.to_owned()),
            "exited" => Self::Exited(rest.parse().ok()?),
            "signalled" => Self::Signalled(rest.parse().ok()?),
            _ => return None,
        })
    }
}

/// A sandbox with its build. Dropping it kills the build and waits for it to be gone.
pub(crate) struct Running {
    helper: Child,
    control: UnixStream,
    terminal: OwnedFd,
    line: Vec<u8>,
}

/// Helpers that have not been reaped, by pid: whoever reaps orphans leaves them alone.
static HELPERS: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// Reaps every dead child that is no helper. Process 1 of a container inherits them.
pub(crate) fn reap_orphans() {
    // Held across starting and reaping helpers, so that what is not in the set is nobody's.
    let helpers = HELPERS.lock().unwrap_or_else(PoisonError::into_inner);
    while let Some(pid) = dead_child() {
        if helpers.contains(&pid.as_raw_nonzero().get().unsigned_abs()) {
            // Its own thread is about to.
            return;
        }
        let _reaped = waitpid(Some(pid), WaitOptions::NOHANG);
    }
}

/// Starts the helper with `plan`. `owner` is who the terminal belongs to, if not the caller.
pub(crate) fn start(plan: &Plan, owner: Option<(u32, u32)>) -> io::Result<Running> {
    let (terminal, peer) = terminal(owner)?;
    let (control, theirs) = UnixStream::pair()?;
    let mut helpers = HELPERS.lock().unwrap_or_else(PoisonError::into_inner);
    let helper = Process::new("/proc/self/exe")
        .arg(HELPER_COMMAND)
        .env_clear()
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::from(peer.try_clone()?))
        .stderr(Stdio::from(peer))
        .spawn()?;
    helpers.insert(helper.id());
    drop(helpers);
    let running = Running { helper, control, terminal, line: Vec::new() };
    send(&running.control, plan)?;
    running.control.set_nonblocking(true)?;
    Ok(running)
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

    /// The next report, or None if there is none yet. A helper that is gone without a word has failed.
    pub(crate) fn report(&mut self) -> io::Result<Option<Report>> {
        let mut byte = [0];
        loop {
            match self.control.read(&mut byte) {
                Ok(0) => return Ok(Some(Report::Failed("the sandbox's helper process died".into()))),
                Ok(_) if byte[0] == b'\n' => {
                    let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
                    return Report::parse(&line).map(Some).ok_or_else(|| {
                        io::Error::other(format!("unknown report {line:?} from the sandbox's helper"))
                    });
                }
                Ok(_) if self.line.len() >= MAX_REPORT_LEN => {}
                Ok(_) => self.line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                // The helper ended with words of ours unread.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(Some(Report::Failed("the sandbox's helper process died".into())));
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
        let _reaped = self.helper.wait();
        // Between the two lines the pid may have been given to an orphan, which then waits for the next round.
        HELPERS.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.helper.id());
    }
}

/// Reads what [`start`] sent.
pub(crate) fn receive(mut control: &UnixStream) -> io::Result<Plan> {
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
    let mut plan: Plan = serde_json::from_slice(&part()?)?;
    let mut argv = strings(&part()?)?;
    if argv.is_empty() {
        return Err(io::Error::other("the plan has no program"));
    }
    let program = argv.remove(0);
    plan.command = Command { program, argv, env: strings(&part()?)? };
    Ok(plan)
}

fn send(mut control: &UnixStream, plan: &Plan) -> io::Result<()> {
    let block = |strings: &mut dyn Iterator<Item = &CString>| {
        strings.flat_map(|s| s.as_bytes_with_nul()).copied().collect::<Vec<u8>>()
    };
    let command = &plan.command;
    let parts = [
        serde_json::to_vec(plan)?,
        block(&mut std::iter::once(&command.program).chain(&command.argv)),
        block(&mut command.env.iter()),
    ];
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
    use crate::sandbox::plan::{IdMap, Step};

    #[test]
    fn plans_arrive_as_they_were() {
        let strings = |list: &[&str]| list.iter().map(|s| CString::new(*s).unwrap()).collect::<Vec<_>>();
        let command = Command {
            program: c"/bin/sh".into(),
            argv: strings(&["sh", "", "a b"]),
            env: vec![CString::new(*b"X=\xff").unwrap(), c"EMPTY=".into()],
        };
        let id = IdMap { inside: 1000, outside: 0 };
        let steps = vec![Step::Session, Step::Bind { source: "/a".into(), target: "/b".into() }, Step::Exec];
        let plan = Plan { steps, private_network: true, uid: id, gid: id, command };
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(&ours, &plan).unwrap();
        assert_eq!(receive(&theirs).unwrap(), plan);
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
            Report::Ready,
            Report::Failed("a b".into()),
            Report::NotExecuted("c".into()),
            Report::Exited(3),
            Report::Signalled(9),
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
