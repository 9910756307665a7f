//! The locks that a build holds on what it makes, waited for only as long as somebody wants the build.

use std::os::fd::AsFd as _;
use std::sync::mpsc;

use drover_store::{LocalStore, PathLock, Wait};

use super::cancel::{Event, Interest};
use crate::error::Error;

/// Locks that are taken off the disk when they are let go. Nix leaves the files of builds that failed; whoever waits
/// for one looks again whether it still has its name, so that nothing needs them.
pub(super) struct Held(Option<PathLock>);

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(lock) = self.0.take() {
            lock.release_deleting();
        }
    }
}

/// All locks of these names (see [`PathLock::acquire_names`]), or None if somebody else has one.
pub(super) fn try_lock(store: &LocalStore, names: Vec<String>) -> Result<Option<Held>, Error> {
    Ok(PathLock::acquire_names(store, names, Wait::Try)?.map(|lock| Held(Some(lock))))
}

/// Waits until nobody else has any of the locks. Calls `waiting` if it has to wait.
pub(super) fn lock(
    store: &LocalStore,
    names: Vec<String>,
    interest: &Interest<'_>,
    waiting: impl FnOnce(),
) -> Result<Held, Error> {
    if let Some(held) = try_lock(store, names.clone())? {
        return Ok(held);
    }
    waiting();
    let arrived = Event::new().map_err(Error::system("make an event descriptor"))?;
    let (sender, receiver) = mpsc::channel();
    let (store, event) = (store.clone(), arrived.clone());
    // A lock can be waited for only by blocking, so a thread does, and is left behind if the interest ends first: it
    // then lets go of the lock as soon as it has it.
    std::thread::spawn(move || {
        let lock = PathLock::acquire_names(&store, names, Wait::Block);
        let held = lock.map(Held);
        let _left_behind = sender.send(held);
        event.set();
    });
    loop {
        interest.check()?;
        if arrived.is_set() {
            break;
        }
        interest.wait(&[arrived.as_fd()], None)?;
    }
    let gone = || Error::system("wait for a lock")(std::io::ErrorKind::BrokenPipe.into());
    Ok(receiver.recv().map_err(|_| gone())??)
}
