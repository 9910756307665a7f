//! Who still wants a build: its session's client, other sessions that ask for the same, or nobody, for as long as a
//! build may linger. Everything that a build waits for, it waits for here, so that no wait outlasts the interest.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::shared::Shared;
use crate::error::Error;

/// Something that happens once. Clones are one.
#[derive(Clone)]
pub(crate) struct Event {
    inner: Arc<(AtomicBool, OwnedFd)>,
}

impl Event {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { inner: Arc::new((AtomicBool::new(false), counter()?)) })
    }

    pub(crate) fn set(&self) {
        self.inner.0.store(true, Ordering::SeqCst);
        // Stays readable: nobody reads it. It can only overflow, which leaves it readable too.
        let _overflow = add_one(&self.inner.1);
    }

    pub(crate) fn is_set(&self) -> bool {
        self.inner.0.load(Ordering::SeqCst)
    }
}

impl AsFd for Event {
    /// Readable once it has happened.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.1.as_fd()
    }
}

/// A session's way to say that nobody waits for its builds any more. Clones are one.
#[derive(Clone)]
pub(crate) struct Cancel {
    gone: Event,
    stopped: Event,
}

impl Cancel {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { gone: Event::new()?, stopped: Event::new()? })
    }

    /// The client is gone. A build that runs may linger.
    pub(crate) fn cancel(&self) {
        self.gone.set();
    }

    /// This program is to end: nothing lingers.
    pub(crate) fn stop(&self) {
        self.stopped.set();
        self.gone.set();
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.gone.is_set()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.is_set()
    }

    /// Sleeps for so long. True if the client is gone, at once then.
    pub(crate) fn comes_within(&self, time: Duration) -> io::Result<bool> {
        if !self.is_cancelled() {
            wait(&[self.gone.as_fd()], Some(time))?;
        }
        Ok(self.is_cancelled())
    }

    /// Sleeps until `event`. False if the client is gone first.
    pub(crate) fn wait_for(&self, event: &Event) -> io::Result<bool> {
        while !event.is_set() {
            if self.is_cancelled() {
                return Ok(false);
            }
            wait(&[event.as_fd(), self.gone.as_fd()], None)?;
        }
        Ok(true)
    }
}

/// Whether anyone wants one build, seen by the thread that builds.
pub(crate) struct Interest<'a> {
    owner: &'a Cancel,
    shared: &'a Shared,
    linger: Duration,
    /// Only what runs lingers; what waits for its turn has nothing to lose.
    running: Cell<bool>,
    alone_since: Cell<Option<Instant>>,
}

impl<'a> Interest<'a> {
    pub(crate) fn new(owner: &'a Cancel, shared: &'a Shared, linger: Duration) -> Self {
        Self { owner, shared, linger, running: Cell::new(false), alone_since: Cell::new(None) }
    }

    /// From here on the build may linger.
    pub(crate) fn runs(&self) {
        self.running.set(true);
    }

    /// Nobody wants the build, and its time to linger is over.
    pub(crate) fn is_over(&self) -> bool {
        self.left() == Some(Duration::ZERO)
    }

