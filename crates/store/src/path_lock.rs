//! Path locks: one process at a time makes a store object (Nix: pathlocks.cc).

use drover_nix::StorePath;

use crate::{Error, LocalStore};

/// Whether to wait for a lock that someone else has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wait {
    Block,
    Try,
}

/// Locks on `<path>.lock` of some paths, held until it is dropped.
#[derive(Debug)]
pub struct PathLock {}

impl PathLock {
    /// Locks all of `paths`, in sorted order. None if `wait` is [`Wait::Try`] and one is held by someone else, be it
    /// another session of this process.
    pub fn acquire<'a>(
        _store: &LocalStore,
        _paths: impl IntoIterator<Item = &'a StorePath>,
        _wait: Wait,
    ) -> Result<Option<Self>, Error> {
        todo!()
    }

    /// Locks files by their name in the store directory, for outputs whose path is not known yet (`<drv>.<output>`).
    pub fn acquire_names(
        _store: &LocalStore,
        _names: Vec<String>,
        _wait: Wait,
    ) -> Result<Option<Self>, Error> {
        todo!()
    }

    /// Releases and removes the lock files. Whoever waits for them starts over and looks again whether the paths are
    /// valid.
    pub fn release_deleting(self) {
        todo!()
    }
}
