//! Temporary roots: what a collector leaves alone while this process works with it (Nix: gc.cc).

use drover_nix::StorePath;

use crate::{Error, LocalStore};

/// A session's hold on paths. The paths stay protected until the last `TempRoots` of this process on that store is
/// dropped: the file behind them is one a process and is only ever appended to.
#[derive(Clone, Debug)]
pub struct TempRoots {}

impl TempRoots {
    pub fn new(_store: &LocalStore) -> Result<Self, Error> {
        todo!()
    }

    /// Protects `path`, which need not exist. Returns once no collector can be deleting it any more; whether it is
    /// valid is to be asked after that.
    pub fn add(&self, _path: &StorePath) -> Result<(), Error> {
        todo!()
    }

    /// [`Self::add`] for many paths at the cost of one.
    pub fn add_all<'a>(&self, _paths: impl IntoIterator<Item = &'a StorePath>) -> Result<(), Error> {
        todo!()
    }
}
