//! The local store: its database and its objects together.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use drover_nix::derivation::modulo::InputHash;
use drover_nix::{OutputName, PathInfo, Sha256, StoreDir, StorePath};
use rustix::fs::{Mode, OFlags};

use crate::db::Database;
use crate::{Error, StoreLayout, TempRoots, open};

/// Imported paths that are known by heart, give or take one batch: beyond it the database is asked.
const MAX_IMPORTED: usize = 1 << 16;
/// From which size on an archive goes past its buffer, in bytes.
const STRAIGHT_FROM: u64 = 64 << 10;

/// What a store is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Nothing is created and nothing changes. Needs no rights but to read.
    ReadOnly,
    /// Creates what is missing, the whole store if need be.
    ReadWrite,
}

/// An open store. `Send + Sync`, and cheap to clone: clones share connections, one of which each operation in progress
/// has to itself, so every thread may use the same store.
#[derive(Clone, Debug)]
pub struct LocalStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    layout: StoreLayout,
    access: Access,
    database: Database,
    /// Held shared while the store is open, so that nobody migrates the database under us.
    _big_lock: Option<File>,
    /// The directory of the store, and whether modes hold in it: see [`crate::fs::modes_hold`].
    directory: OnceLock<(OwnedFd, bool)>,
    /// What imports protect; see [`LocalStore::add_nar`].
    temp_roots: OnceLock<TempRoots>,
    /// See [`LocalStore::imported`].
    imported: Mutex<HashMap<StorePath, u64>>,
    /// Hashes of derivations that were read to verify others.
    input_hashes: Mutex<HashMap<StorePath, InputHash>>,
}

/// A path to be registered, its object in place on disk.
#[derive(Clone, Debug)]
pub struct ValidPath {
    pub info: PathInfo,
    /// Built here.
    pub ultimate: bool,
    /// Unix seconds; 0 for now.
    pub registration_time: u64,
}

impl LocalStore {
    /// Opens the store, creating it if `access` allows that and it is not there.
    pub fn open(layout: StoreLayout, access: Access) -> Result<Self, Error> {
        let (database, big_lock) = open::open(&layout, access)?;
        Ok(Self {
            inner: Arc::new(Inner {
                layout,
                access,
                database,
                _big_lock: big_lock,
                directory: OnceLock::new(),
                temp_roots: OnceLock::new(),
                imported: Mutex::default(),
                input_hashes: Mutex::default(),
            }),
        })
    }

    pub fn layout(&self) -> &StoreLayout {
        &self.inner.layout
    }

    /// What paths in the store begin with, wherever the files lie.
    pub fn store_dir(&self) -> &StoreDir {
        &self.inner.layout.store_dir
    }

    pub fn access(&self) -> Access {
        self.inner.access
    }

    /// Where the object's files lie.
    pub fn real_path(&self, path: &StorePath) -> PathBuf {
        self.inner.layout.real_store_dir.join(path.as_str())
    }

    pub fn path_info(&self, path: &StorePath) -> Result<Option<PathInfo>, Error> {
        Ok(self.database().row(path)?.map(|row| row.info))
    }

    /// A valid path with what only this store's database says of it.
    pub fn registration(&self, path: &StorePath) -> Result<Option<ValidPath>, Error> {
        self.database().row(path)
    }

    pub fn is_valid(&self, path: &StorePath) -> Result<bool, Error> {
        self.database().is_valid(path)
    }

