//! Watches a running build: its output, its limits, and whether anyone still wants it (Nix: worker.cc,
//! derivation-building-goal.cc). It decides when a build has ended and how; it may not look at outputs.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

pub(crate) use super::cancel::Cancel;
use super::cancel::{Interest, wait};
use super::log::{BuildLog, Tail};
use crate::error::Error;
use crate::sandbox::launch::{Report, Running};

/// How soon a slow log reader is looked at again.
const LOG_RETRY: Duration = Duration::from_millis(20);
/// How much output is taken at once.
const CHUNK: usize = 16 << 10;
/// How much of it before limits and the build's clients are looked at again: a build can write as fast as it is read.
const MAX_DRAINED: u64 = 1 << 20;
/// How long a killed build may take to be gone before this program gives up on it.
const KILL_TIMEOUT: Duration = Duration::from_secs(60);

/// Limits of one build; None is none.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Limits {
    pub timeout: Option<Duration>,
    pub max_silent: Option<Duration>,
    pub max_log_bytes: Option<u64>,
}

/// How a build ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum End {
    Exited(i32),
    /// By a signal that this program has not sent.
    Signalled(i32),
    /// It closed its output and ran on, and was killed for that.
    Closed,
    TimedOut(Duration),
    Silent(Duration),
    LogLimit(u64),
    Cancelled,
    /// The sandbox was complete, but there was no such program or it could not be run.
    NotExecuted(String),
    /// The builder never ran.
    SetUp(String),
    /// The process that watches over builds is gone, and this one with it.
    Lost,
}

/// Sees a build to its end. Everything that ran in it is gone when this returns.
pub(crate) fn supervise(
    mut running: Running,
    limits: &Limits,
    log: &BuildLog,
    interest: &Interest<'_>,
) -> Result<(End, Vec<String>), Error> {
    let mut watch = Watch::new(Instant::now());
    let verdict = loop {
        if interest.is_over() {
            break Some(End::Cancelled);
        }
        if let Some(end) = watch.exceeded(limits) {
            break Some(end);
        }
        // A terminal that is not read holds the build up, which is what a slow reader of its log shall do.
        let room = log.has_room();
        let ready = watch.wait(&running, interest, limits, room)?;
        if ready.control
            && let Some(end) = next_end(&mut running)?
        {
            break Some(end);
        }
        if ready.terminal && watch.drain(running.terminal(), limits, log, false)? {
            break None;
        }
    };
    running.kill();
    let end = match verdict {
        Some(verdict) => verdict,
        None => last_end(&mut running)?,
    };
    // What is left fits into the terminal's own buffer.
    watch.drain(running.terminal(), limits, log, true)?;
    // Waits until the helper, and so the build, is gone.
    drop(running);
    let end = watch.over_log_limit(limits).unwrap_or(end);
    Ok((end, watch.tail.finish()))
}

struct Watch {
    started: Instant,
    /// Of the builder's own doing: the time that it was not read from does not count.
    silent_since: Instant,
    logged: u64,
    tail: Tail,
    chunk: Vec<u8>,
}

struct Ready {
    terminal: bool,
    control: bool,
}

impl Watch {
    fn new(now: Instant) -> Self {
        Self { started: now, silent_since: now, logged: 0, tail: Tail::default(), chunk: vec![0; CHUNK] }
    }

    fn exceeded(&self, limits: &Limits) -> Option<End> {
        let over = |limit: Option<Duration>, since: Instant| limit.filter(|limit| since.elapsed() >= *limit);
        if let Some(end) = self.over_log_limit(limits) {
            return Some(end);
        }
        if let Some(limit) = over(limits.timeout, self.started) {
            return Some(End::TimedOut(limit));
        }
        over(limits.max_silent, self.silent_since).map(End::Silent)
    }

    fn over_log_limit(&self, limits: &Limits) -> Option<End> {
        limits.max_log_bytes.filter(|limit| self.logged > *limit).map(End::LogLimit)
    }

    /// Sleeps until there is something to do.
    fn wait(
        &mut self,
        running: &Running,
        interest: &Interest<'_>,
        limits: &Limits,
        room: bool,
    ) -> Result<Ready, Error> {
        let until = |limit: Option<Duration>, since: Instant| {
            limit.map(|limit| limit.saturating_sub(since.elapsed()))
        };
        let timeout = until(limits.timeout, self.started);
        let begin = Instant::now();
        if !room {
            let sleep = timeout.unwrap_or(LOG_RETRY).min(LOG_RETRY);
            let ready = interest.wait(&[running.control().as_fd()], Some(sleep))?;
            self.silent_since += begin.elapsed();
            return Ok(Ready { control: ready.first() == Some(&true), terminal: false });
        }
        let sleep = timeout.into_iter().chain(until(limits.max_silent, self.silent_since)).min();
        let ready = interest.wait(&[running.control().as_fd(), running.terminal().as_fd()], sleep)?;
        Ok(Ready { control: ready.first() == Some(&true), terminal: ready.get(1) == Some(&true) })
    }

