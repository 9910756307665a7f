//! Path locks: one process at a time makes a store object (Nix: pathlocks.cc).
//!
//! The lock of path P is an exclusive `flock` of the whole file `P.lock`. Whoever removes a lock file first unlinks it
//! and then writes a byte to it: a waiter that gets the lock of a file that is not empty knows that the name belongs
//! to another file by now, and starts over.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use drover_nix::StorePath;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::{Error, LocalStore};

/// Whether to wait for a lock that someone else has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    Block,
    Try,
}

/// Locks on `<path>.lock` of some paths, held until it is dropped. Dropping leaves the lock files, as Nix does for
/// paths that did not become valid; see [`PathLock::release_deleting`].
#[derive(Debug)]
pub struct PathLock {
    locks: Vec<(PathBuf, File)>,
}

impl PathLock {
    /// Locks all of `paths`, in sorted order. None if `wait` is [`Wait::Try`] and one is held by someone else, be it
    /// another session of this process.
    pub fn acquire<'a>(
        store: &LocalStore,
        paths: impl IntoIterator<Item = &'a StorePath>,
        wait: Wait,
    ) -> Result<Option<Self>, Error> {
        Self::acquire_names(store, paths.into_iter().map(ToString::to_string).collect(), wait)
    }

    /// Locks files by their name in the store directory, for outputs whose path is not known yet (`<drv>.<output>`).
    /// `.lock` is added to each name. Names must not have a `/`.
    pub fn acquire_names(
        store: &LocalStore,
        mut names: Vec<String>,
        wait: Wait,
    ) -> Result<Option<Self>, Error> {
        store.must_write("lock a path")?;
        // The one order that everybody keeps, so that two who lock the same paths cannot wait for each other.
        names.sort();
        names.dedup();
        let mut held = Self { locks: Vec::with_capacity(names.len()) };
        for name in names {
            let path = store.layout().real_store_dir.join(format!("{name}.lock"));
            match lock_file(&path, wait)? {
                Some(file) => held.locks.push((path, file)),
                None => return Ok(None),
            }
        }
        Ok(Some(held))
    }

    /// Releases and removes the lock files. Whoever waits for them starts over and looks again whether the paths are
    /// valid.
    pub fn release_deleting(mut self) {
        for (path, file) in self.locks.drain(..) {
            retire(&path, &file);
        }
    }
}

/// Unlinks a locked file, then marks it for those who have it open already. Nothing is lost if either fails: an empty
/// file that stays is an ordinary lock file.
pub(crate) fn retire(path: &Path, file: &File) {
    if rustix::fs::unlink(path).is_ok() {
        let _ = rustix::io::write(file, b"d");
    }
}

/// Opens and locks; None if it would have to wait.
fn lock_file(path: &Path, wait: Wait) -> Result<Option<File>, Error> {
    loop {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file: File = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(Error::sys("open the lock file", path))?
            .into();
        let operation = match wait {
            Wait::Block => FlockOperation::LockExclusive,
            Wait::Try => FlockOperation::NonBlockingLockExclusive,
        };
        if !flock(&file, operation).map_err(Error::sys("lock", path))? {
            return Ok(None);
        }
        let stat = rustix::fs::fstat(&file).map_err(Error::sys("examine the lock file", path))?;
        if stat.st_size == 0 {
            return Ok(Some(file));
        }
    }
}

/// `flock` that is not put off by signals. False if someone else has the lock and the operation does not wait.
pub(crate) fn flock(file: impl AsFd, operation: FlockOperation) -> Result<bool, Errno> {
    match rustix::io::retry_on_intr(|| rustix::fs::flock(file.as_fd(), operation)) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;
    use crate::testing::{store, store_path};

    #[test]
    fn excludes_and_lets_go() {
        let (_dir, store) = store();
        let path = store_path("a");
        let first = PathLock::acquire(&store, [&path], Wait::Try).unwrap().unwrap();
        assert!(PathLock::acquire(&store, [&path], Wait::Try).unwrap().is_none());
        drop(first);
        assert!(PathLock::acquire(&store, [&path], Wait::Try).unwrap().is_some());
    }

    #[test]
    fn a_waiter_gets_the_new_file_after_a_deleting_release() {
        let (_dir, store) = store();
        let path = store_path("a");
        let lock_file = store.real_path(&path).with_file_name(format!("{path}.lock"));
        let held = PathLock::acquire(&store, [&path], Wait::Block).unwrap().unwrap();
        let (send, receive) = mpsc::channel();
        let waiter = {
            let (store, path) = (store.clone(), path.clone());
            thread::spawn(move || {
                send.send(()).unwrap();
                PathLock::acquire(&store, [&path], Wait::Block).unwrap().unwrap()
            })
        };
        receive.recv().unwrap();
        held.release_deleting();
        let lock = waiter.join().unwrap();
        // Whatever the order of events was, the one who holds the lock holds the file that has the name.
        assert!(lock_file.exists());
        assert!(PathLock::acquire(&store, [&path], Wait::Try).unwrap().is_none());
        lock.release_deleting();
        assert!(!lock_file.exists());
    }

    #[test]
    fn a_retired_file_is_passed_over() {
        let (_dir, store) = store();
        let path = store_path("a");
        let name = store.real_path(&path).with_file_name(format!("{path}.lock"));
        // Retired but not unlinked yet: as a waiter sees it that opened the file before.
        let old = File::create(&name).unwrap();
        std::fs::write(&name, "d").unwrap();
        let (send, receive) = mpsc::channel();
        let waiter = {
            thread::spawn(move || {
                let lock = PathLock::acquire(&store, [&path], Wait::Block).unwrap();
                send.send(()).unwrap();
                lock
            })
        };
        std::fs::remove_file(&name).unwrap();
        receive.recv().unwrap();
        assert!(waiter.join().unwrap().is_some());
        assert_eq!(std::fs::metadata(&name).unwrap().len(), 0);
        drop(old);
    }

    #[test]
    fn a_set_is_locked_whole_or_not_at_all() {
        let (_dir, store) = store();
        let (a, b) = (store_path("a"), store_path("b"));
        let held = PathLock::acquire(&store, [&b], Wait::Try).unwrap().unwrap();
        assert!(PathLock::acquire(&store, [&a, &b], Wait::Try).unwrap().is_none());
        assert!(PathLock::acquire(&store, [&a], Wait::Try).unwrap().is_some());
        drop(held);
        assert!(PathLock::acquire(&store, [&b, &a, &b], Wait::Try).unwrap().is_some());
    }
}