    /// Those of `paths` that are valid.
    pub fn valid_paths(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, Error> {
        self.database().valid_paths(paths)
    }

    pub fn all_valid_paths(&self) -> Result<BTreeSet<StorePath>, Error> {
        self.database().all_valid_paths()
    }

    /// The valid path whose hash part is the 32 digits `hash_part`.
    pub fn query_by_hash_part(&self, hash_part: &str) -> Result<Option<StorePath>, Error> {
        self.database().by_hash_part(hash_part)
    }

    /// Valid paths that refer to `path`, itself included if it does.
    pub fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, Error> {
        self.database().referrers(path)
    }

    /// `paths` and everything that they refer to. Fails if one of them is not valid.
    pub fn closure(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, Error> {
        self.database().closure(paths)
    }

    /// The outputs of a valid `.drv` path, as far as they are known from it.
    pub fn derivation_outputs(&self, drv: &StorePath) -> Result<BTreeMap<OutputName, StorePath>, Error> {
        self.database().derivation_outputs(drv)
    }

    /// Where Nix found an output whose path is not known from its `.drv`, if it built it here and it is still valid.
    /// `key` is the output's of [`drover_nix::derivation::realisation::keys`].
    pub fn realised_output(
        &self,
        drv: &StorePath,
        key: &Sha256,
        output: &OutputName,
    ) -> Result<Option<StorePath>, Error> {
        self.database().realised_output(drv, key, output)
    }

    /// Valid `.drv` paths that have `path` as an output.
    pub fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, Error> {
        self.database().valid_derivers(path)
    }

    /// Writes the NAR of a valid path. Returns its size.
    pub fn dump(&self, path: &StorePath, output: &mut dyn Write) -> Result<u64, Error> {
        self.valid_size(path)?;
        crate::fs::dump_in(self.directory()?, path.as_str(), &self.real_path(path), output)
    }

    /// [`Self::dump`] where `output` is a buffer before the pipe, socket or file `end`: a large archive goes straight
    /// there, its files without passing through this process, after `output` was flushed.
    pub fn dump_to(
        &self,
        path: &StorePath,
        output: &mut dyn Write,
        end: BorrowedFd<'_>,
    ) -> Result<u64, Error> {
        let (directory, name, real) = (self.directory()?, path.as_str(), self.real_path(path));
        // A size of 0 is one that is not known.
        if (1..STRAIGHT_FROM).contains(&self.valid_size(path)?) {
            return crate::fs::dump_in(directory, name, &real, output);
        }
        output.flush().map_err(|source| Error::Archive {
            act: "write",
            source: drover_nix::Error::NarIo { act: "write", source },
        })?;
        crate::fs::dump_to(directory, name, &real, end)
    }

    /// A session's temporary roots.
    pub fn temp_roots(&self) -> Result<TempRoots, Error> {
        TempRoots::new(self)
    }

    /// Makes the path invalid and deletes its files. Returns the bytes that became free. Fails if another valid path
    /// refers to it. The caller sees to it that nobody needs the path: no root is looked at.
    pub fn delete_path(&self, path: &StorePath) -> Result<u64, Error> {
        self.forget_path(path)?;
        crate::fs::delete(&self.real_path(path))
    }

    /// Makes the path invalid, which is the first half of deleting it: what is left of its files is a leftover then,
    /// whatever happens. False if it was not valid.
    pub(crate) fn forget_path(&self, path: &StorePath) -> Result<bool, Error> {
        self.must_write("delete a path")?;
        let was_valid = self.database().invalidate(path)?;
        self.input_hashes(|hashes| hashes.remove(path));
        Ok(was_valid)
    }

    pub(crate) fn database(&self) -> &Database {
        &self.inner.database
    }

    pub(crate) fn must_write(&self, act: &'static str) -> Result<(), Error> {
        match self.inner.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(Error::ReadOnly { act }),
        }
    }

    /// The size of a valid path's archive, 0 if it is not known.
    fn valid_size(&self, path: &StorePath) -> Result<u64, Error> {
        if let Some(size) = self.imported(|known| known.get(path).copied()) {
            return Ok(size);
        }
        self.database().nar_size(path)?.ok_or_else(|| Error::NotValid { path: path.clone() })
    }

    /// What this process has imported. It protects these paths as long as the store is open, so they stay valid.
    pub(crate) fn imported<T>(&self, f: impl FnOnce(&mut HashMap<StorePath, u64>) -> T) -> T {
        f(&mut self.inner.imported.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn note_imported(&self, paths: &[ValidPath]) {
        self.imported(|known| {
            if known.len() < MAX_IMPORTED {
                known.extend(paths.iter().map(|path| (path.info.path.clone(), path.info.nar_size)));
            }
        });
    }

    /// The roots that this store holds itself, for as long as it is open.
    pub(crate) fn own_temp_roots(&self) -> Result<&TempRoots, Error> {
        if let Some(roots) = self.inner.temp_roots.get() {
            return Ok(roots);
        }
        let roots = TempRoots::new(self)?;
        Ok(self.inner.temp_roots.get_or_init(|| roots))
    }

    pub(crate) fn input_hashes<T>(&self, f: impl FnOnce(&mut HashMap<StorePath, InputHash>) -> T) -> T {
        f(&mut self.inner.input_hashes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The store's directory, opened once.
    pub(crate) fn directory(&self) -> Result<BorrowedFd<'_>, Error> {
        if let Some((fd, _)) = self.inner.directory.get() {
            return Ok(fd.as_fd());
        }
        let path = self.real_store_dir();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd =
            rustix::fs::open(path, flags, Mode::empty()).map_err(Error::sys("open the directory", path))?;
        Ok(self.inner.directory.get_or_init(|| (fd, crate::fs::modes_hold(path))).0.as_fd())
    }

    /// False until [`Self::directory`] was called.
    pub(crate) fn modes_hold(&self) -> bool {
        self.inner.directory.get().is_some_and(|(_, hold)| *hold)
    }

    pub(crate) fn real_store_dir(&self) -> &Path {
        &self.inner.layout.real_store_dir
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{add, store, store_path};

    #[test]
    fn closures_and_referrers() {
        let (_dir, store) = store();
        let a = add(&store, "a", &[]);
        let b = add(&store, "b", &[&a, &store_path("b")]);
        let c = add(&store, "c", &[&b]);
        let d = add(&store, "d", &[]);
        let set = |paths: &[&StorePath]| paths.iter().map(|path| (*path).clone()).collect::<BTreeSet<_>>();
        assert_eq!(store.closure(&set(&[&c])).unwrap(), set(&[&a, &b, &c]));
        assert_eq!(store.closure(&set(&[&a, &d])).unwrap(), set(&[&a, &d]));
        assert_eq!(store.referrers(&a).unwrap(), set(&[&b]));
        assert_eq!(store.referrers(&b).unwrap(), set(&[&b, &c]));
        assert_eq!(store.path_info(&b).unwrap().unwrap().references, set(&[&a, &b]));
        assert!(matches!(store.closure(&set(&[&store_path("e")])), Err(Error::NotValid { .. })));
        assert_eq!(store.all_valid_paths().unwrap(), set(&[&a, &b, &c, &d]));
    }

    #[test]
    fn hash_parts() {
        let (_dir, store) = store();
        let a = add(&store, "a", &[]);
        assert_eq!(store.query_by_hash_part(a.hash_part()).unwrap(), Some(a.clone()));
        assert_eq!(store.query_by_hash_part(store_path("b").hash_part()).unwrap(), None);
        assert_eq!(store.query_by_hash_part(&a.hash_part()[..31]).unwrap(), None);
    }

    #[test]
    fn deleting() {
        let (_dir, store) = store();
        let a = add(&store, "a", &[]);
        let b = add(&store, "b", &[&a, &store_path("b")]);
        assert!(matches!(store.delete_path(&a), Err(Error::Referenced { .. })));
        assert!(store.is_valid(&a).unwrap());
        assert!(store.delete_path(&b).unwrap() > 0);
        assert!(!store.is_valid(&b).unwrap() && !store.real_path(&b).exists());
        store.delete_path(&a).unwrap();
        assert_eq!(store.all_valid_paths().unwrap(), BTreeSet::new());
        // Gone without a trace: it can come back.
        add(&store, "a", &[]);
    }

    #[test]
    fn many_look_ups_agree_with_single_ones() {
        let (_dir, store) = store();
        let valid: BTreeSet<StorePath> = (0..50).map(|i| add(&store, &format!("v{i}"), &[])).collect();
        let mut asked = valid.clone();
        // Enough to be answered by a scan.
        asked.extend((0..3_000).map(|i| store_path(&format!("x{i}"))));
        assert_eq!(store.valid_paths(&asked).unwrap(), valid);
        let few: BTreeSet<StorePath> = asked.iter().take(100).cloned().collect();
        let expected: BTreeSet<StorePath> = few.intersection(&valid).cloned().collect();
        assert_eq!(store.valid_paths(&few).unwrap(), expected);
        assert_eq!(store.valid_paths(&BTreeSet::new()).unwrap(), BTreeSet::new());
    }

    #[test]
    fn a_closed_database_is_complete_without_its_log() {
        let (_dir, store) = store();
        let a = add(&store, "a", &[]);
        let layout = store.layout().clone();
        let log = layout.db_dir().join("db.sqlite-wal");
        assert!(std::fs::metadata(&log).unwrap().len() > 0);
        drop(store);
        // As on a snapshot or an image that has the database only.
        assert!(log.exists());
        std::fs::remove_file(&log).unwrap();
        let _ = std::fs::remove_file(layout.db_dir().join("db.sqlite-shm"));
        assert!(LocalStore::open(layout, Access::ReadOnly).unwrap().is_valid(&a).unwrap());
    }

    #[test]
    fn a_store_for_reading_sees_what_others_write_and_writes_nothing() {
        let (_dir, store) = store();
        let reader = LocalStore::open(store.layout().clone(), Access::ReadOnly).unwrap();
        let a = add(&store, "a", &[]);
        assert!(reader.is_valid(&a).unwrap());
        let mut nar = Vec::new();
        assert_eq!(reader.dump(&a, &mut nar).unwrap(), nar.len() as u64);
        assert!(matches!(reader.delete_path(&a), Err(Error::ReadOnly { .. })));
        assert!(matches!(reader.temp_roots(), Err(Error::ReadOnly { .. })));
        assert!(matches!(reader.dump(&store_path("b"), &mut nar), Err(Error::NotValid { .. })));
    }
}