    /// Takes what the build has written; unless it is all that will `ever` come, at most so much that limits are looked
    /// at in time. True at its end.
    fn drain(
        &mut self,
        terminal: impl AsFd,
        limits: &Limits,
        log: &BuildLog,
        ever: bool,
    ) -> Result<bool, Error> {
        let before = self.logged;
        loop {
            match rustix::io::read(&terminal, &mut self.chunk[..]) {
                // EIO: every process that had the terminal's other end is gone.
                Ok(0) | Err(rustix::io::Errno::IO) => return Ok(true),
                Ok(count) => {
                    self.silent_since = Instant::now();
                    self.logged += count as u64;
                    self.tail.write(&self.chunk[..count]);
                    log.write(&self.chunk[..count]);
                    let enough = self.logged - before >= MAX_DRAINED;
                    if !ever && (enough || !log.has_room() || self.over_log_limit(limits).is_some()) {
                        return Ok(false);
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(Error::system("read the build's output")(errno.into())),
            }
        }
    }
}

/// How the build ended, if the sandbox has said so.
fn next_end(running: &mut Running) -> Result<Option<End>, Error> {
    let report = running.report().map_err(Error::system("read from the sandbox"))?;
    Ok(match report {
        None | Some(Report::Born(_) | Report::Ready) => None,
        Some(Report::Exited(code)) => Some(End::Exited(code)),
        Some(Report::Signalled(signal)) => Some(End::Signalled(signal)),
        Some(Report::Killed) => Some(End::Closed),
        Some(Report::Lost) => Some(End::Lost),
        Some(Report::NotExecuted(why)) => Some(End::NotExecuted(why)),
        Some(Report::Failed(why)) => Some(End::SetUp(why)),
    })
}

/// How the builder itself ended, once it is gone with all of its processes.
fn last_end(running: &mut Running) -> Result<End, Error> {
    let deadline = Instant::now() + KILL_TIMEOUT;
    loop {
        if let Some(end) = next_end(running)? {
            return Ok(end);
        }
        if Instant::now() >= deadline {
            let source = io::Error::from(io::ErrorKind::TimedOut);
            return Err(Error::system("kill the build: it is still there after a minute")(source));
        }
        wait(&[running.control().as_fd()], Some(deadline.saturating_duration_since(Instant::now())))
            .map_err(Error::system("wait for a killed build"))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::log::Log;

    #[test]
    fn a_build_that_never_stops_writing_is_looked_after() {
        // For readers that are gone there is always room.
        let gone = Log::to(std::fs::File::open("/dev/null").unwrap()).unwrap();
        gone.note("this cannot be written");
        gone.flush_until(&|| false);
        let log = BuildLog::new(&gone, None);
        let endless = std::fs::File::open("/dev/zero").unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut watch = Watch::new(Instant::now());
            let ended = watch.drain(&endless, &Limits::default(), &log, false).unwrap();
            send.send((ended, watch.logged))
        });
        let (ended, logged) = receive.recv_timeout(Duration::from_secs(20)).expect("it reads for ever");
        assert!(!ended && (MAX_DRAINED..2 * MAX_DRAINED).contains(&logged), "{logged}");
    }

    #[test]
    fn which_limit_is_exceeded() {
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        let watch = Watch { silent_since: ago(3), logged: 100, ..Watch::new(ago(10)) };
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(watch.exceeded(&Limits::default()), None);
        let limits = Limits { timeout: seconds(11), max_silent: seconds(4), max_log_bytes: Some(100) };
        assert_eq!(watch.exceeded(&limits), None);
        let timeout = Limits { timeout: seconds(9), ..limits };
        assert_eq!(watch.exceeded(&timeout), Some(End::TimedOut(Duration::from_secs(9))));
        let silent = Limits { max_silent: seconds(2), ..limits };
        assert_eq!(watch.exceeded(&silent), Some(End::Silent(Duration::from_secs(2))));
        let log = Limits { max_log_bytes: Some(99), ..limits };
        assert_eq!(watch.exceeded(&log), Some(End::LogLimit(99)));
    }
}
