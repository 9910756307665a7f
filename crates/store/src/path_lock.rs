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
    /// Locks all of `paths`. None if `wait` is [`Wait::Try`] and one is held by someone else, be it another session of this
    /// process. Whoever waits holds none of them meanwhile: others may hold one and wait for another in an order of their
    /// own, as who fetches paths that refer to each other does.
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
        // One order for everybody, so that of two who want the same paths one gets all of them.
        names.sort();
        names.dedup();
        names.iter_mut().for_each(|name| name.push_str(".lock"));
        if let (Wait::Block, [name]) = (wait, &names[..]) {
            let file = lock_file(store, name, Wait::Block)?;
            return Ok(file.map(|file| Self { store: store.clone(), locks: vec![(name.clone(), file)] }));
        }
        loop {
            let busy = match Self::try_all(store, &names)? {
                Ok(held) => return Ok(Some(held)),
                Err(_) if wait == Wait::Try => return Ok(None),
                Err(busy) => busy,
            };
            // Let go of at once: it only says that there is a point in trying again.
            drop(lock_file(store, busy, Wait::Block)?);
        }
    }

    /// All locks, or the first that someone else has.
    fn try_all<'n>(store: &LocalStore, names: &'n [String]) -> Result<Result<Self, &'n str>, Error> {
        let mut held = Self { store: store.clone(), locks: Vec::with_capacity(names.len()) };
        for name in names {
            match lock_file(store, name, Wait::Try)? {
                Some(file) => held.locks.push((name.clone(), file)),
                None => return Ok(Err(name)),
            }
        }
        Ok(Ok(held))
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
        // A retired file has lost its name. One that has not was written to by somebody who knows nothing of locks: a build
        // that may write to the store's directory can. It would be passed over for ever.
        let named = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
        if named.is_ok_and(|named| (named.st_dev, named.st_ino) == (stat.st_dev, stat.st_ino)) {
            match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(Error::sys("remove the spoilt lock file", path())(errno)),
            }
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
    use std::os::unix::fs::MetadataExt as _;
    use std::sync::mpsc;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::testing::{store, store_path};

    /// For what must happen, and does not.
    const LONG: Duration = Duration::from_secs(20);

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
        let old = File::create(&name).unwrap();
        assert!(flock(&old, FlockOperation::LockExclusive).unwrap());
        let waiter = {
            let (store, path) = (store.clone(), path.clone());
            thread::spawn(move || PathLock::acquire(&store, [&path], Wait::Block).unwrap().unwrap())
        };
        // The waiter has the old file open, or will find none.
        retire(&name, &old);
        drop(old);
        let _lock = waiter.join().unwrap();
        assert_eq!(std::fs::metadata(&name).unwrap().len(), 0);
        assert!(PathLock::acquire(&store, [&path], Wait::Try).unwrap().is_none());
    }

    #[test]
    fn a_file_that_somebody_wrote_to_is_no_lock_for_ever() {
        let (_dir, store) = store();
        let path = store_path("a");
        let name = store.real_path(&path).with_file_name(format!("{path}.lock"));
        for wait in [Wait::Try, Wait::Block] {
            std::fs::write(&name, "not a lock").unwrap();
            let (send, receive) = mpsc::channel();
            let (store, path) = (store.clone(), path.clone());
            thread::spawn(move || send.send(PathLock::acquire(&store, [&path], wait).unwrap().unwrap()));
            let lock = receive.recv_timeout(LONG).expect("it is tried for ever");
            assert_eq!(std::fs::metadata(&name).unwrap().len(), 0);
            lock.release_deleting();
        }
    }

    #[test]
    fn who_waits_for_one_lock_holds_no_other() {
        let (_dir, store) = store();
        let mut paths = [store_path("a"), store_path("b")];
        paths.sort();
        let [first, last] = paths;
        // Somebody has the last of the two and will want the first, as who fetches the first because the last refers to it.
        let held = PathLock::acquire(&store, [&last], Wait::Block).unwrap().unwrap();
        let (send, receive) = mpsc::channel();
        let waiter = {
            let (store, paths) = (store.clone(), [first.clone(), last.clone()]);
            thread::spawn(move || {
                let lock = PathLock::acquire(&store, &paths, Wait::Block).unwrap().unwrap();
                send.send(()).unwrap();
                lock
            })
        };
        // The kernel lists who waits for what.
        let inode =
            std::fs::metadata(store.real_path(&last).with_file_name(format!("{last}.lock"))).unwrap().ino();
        let waits = |line: &str| line.contains("->") && line.contains(&format!(":{inode} "));
        let begun = Instant::now();
        while !std::fs::read_to_string("/proc/locks").unwrap().lines().any(waits) {
            assert!(begun.elapsed() < LONG, "nobody waits");
            thread::yield_now();
        }
        let (send, got) = mpsc::channel();
        let other = thread::spawn(move || {
            send.send(PathLock::acquire(&store, [&first], Wait::Block).unwrap().unwrap())
        });
        drop(got.recv_timeout(LONG).expect("both wait for each other"));
        other.join().unwrap().unwrap();
        drop(held);
        receive.recv_timeout(LONG).unwrap();
        drop(waiter.join().unwrap());
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
