//! Path locks: one process at a time makes a store object (Nix: pathlocks.cc).
//!
//! The lock of path P is an exclusive `flock` of the whole file `P.lock`. Whoever removes a lock file first unlinks it
//! and then gives it a size: a waiter that gets the lock of a file that is not empty knows that the name belongs to
//! another file by now, and starts over.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use drover_nix::StorePath;
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
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
    store: LocalStore,
    /// Names in the store's directory, and the files.
    locks: Vec<(String, File)>,
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
        let mut held = Self { store: store.clone(), locks: Vec::with_capacity(names.len()) };
        for mut name in names {
            name.push_str(".lock");
            match lock_file(store, &name, wait)? {
                Some(file) => held.locks.push((name, file)),
                None => return Ok(None),
            }
        }
        Ok(Some(held))
    }

    /// Releases and removes the lock files. Whoever waits for them starts over and looks again whether the paths are
    /// valid.
    pub fn release_deleting(mut self) {
        // It was open when the locks were taken.
        let Ok(directory) = self.store.directory() else { return };
        for (name, file) in self.locks.drain(..) {
            if rustix::fs::unlinkat(directory, &name, AtFlags::empty()).is_ok() {
                mark_retired(&file);
            }
        }
    }
}

/// Unlinks a locked file, then marks it for those who have it open already. Nothing is lost if either fails: an empty
/// file that stays is an ordinary lock file.
pub(crate) fn retire(path: &Path, file: &File) {
    if rustix::fs::unlink(path).is_ok() {
        mark_retired(file);
    }
}

/// Nix writes a byte; everybody looks at the size only, and a hole needs no block of the disk.
fn mark_retired(file: &File) {
    let _ = rustix::fs::ftruncate(file, 1);
}

/// Opens and locks a file in the store's directory; None if it would have to wait.
fn lock_file(store: &LocalStore, name: &str, wait: Wait) -> Result<Option<File>, Error> {
    let directory = store.directory()?;
    let path = || store.real_store_dir().join(name);
    loop {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file: File = rustix::fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| Error::sys("open the lock file", path())(errno))?
            .into();
        let operation = match wait {
            Wait::Block => FlockOperation::LockExclusive,
            Wait::Try => FlockOperation::NonBlockingLockExclusive,
        };
        if !flock(&file, operation).map_err(|errno| Error::sys("lock", path())(errno))? {
            return Ok(None);
        }
        let stat =
            rustix::fs::fstat(&file).map_err(|errno| Error::sys("examine the lock file", path())(errno))?;
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
