//! The locks that a build holds on what it makes, waited for only as long as somebody wants the build.

use std::time::Duration;

use drover_store::{LocalStore, PathLock, Wait};

use super::cancel::Interest;
use crate::error::Error;

/// How often locks that someone else has are tried again. Only blocking would wait for them otherwise, in a thread for each who
/// waits that nothing could end: clients that come, ask and go would leave any number of these behind.
const RETRY: Duration = Duration::from_millis(50);

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
    let mut waiting = Some(waiting);
    loop {
        if let Some(held) = try_lock(store, names.clone())? {
            return Ok(held);
        }
        if let Some(waiting) = waiting.take() {
            waiting();
        }
        interest.check()?;
        interest.wait(&[], Some(RETRY))?;
    }
}

#[cfg(test)]
mod tests {
    use drover_store::{Access, StoreLayout};

    use super::*;
    use crate::build::cancel::Cancel;
    use crate::build::shared::testing::shared;

    #[test]
    fn whoever_waits_gets_the_lock_or_goes_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = LocalStore::open(StoreLayout::in_root(dir.path()), Access::ReadWrite).unwrap();
        let names = || vec!["x".to_owned()];
        let (shared, cancel) = (shared(), Cancel::new().unwrap());
        let interest = Interest::new(&cancel, &shared, Duration::ZERO);
        let mut other = try_lock(&store, names()).unwrap();
        assert!(other.is_some());
        let held = lock(&store, names(), &interest, || drop(other.take())).unwrap();
        assert!(lock(&store, names(), &interest, || cancel.cancel()).is_err());
        drop(held);
        // Had somebody been left behind who still waits, it would be locked, or be a moment later.
        assert!(try_lock(&store, names()).unwrap().is_some());
    }
}
