//! The network of builds that may fetch: a namespace of their own, which a user-mode network stack connects (pasta, of the
//! passt project); the network of this program; or none.
//!
//! In a namespace of its own a build reaches what this machine reaches, but not this machine's loopback addresses, and no
//! abstract socket of another build (CVE-2024-27297, CVE-2025-46416). It knows no derivations and starts no builds.

use std::fmt;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::sandbox::linux;

/// How long pasta may take to set up an interface. It takes some hundredths of a second.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of what it says that are repeated when it fails.
const MAX_WORDS: usize = 2 << 10;
/// Where builds ask for names if the machine's own name server listens on a loopback address. Link-local, so nobody's.
const FORWARDED_DNS: &str = "169.254.1.53";

/// What the command line says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Choice {
    /// Pasta where it works, else this program's network.
    #[default]
    Auto,
    Pasta,
    Host,
    None,
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "pasta" => Ok(Self::Pasta),
            "host" => Ok(Self::Host),
            "none" => Ok(Self::None),
            _ => Err(format!("{text:?} is neither auto, pasta, host nor none")),
        }
    }
}

/// What builds that may fetch get.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Network {
    /// By this program.
    Pasta(PathBuf),
    /// This program's own. Says why not pasta, if that was not asked for.
    Host(Option<String>),
    None,
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pasta(_) => f.write_str("pasta"),
            Self::Host(None) => f.write_str("host"),
            Self::Host(Some(why)) => write!(f, "host ({why})"),
            Self::None => f.write_str("none"),
        }
    }
}

/// What was found, once it was looked for.
#[derive(Clone, Default)]
pub(crate) struct Found(Arc<OnceLock<Result<Network, String>>>);

impl Found {
    /// Decides, the first time. `attempt` tries whether this program can connect a namespace.
    pub(crate) fn get(
        &self,
        choice: Choice,
        attempt: &dyn Fn(&Path) -> Result<(), String>,
    ) -> Result<Network, String> {
        self.0.get_or_init(|| find(choice, &|| usable(attempt))).clone()
    }
}

fn find(choice: Choice, pasta: &dyn Fn() -> Result<PathBuf, String>) -> Result<Network, String> {
    match choice {
        Choice::Host => Ok(Network::Host(None)),
        Choice::None => Ok(Network::None),
        Choice::Auto => Ok(pasta().map_or_else(|why| Network::Host(Some(why)), Network::Pasta)),
        Choice::Pasta => pasta().map(Network::Pasta),
    }
}

/// Pasta, if it is here and works.
fn usable(attempt: &dyn Fn(&Path) -> Result<(), String>) -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let program = std::env::split_paths(&path)
        .map(|dir| dir.join("pasta"))
        .find(|file| file.is_file())
        .ok_or("there is no program `pasta`, which the package passt has")?;
    let tun = Path::new("/dev/net/tun");
    if let Err(error) = std::fs::File::options().read(true).write(true).open(tun) {
        return Err(format!("pasta needs {}: {error}", tun.display()));
    }
    attempt(&program).map(|()| program)
}

/// The `resolv.conf` of builds in a namespace of their own, if the machine's own would not do there: a name server on a
/// loopback address is not theirs.
pub(crate) fn resolv_conf() -> Option<String> {
    rewritten(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
}

fn rewritten(text: &str) -> Option<String> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next().unwrap_or_default().to_owned())
    };
    let is_loopback = |address: String| {
        // IPv6 addresses may name an interface behind a percent sign.
        let address = address.split('%').next().unwrap_or_default().parse::<std::net::IpAddr>();
        address.is_ok_and(|address| address.is_loopback())
    };
    let mut servers = text.lines().filter_map(server).peekable();
    // Without any the C library asks this machine.
    if servers.peek().is_some() && !servers.any(is_loopback) {
        return None;
    }
    let rest = text.lines().filter(|line| server(line).is_none());
    let lines = [format!("nameserver {FORWARDED_DNS}")].into_iter().chain(rest.map(str::to_owned));
    Some(lines.map(|line| line + "\n").collect())
}

/// A namespace's connection. It ends with this value, and with the thread that made it.
pub(crate) struct Connection {
    process: Child,
    pidfd: rustix::fd::OwnedFd,
}

impl Connection {
    /// Connects the network namespace of the process `pid`, whose user namespace must be the caller's to enter. Returns when
    /// there is an interface with its addresses and routes. `dir` is a directory that only the caller can write to.
    pub(crate) fn new(program: &Path, pid: Pid, dir: &Path) -> io::Result<Self> {
        let files =
            Files { ready: dir.join("pasta.pid"), words: dir.join("pasta.err"), log: dir.join("pasta.log") };
        let result = Self::start(program, pid, &files);
        for file in [&files.ready, &files.words, &files.log] {
            let _never_made = std::fs::remove_file(file);
        }
        result
    }

