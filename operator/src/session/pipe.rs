//! The operator's ends of the pipes to a builder: blocking, for threads, but not for longer than the session lasts. What is
//! read or written counts as moved.
//!
//! Whoever holds the other ends (the connection's master) may hang, stop or forget to close them: the session's end is
//! this side's to say, and no thread stays behind.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};

use super::meter::Meter;

/// The pipes of one session, as its threads use them.
#[derive(Debug)]
pub struct Pipes {
    /// Closing it ends the remote `serve`.
    pub stdin: Outgoing,
    pub stdout: Incoming,
    pub stderr: Incoming,
    pub meter: Meter,
    pub cut: Cut,
}

/// Ends every read and write of its session's pipes, once and for all, by being dropped.
#[derive(Debug)]
pub struct Cut {
    _open: PipeWriter,
    ended: Ended,
}

/// Has an end when its [`Cut`] is gone.
#[derive(Clone, Debug)]
pub struct Ended(Arc<PipeReader>);

#[derive(Debug)]
pub struct Incoming {
    pipe: PipeReader,
    ended: Ended,
    /// None where what arrives says nothing of progress.
    meter: Option<Meter>,
}

#[derive(Debug)]
pub struct Outgoing {
    pipe: PipeWriter,
    ended: Ended,
    meter: Meter,
}

impl Pipes {
    /// Of these ends. The one that is written to must be this side's alone: it is made not to block.
    pub fn new(stdin: PipeWriter, stdout: PipeReader, stderr: PipeReader) -> io::Result<Self> {
        let (end, open) = io::pipe()?;
        let (ended, meter) = (Ended(Arc::new(end)), Meter::default());
        rustix::io::ioctl_fionbio(&stdin, true)?;
        Ok(Self {
            stdin: Outgoing { pipe: stdin, ended: ended.clone(), meter: meter.clone() },
            stdout: Incoming { pipe: stdout, ended: ended.clone(), meter: Some(meter.clone()) },
            // The build's log is no progress of a copy.
            stderr: Incoming { pipe: stderr, ended: ended.clone(), meter: None },
            meter,
            cut: Cut { _open: open, ended },
        })
    }
}

impl Cut {
    pub fn ended(&self) -> Ended {
        self.ended.clone()
    }
}

impl Ended {
    pub fn is_over(&self) -> bool {
        let mut polled = [PollFd::new(&self.0, PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        // An error leaves the session as it is: the next read or write meets the same.
        poll(&mut polled, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Sleeps until `fd` is ready, or the session is over, which is an error.
    fn wait(&self, fd: impl AsFd, flags: PollFlags) -> io::Result<()> {
        let fd = fd.as_fd();
        let mut polled = [PollFd::new(&self.0, PollFlags::IN), PollFd::new(&fd, flags)];
        loop {
            match poll(&mut polled, None) {
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(_) if !polled[0].revents().is_empty() => {
                    let why = "the operator has given this session up";
                    return Err(io::Error::new(io::ErrorKind::ConnectionAborted, why));
                }
                Ok(_) => return Ok(()),
            }
        }
    }
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.ended.wait(&self.pipe, PollFlags::IN)?;
        let count = self.pipe.read(buffer)?;
        if let Some(meter) = &self.meter {
            meter.add(count as u64);
        }
        Ok(count)
    }
}

impl Write for Outgoing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            self.ended.wait(&self.pipe, PollFlags::OUT)?;
            match self.pipe.write(bytes) {
                // Room for less than what must go in one piece.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                Ok(count) => {
                    self.meter.add(count as u64);
                    return Ok(count);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    struct Far {
        stdin: PipeReader,
        stdout: PipeWriter,
        stderr: PipeWriter,
    }

    fn pipes() -> (Pipes, Far) {
        let ((far_stdin, stdin), (stdout, far_stdout)) = (io::pipe().unwrap(), io::pipe().unwrap());
        let (stderr, far_stderr) = io::pipe().unwrap();
        let far = Far { stdin: far_stdin, stdout: far_stdout, stderr: far_stderr };
        (Pipes::new(stdin, stdout, stderr).unwrap(), far)
    }

    #[test]
    fn they_are_pipes_and_count() {
        let (mut pipes, mut far) = pipes();
        let sent = vec![7; 1 << 20];
        let reader = thread::spawn(move || {
            let mut all = Vec::new();
            far.stdin.read_to_end(&mut all).unwrap();
            far.stdout.write_all(b"answer").unwrap();
            far.stderr.write_all(b"log").unwrap();
            all.len()
        });
        pipes.stdin.write_all(&sent).unwrap();
        drop(pipes.stdin);
        assert_eq!(reader.join().unwrap(), sent.len());
        let mut text = String::new();
        pipes.stdout.read_to_string(&mut text).unwrap();
        pipes.stderr.read_to_string(&mut text).unwrap();
        assert_eq!(text, "answerlog");
        assert_eq!(pipes.meter.total(), sent.len() as u64 + 6, "the log is not counted");
    }

    /// The far ends stay open and do nothing: as with a master that hangs.
    #[test]
    fn no_thread_outlasts_the_session() {
        let (pipes, _far) = pipes();
        let Pipes { mut stdin, mut stdout, mut stderr, cut, .. } = pipes;
        let ended = cut.ended();
        let (sender, ends) = mpsc::channel();
        let acts: [Box<dyn FnOnce() -> io::Error + Send>; 3] = [
            Box::new(move || stdout.read(&mut [0]).unwrap_err()),
            Box::new(move || stderr.read(&mut [0]).unwrap_err()),
            Box::new(move || stdin.write_all(&vec![0; 1 << 20]).unwrap_err()),
        ];
        for act in acts {
            let sender = sender.clone();
            thread::spawn(move || sender.send(act().kind()));
        }
        assert!(!ended.is_over());
        drop(cut);
        assert!(ended.is_over());
        for _ in 0..3 {
            let end = ends.recv_timeout(Duration::from_secs(10)).expect("a thread that has no end");
            assert_eq!(end, io::ErrorKind::ConnectionAborted);
        }
    }

    #[test]
    fn a_far_side_that_goes_is_an_end() {
        let (mut pipes, far) = pipes();
        drop(far);
        assert_eq!(pipes.stdout.read(&mut [0]).unwrap(), 0);
        assert_eq!(pipes.stdin.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
