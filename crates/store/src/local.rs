//! The local store: its database and its objects together.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use drover_nix::{Derivation, OutputName, PathInfo, StoreDir, StorePath};

use crate::{Error, StoreLayout, TempRoots};

/// What a store is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Nothing is written, nothing is created. Needs no rights but to read.
    ReadOnly,
    /// Creates what is missing, the whole store if need be.
    ReadWrite,
}

/// An open store. `Send + Sync`, and cheap to clone: clones share connections, one of which each operation in progress
/// has to itself, so every thread may use the same store.
#[derive(Clone, Debug)]
pub struct LocalStore {}

/// A path to be registered, its object in place on disk.
#[derive(Clone, Debug)]
pub struct ValidPath {
    pub info: PathInfo,
    /// Built here.
    pub ultimate: bool,
    /// Unix seconds; 0 for now.
    pub registration_time: u64,
}

/// What [`LocalStore::add_nar`] did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Added {
    /// The path was valid; nothing (or not all) was read from the archive.
    AlreadyValid,
    Imported,
}

/// What [`LocalStore::verify`] found.
#[derive(Clone, Default, Debug)]
pub struct VerifyReport {
    pub paths_checked: u64,
    /// One line a problem.
    pub problems: Vec<String>,
}

impl LocalStore {
    pub fn open(_layout: StoreLayout, _access: Access) -> Result<Self, Error> {
        todo!()
    }

    pub fn layout(&self) -> &StoreLayout {
        todo!()
    }

    pub fn store_dir(&self) -> &StoreDir {
        todo!()
    }

    /// Where the object's files lie.
    pub fn real_path(&self, _path: &StorePath) -> PathBuf {
        todo!()
    }

    pub fn path_info(&self, _path: &StorePath) -> Result<Option<PathInfo>, Error> {
        todo!()
    }

    pub fn is_valid(&self, _path: &StorePath) -> Result<bool, Error> {
        todo!()
    }

    /// Those of `paths` that are valid.
    pub fn valid_paths(&self, _paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, Error> {
        todo!()
    }

    pub fn all_valid_paths(&self) -> Result<BTreeSet<StorePath>, Error> {
        todo!()
    }

    /// The valid path whose hash part is the 32 digits `hash_part`.
    pub fn query_by_hash_part(&self, _hash_part: &str) -> Result<Option<StorePath>, Error> {
        todo!()
    }

    /// Valid paths that refer to `path`.
    pub fn referrers(&self, _path: &StorePath) -> Result<BTreeSet<StorePath>, Error> {
        todo!()
    }

    /// `paths` and everything that they refer to. Fails if one of them is not valid.
    pub fn closure(&self, _paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, Error> {
        todo!()
    }

    /// The outputs of a valid `.drv` path, as far as they are known from it.
    pub fn derivation_outputs(
        &self,
        _drv: &StorePath,
    ) -> Result<std::collections::BTreeMap<OutputName, StorePath>, Error> {
        todo!()
    }

    /// Reads a valid `.drv`.
    pub fn read_derivation(&self, _drv: &StorePath) -> Result<Derivation, Error> {
        todo!()
    }

    /// Writes the NAR of a valid path. Returns its size.
    pub fn dump(&self, _path: &StorePath, _output: &mut dyn Write) -> Result<u64, Error> {
        todo!()
    }

    /// Imports an archive: protects the path from collectors, locks it, unpacks and hashes, compares hash, size and
    /// content address with `info`, and registers it. Reads exactly `info.nar_size` bytes at most. On failure nothing
    /// is left on disk.
    pub fn add_nar(
        &self,
        _info: &PathInfo,
        _ultimate: bool,
        _registration_time: u64,
        _nar: &mut dyn Read,
    ) -> Result<Added, Error> {
        todo!()
    }

    /// Registers paths whose objects are in place, in one transaction. Whatever one refers to must be valid already
    /// or be among them.
    pub fn register(&self, _paths: &[ValidPath]) -> Result<(), Error> {
        todo!()
    }

    /// A session's temporary roots.
    pub fn temp_roots(&self) -> Result<TempRoots, Error> {
        todo!()
    }

    /// Makes the path invalid and deletes its files. Fails if another valid path refers to it.
    pub fn delete_path(&self, _path: &StorePath) -> Result<u64, Error> {
        todo!()
    }

    /// Makes a new directory in the store's directory that no collector touches while the guard lives.
    pub fn temp_dir(&self) -> Result<TempDir, Error> {
        todo!()
    }

    /// Compares database and disk; with `contents` also the hash of every object.
    pub fn verify(&self, _contents: bool) -> Result<VerifyReport, Error> {
        todo!()
    }
}

/// A directory of mode 0700 in the store's own directory, deleted with the guard.
#[derive(Debug)]
pub struct TempDir {}

impl TempDir {
    pub fn path(&self) -> &Path {
        todo!()
    }
}