    fn start(program: &Path, pid: Pid, files: &Files) -> io::Result<Self> {
        // It writes its pid when it is ready, into a pipe with a name: that can be waited for.
        rustix::fs::mknodat(CWD, &files.ready, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let ready = rustix::fs::open(&files.ready, flags, Mode::empty())?;
        let words = std::fs::File::create_new(&files.words)?;
        let mut command = Command::new(program);
        command.env_clear().stdin(Stdio::null()).stdout(words.try_clone()?).stderr(words);
        command.args(arguments(rustix::process::geteuid().is_root(), resolv_conf().is_some()));
        command.arg("--pid").arg(&files.ready).arg("--log-file").arg(&files.log);
        command.arg(pid.as_raw_nonzero().to_string());
        linux::die_with_caller(&mut command);
        let mut process = command.spawn()?;
        let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw);
        let pidfd = pid.ok_or(rustix::io::Errno::SRCH).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
        let pidfd = match pidfd {
            Ok(pidfd) => pidfd,
            Err(errno) => {
                let _gone = process.kill();
                let _reaped = process.wait();
                return Err(errno.into());
            }
        };
        let connection = Self { process, pidfd };
        if connection.wait(&ready)? {
            return Ok(connection);
        }
        drop(connection);
        Err(io::Error::other(format!("pasta does not start: {}", files.said())))
    }

    /// Waits until it is ready, or has ended or taken too long: false.
    fn wait(&self, ready: &rustix::fd::OwnedFd) -> io::Result<bool> {
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()));
            let left = left.map_err(io::Error::other)?;
            let mut fds = [PollFd::new(ready, PollFlags::IN), PollFd::new(&self.pidfd, PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(fds[0].revents().contains(PollFlags::IN)),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // By what cannot be another process by now: process 1 of a container reaps everything that ends.
        let _gone = pidfd_send_signal(self.pidfd.as_fd(), Signal::KILL);
        let _ended = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], None);
        let _reaped_by_whom_ever = self.process.wait();
    }
}

struct Files {
    ready: PathBuf,
    words: PathBuf,
    log: PathBuf,
}

impl Files {
    /// What it said, in one line.
    fn said(&self) -> String {
        let read = |path| std::fs::read(path).unwrap_or_default();
        let text = [read(&self.words), read(&self.log)].concat();
        let text = String::from_utf8_lossy(&text[..text.len().min(MAX_WORDS)]).into_owned();
        text.lines().filter(|line| !line.starts_with("Failed to send")).collect::<Vec<_>>().join("; ")
    }
}

/// All but the files and the process.
fn arguments(root: bool, forward_dns: bool) -> Vec<&'static str> {
    let mut arguments = vec!["--foreground", "--quiet", "--config-net"];
    // Nothing comes in, and this machine's loopback is not to be had, under the gateway's address neither.
    arguments.extend(["--no-map-gw", "-t", "none", "-u", "none", "-T", "none", "-U", "none"]);
    if root {
        // Any other user may not enter the build's namespaces. It gives up all rights but those that it has in there.
        arguments.extend(["--runas", "0:0"]);
    }
    if forward_dns {
        arguments.extend(["--dns-forward", FORWARDED_DNS]);
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_chosen() {
        let works = || Ok(PathBuf::from("/bin/pasta"));
        let fails = || Err("no tun".to_owned());
        let pasta = Ok(Network::Pasta("/bin/pasta".into()));
        for (choice, with, without) in [
            (Choice::Auto, pasta.clone(), Ok(Network::Host(Some("no tun".into())))),
            (Choice::Pasta, pasta, Err("no tun".into())),
            (Choice::Host, Ok(Network::Host(None)), Ok(Network::Host(None))),
            (Choice::None, Ok(Network::None), Ok(Network::None)),
        ] {
            assert_eq!(find(choice, &works), with);
            assert_eq!(find(choice, &fails), without, "nothing falls back that was asked for");
        }
        assert_eq!(Network::Host(Some("x".into())).to_string(), "host (x)");
        assert!("slirp".parse::<Choice>().is_err());
    }

    #[test]
    fn name_servers_that_a_namespace_does_not_reach() {
        assert_eq!(rewritten("search a\nnameserver 10.0.0.1\nnameserver 2001:db8::1\n"), None);
        let expected = Some("nameserver 169.254.1.53\nsearch a\noptions ndots:1\n".to_owned());
        for server in ["127.0.0.53", "::1", "::1%lo"] {
            let text = format!("search a\nnameserver 10.0.0.1\nnameserver {server}\noptions ndots:1\n");
            assert_eq!(rewritten(&text), expected, "{server}");
        }
        assert_eq!(rewritten("").as_deref(), Some("nameserver 169.254.1.53\n"));
    }

    #[test]
    fn a_connection_that_fails_says_why_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let myself = rustix::process::getpid();
        let error = Connection::new(Path::new("/bin/false"), myself, dir.path()).err().unwrap();
        assert!(error.to_string().contains("pasta does not start"), "{error}");
        assert!(Connection::new(Path::new("/no/such"), myself, dir.path()).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
