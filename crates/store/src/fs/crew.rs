//! Making files, also by threads beside the one that parses: most of an archive of small files is system calls.
//!
//! A directory gets its mode and time when it is let go of by the last who makes something in it.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::feed::Piece;
use super::{CANONICAL_TIMES, EXECUTABLE, PLAIN, below};
use crate::Error;

/// Threads that help with one archive, at most: more would wait for the file system's own locks.
const MAX_THREADS: usize = 3;
/// Files that wait to be made, at most. Their contents are bounded by the feed's chunks.
const MAX_WAITING: usize = 256;

/// A directory that is being filled.
pub(super) struct Directory {
    pub(super) fd: OwnedFd,
    /// Of the whole object, for messages.
    path: Arc<Path>,
    failed: Arc<Failed>,
}

/// A file to be made, with all of its contents.
pub(super) struct Job {
    pub(super) directory: Arc<Directory>,
    pub(super) name: Box<[u8]>,
    pub(super) executable: bool,
    pub(super) modes_hold: bool,
    pub(super) contents: Piece,
}

/// The first failure of whoever is at work.
#[derive(Default)]
pub(super) struct Failed(Mutex<Option<Error>>);

/// Threads that make files. They have ended when this is gone.
pub(super) struct Crew {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

impl Crew {
    /// As many threads as there are processors beside the caller's own, as far as they can be had.
    pub(super) fn start() -> Self {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        let shared = Arc::<Shared>::default();
        let threads = (1..processors.clamp(2, MAX_THREADS + 1))
            .map_while(|_| {
                let shared = Arc::clone(&shared);
                thread::Builder::new().spawn(move || shared.work()).ok()
            })
            .collect();
        Self { shared, threads }
    }

    /// Has the file made. Makes it itself where too many wait, or nobody is there who would.
    pub(super) fn give(&self, job: Job) {
        if self.threads.is_empty() {
            // A job that waited would keep its piece of the feed, which then could not go on.
            return job.run();
        }
        let mut queue = self.shared.lock();
        if queue.jobs.len() >= MAX_WAITING {
            drop(queue);
            return job.run();
        }
        queue.jobs.push_back(job);
        let wake = queue.idle > 0;
        drop(queue);
        if wake {
            self.shared.work.notify_one();
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
        // What is left is done by all.
        self.shared.work();
        for worker in self.threads.drain(..) {
            // A file of its may be missing.
            if let Err(panic) = worker.join()
                && !thread::panicking()
            {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

impl Shared {
    /// Works until there is nothing left and nothing will come.
    fn work(&self) {
        let mut queue = self.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                job.run();
                queue = self.lock();
            } else if queue.closed {
                return;
            } else {
                queue.idle += 1;
                queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Job {
    /// After a failure the rest is not worth making.
    fn run(self) {
        let failed = &self.directory.failed;
        if failed.is_set() {
            return;
        }
        let shown = || below(&self.directory.path.join("…"), &self.name);
        let made = create(self.directory.fd.as_fd(), OsStr::from_bytes(&self.name), self.executable, false)
            .map_err(|errno| Error::sys("make the file", shown())(errno))
            .and_then(|mut file| {
                file.write_all(self.contents.bytes()).map_err(Error::io("write", shown()))?;
                seal(&file, self.executable, self.modes_hold)
                    .map_err(|errno| Error::sys("set mode and time of", shown())(errno))
            });
        if let Err(error) = made {
            failed.set(error);
        }
    }
}

impl Directory {
    pub(super) fn new(fd: OwnedFd, path: Arc<Path>, failed: Arc<Failed>) -> Self {
        Self { fd, path, failed }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let sealed = rustix::fs::fchmod(&self.fd, EXECUTABLE)
            .and_then(|()| rustix::fs::futimens(&self.fd, &CANONICAL_TIMES));
        if let Err(errno) = sealed {
            let path: PathBuf = self.path.to_path_buf();
            self.failed.set(Error::sys("set mode and time of a directory in", path)(errno));
        }
    }
}

impl Failed {
    pub(super) fn take(&self) -> Option<Error> {
        self.lock().take()
    }

    fn set(&self, error: Error) {
        self.lock().get_or_insert(error);
    }

    fn is_set(&self) -> bool {
        self.lock().is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Error>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a new, empty file, to be written and, if asked for, read. Its mode says nothing of this descriptor.
pub(super) fn create(
    directory: BorrowedFd<'_>,
    name: &OsStr,
    executable: bool,
    readable: bool,
) -> Result<File, Errno> {
    let access = if readable { OFlags::RDWR } else { OFlags::WRONLY };
    let flags = access | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(directory, name, flags, mode(executable)).map(File::from)
}

/// Gives a file that is complete its metadata. `modes_hold`: see [`super::modes_hold`].
pub(super) fn seal(file: &File, executable: bool, modes_hold: bool) -> Result<(), Errno> {
    if !modes_hold {
        rustix::fs::fchmod(file, mode(executable))?;
    }
    rustix::fs::futimens(file, &CANONICAL_TIMES)
}

fn mode(executable: bool) -> Mode {
    if executable { EXECUTABLE } else { PLAIN }
}
