//! Where a store lies: what users write for `--store`, and the directories that it stands for.

use std::path::PathBuf;

use drover_nix::StoreDir;

use crate::Error;

/// A parsed `--store` value: a directory, `local`, `auto`, or `local?root=…&store=…&real=…&state=…&log=…`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreUri {
    pub root: Option<PathBuf>,
    pub store: Option<StoreDir>,
    pub real: Option<PathBuf>,
    pub state: Option<PathBuf>,
    pub log: Option<PathBuf>,
}

/// A store's directories. All are absolute.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreLayout {
    /// What paths in the store begin with, `/nix/store` as a rule, wherever the files lie.
    pub store_dir: StoreDir,
    /// Where the objects' files lie.
    pub real_store_dir: PathBuf,
    /// Database, roots and locks.
    pub state_dir: PathBuf,
    /// Build logs, in `drvs` below it.
    pub log_dir: PathBuf,
}

impl StoreUri {
    pub fn parse(_uri: &str) -> Result<Self, Error> {
        todo!()
    }

    /// The directories, with Nix's defaults for what the URI does not say.
    pub fn layout(&self) -> StoreLayout {
        todo!()
    }
}

impl StoreLayout {
    /// The layout that `--store ROOT` has: everything below `root`, the logical store directory `/nix/store`.
    pub fn in_root(_root: impl Into<PathBuf>) -> Self {
        todo!()
    }

    /// Whether the files lie elsewhere than their store paths say.
    pub fn is_relocated(&self) -> bool {
        todo!()
    }
}