    /// An error once nobody wants the build.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.is_over() { Err(Error::gone()) } else { Ok(()) }
    }

    /// The session that builds has nobody to answer.
    pub(crate) fn owner_is_gone(&self) -> bool {
        self.owner.is_cancelled()
    }

    /// Sleeps until one of `fds` is readable, the interest changes, or `time` is over. Says which are readable.
    pub(crate) fn wait(&self, fds: &[BorrowedFd<'_>], time: Option<Duration>) -> Result<Vec<bool>, Error> {
        // Asked once, and before how long there is: a client that goes after this question ends the sleep, and one that went
        // before it, the time limits. Asked again below, one that goes in between would do neither, and this sleep not end.
        let owner_was_there = !self.owner.is_cancelled();
        let limit = [time, self.left()].into_iter().flatten().min();
        let mut all = fds.to_vec();
        let wake = self.shared.wake();
        all.extend([wake, self.owner.stopped.as_fd()]);
        if owner_was_there {
            all.push(self.owner.gone.as_fd());
        }
        let mut ready = wait(&all, limit).map_err(Error::system("wait for a build"))?;
        if ready.get(fds.len()) == Some(&true) {
            // Takes the count, so that the next sleep is one.
            let _raced = rustix::io::read(wake, &mut [0; 8]);
        }
        ready.truncate(fds.len());
        Ok(ready)
    }

    /// How long the build may go on without anyone; None while someone is there.
    fn left(&self) -> Option<Duration> {
        if self.owner.stopped.is_set() {
            return Some(Duration::ZERO);
        }
        if !self.owner.is_cancelled() || self.shared.is_joined() {
            self.alone_since.set(None);
            return None;
        }
        let since = self.alone_since.get().unwrap_or_else(Instant::now);
        self.alone_since.set(Some(since));
        let linger = if self.running.get() { self.linger } else { Duration::ZERO };
        Some(linger.saturating_sub(since.elapsed()))
    }
}

/// A descriptor that is readable while something was added to it that was not read.
pub(super) fn counter() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

pub(super) fn add_one(counter: impl AsFd) -> io::Result<()> {
    Ok(rustix::io::write(counter, &1_u64.to_ne_bytes()).map(drop)?)
}

/// Sleeps until one of `fds` is readable or has ended, or the time is over, or a signal came. Says which are ready.
pub(super) fn wait(fds: &[BorrowedFd<'_>], time: Option<Duration>) -> io::Result<Vec<bool>> {
    let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    // Rounded up, or the last sleep before a limit would be many.
    let time = time.map(|time| time + Duration::from_micros(100)).map(|time| Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(time.subsec_nanos()),
    });
    match poll(&mut polled, time.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    Ok(polled.iter().map(|fd| !fd.revents().is_empty()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::shared::testing::shared;

    #[test]
    fn clones_are_one() {
        let cancel = Cancel::new().unwrap();
        let clone = cancel.clone();
        cancel.cancel();
        cancel.cancel();
        assert!(clone.is_cancelled());
        assert!(!clone.wait_for(&Event::new().unwrap()).unwrap());
    }

    #[test]
    fn a_build_ends_with_its_client_unless_it_may_linger() {
        let shared = shared();
        let cancel = Cancel::new().unwrap();
        let interest = Interest::new(&cancel, &shared, Duration::from_secs(1000));
        assert!(!interest.is_over());
        cancel.cancel();
        assert!(interest.is_over(), "what does not run does not linger");
        interest.runs();
        assert!(!interest.is_over());
        let passed = Instant::now().checked_sub(Duration::from_secs(1001)).unwrap();
        interest.alone_since.set(Some(passed));
        assert!(interest.is_over());
        interest.alone_since.set(None);
        cancel.stop();
        assert!(interest.is_over(), "nothing lingers in a program that ends");
    }

    #[test]
    fn waiting_ends_when_the_interest_does() {
        // Often, since what may go wrong goes wrong between two instructions; within a time, since it would never end.
        const TIMES: usize = 20_000;
        let (done, is_done) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let shared = shared();
            let never = Event::new().unwrap();
            let (clients, goes) = std::sync::mpsc::channel::<Cancel>();
            let client = std::thread::spawn(move || goes.into_iter().for_each(|client| client.cancel()));
            for _ in 0..TIMES {
                let cancel = Cancel::new().unwrap();
                let interest = Interest::new(&cancel, &shared, Duration::ZERO);
                clients.send(cancel.clone()).unwrap();
                while !interest.is_over() {
                    assert_eq!(interest.wait(&[never.as_fd()], None).unwrap(), [false]);
                }
            }
            drop(clients);
            client.join().unwrap();
            done.send(()).unwrap();
        });
        is_done
            .recv_timeout(Duration::from_secs(60))
            .expect("a client went, and the wait for it never ended");
    }
}
